"""Acknowledgements come in batches; a batch says what its packets say one by one."""

from random import Random

import pytest

from p2pclaude.hyperdht.udx.packet import DATA, HEADER, MAGIC, SEQ_MASK
from p2pclaude.hyperdht.udx.stream import UdxStream

FIRST = 2**32 - 20  # the wire's numbers wrap on the way
PACKETS = 30


def sender() -> UdxStream:
    """Return a stream with so many packets under way, and a few acknowledged."""
    stream = UdxStream(7, initial_seq=FIRST, initial_remote_seq=FIRST)
    stream.connect(1, 1.0)
    stream.write(bytes(1152 * 4))
    stream.datagrams_to_send(1.0)
    stream.receive_datagrams([bare(stream, FIRST + 4, 1 << 20)], 1.1)
    for number in range(4, PACKETS):
        stream.write(bytes(1000))
        stream.datagrams_to_send(1.1 + number / 100)  # not faster than it is paced
    assert stream.sender.next_seq == FIRST + PACKETS
    return stream


def bare(stream: UdxStream, ack: int, window: int, seq: int = FIRST) -> bytes:
    """Return a bare acknowledgement for that stream."""
    return HEADER.pack(MAGIC, 0, 0, stream.local_id, window, seq & SEQ_MASK, ack & SEQ_MASK)


def state(stream: UdxStream) -> tuple[object, ...]:
    """Return what acknowledgements change, but for the estimates made once a batch."""
    half, receiver = stream.sender, stream.receiver
    return (
        half.acked_below, half.unacked, half.in_flight, half.peer_window, half.stats.bad_acks, half.stats.lost,
        stream.stats, receiver.next_seq, receiver.unread, stream.received_any, stream._last_heard,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(200))
def test_a_batch_says_what_its_packets_say_one_by_one(seed: int) -> None:
    rng = Random(seed)
    together, apart = sender(), sender()
    seq = FIRST
    packets: list[bytes] = []
    for _ in range(rng.randint(1, 40)):
        # Rising, late, repeated, of the time before, and now and then of what was never sent.
        ack = FIRST + rng.choice([rng.randint(0, PACKETS), len(packets), len(packets), rng.randint(-9, PACKETS + 9)])
        window = rng.choice([1 << 20, 1 << 20, rng.randint(0, 1 << 21)])
        if rng.random() < 0.2:
            header = HEADER.pack(MAGIC, DATA, 0, together.local_id, window, seq & SEQ_MASK, ack & SEQ_MASK)
            packets.append(header + rng.randbytes(5))
            seq += rng.random() < 0.9
        else:
            packets.append(bare(together, ack, window, seq))
    together.receive_datagrams(packets, 9.0)
    for packet in packets:
        apart.receive_datagrams([packet], 9.0)
    assert state(together) == state(apart)


def test_the_last_of_a_run_acknowledges_all_before() -> None:
    stream = sender()
    acks = [bare(stream, FIRST + 4 + number, (1 << 20) + number) for number in range(PACKETS - 3)]
    stream.receive_datagrams(acks, 9.0)
    assert stream.sender.acked_below == FIRST + PACKETS
    assert stream.sender.in_flight == stream.unacked == 0
    assert stream.sender.peer_window == (1 << 20) + PACKETS - 4
