"""Packets that lie, repeat, wander or are no packets: nothing raises, nothing is corrupted, memory stays bounded."""

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.udx_pair import Link, Pair, noise

from p2pclaude.hyperdht.udx.packet import DATA, DESTROY, END, HEADER, HEARTBEAT, MAGIC, MESSAGE, SACK, encode_sack
from p2pclaude.hyperdht.udx.sender import MAX_PACKETS_UNDER_WAY
from p2pclaude.hyperdht.udx.stream import Closed, DataReceived, EndReceived, UdxStream

U32 = st.integers(0, 0xFFFFFFFF)
NEAR = st.integers(-3, 60).map(lambda n: n & 0xFFFFFFFF)
PACKETS = st.builds(
    lambda kind, offset, window, seq, ack, rest: HEADER.pack(MAGIC, kind, offset, 1, window, seq, ack) + rest,
    st.integers(0, 255),
    st.sampled_from([0, 0, 0, 1, 8, 255]),
    st.one_of(st.just(100_000), U32),
    st.one_of(NEAR, U32),
    st.one_of(NEAR, U32),
    st.one_of(st.binary(max_size=40), st.lists(st.tuples(NEAR, NEAR), max_size=4).map(encode_sack)),
)
RAW = st.binary(max_size=60)


def pack(kind: int, seq: int, ack: int = 0, rest: bytes = b"", *, window: int = 1_000_000, offset: int = 0) -> bytes:
    return HEADER.pack(MAGIC, kind, offset, 1, window, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF) + rest


def connected(**options: int) -> UdxStream:
    stream = UdxStream(1, **options)
    stream.connect(2, 0.0)
    return stream


def drive(stream: UdxStream, now: float) -> int:
    """Do what a socket would; return the number of packets."""
    while stream.next_event() is not None:
        pass
    timer = stream.get_timer()
    if timer is not None and timer <= now:
        stream.handle_timer(now)
    return len(stream.datagrams_to_send(now))


@settings(max_examples=300)
@given(st.lists(st.lists(st.one_of(PACKETS, RAW), max_size=6), max_size=12), st.booleans(), st.booleans())
def test_any_packets_never_raise(batches: list[list[bytes]], writes: bool, ends: bool) -> None:
    stream = connected(receive_window=50_000)
    now = 1.0
    for batch in batches:
        if writes:
            stream.write(bytes(5000))
        stream.receive_datagrams(batch, now)
        assert drive(stream, now) < 1000
        now += 0.3
    if ends:
        stream.end()
    for _ in range(60):
        now += 0.5
        drive(stream, now)
    sender = stream.sender
    assert sender.in_flight >= 0
    assert sender.unacked >= 0
    assert sender.acked_below <= sender.next_seq


@pytest.mark.parametrize("seed", range(10))
def test_noise_on_a_running_stream_corrupts_nothing(seed: int) -> None:
    """Forged packets that know the ids but none of the numbers, among the true ones."""
    rng = random.Random(seed)
    pair = Pair(seed, a_to_b=Link(delay=0.01, loss=0.02), b_to_a=Link(delay=0.01, loss=0.02))
    data = noise(300_000)
    pair.a.stream.write(data)
    for end, local in ((pair.a, 1), (pair.b, 2)):
        for _ in range(40):
            pair.run(seconds=0.005)
            sender = end.stream.sender
            far = sender.next_seq + 100_000 + rng.randrange(2**30)
            forged = [
                HEADER.pack(MAGIC, DATA, 0, local, 9, far & 0xFFFFFFFF, 0) + b"forged",
                HEADER.pack(MAGIC, 0, 0, local, 1 << 20, 0, far & 0xFFFFFFFF),
                HEADER.pack(MAGIC, SACK, 0, local, 1 << 20, 0, 0) + encode_sack([(far, far + 9), (9, 3)]),
                HEADER.pack(MAGIC, DESTROY, 0, local, 0, far & 0xFFFFFFFF, 0),
                rng.randbytes(rng.randrange(60)),
            ]
            end.stream.receive_datagrams(forged, pair.now)
    assert pair.run(lambda: len(pair.b.received) == len(data), seconds=30)
    assert pair.b.received == data
    assert pair.b.closed is None
    assert pair.a.stream.sender.stats.bad_acks > 0
    assert pair.a.stream.sender.stats.bad_sacks > 0
    assert pair.b.stream.stats.dropped > 0


def test_early_packets_are_bounded_in_bytes_and_number() -> None:
    stream = connected(receive_window=100_000)
    for i in range(2, 2000):
        stream.receive_datagrams([pack(DATA, i, 0, bytes(1000))], 1.0)
    assert stream.stats.dropped >= 2000 - 2 - 400
    stream = connected()
    for i in range(2, 70_000):
        stream.receive_datagrams([pack(DATA, i, 0, b"x")], 1.0)
    assert stream.stats.dropped > 30_000


def test_unread_data_is_bounded_although_the_peer_ignores_the_window() -> None:
    stream = connected(receive_window=100_000)
    for i in range(1000):
        stream.receive_datagrams([pack(DATA, i, 0, bytes(1000))], 1.0)
    taken = 0
    while (event := stream.next_event()) is not None:
        assert isinstance(event, DataReceived)
        taken += len(event.data)
    assert taken <= 400_000
    assert stream.stats.dropped >= 600


def test_answers_to_a_flood_are_few() -> None:
    stream = connected()
    stream.receive_datagrams([pack(HEARTBEAT, 0)] * 1000, 1.0)
    assert len(stream.datagrams_to_send(1.0)) == 1
    stream.destroy()
    stream.datagrams_to_send(1.0)
    stream.receive_datagrams([pack(DATA, 0, 0, b"x")] * 1000, 1.1)
    assert len(stream.datagrams_to_send(1.1)) == 1


def test_acknowledgements_of_what_was_never_sent_are_ignored() -> None:
    stream = connected()
    stream.write(bytes(3000))
    sent = len(stream.datagrams_to_send(1.0))
    stream.receive_datagrams([pack(0, 0, sent + 1), pack(0, 0, 0xFFFFFFFF), pack(0, 0, 0x7FFFFFFF)], 1.1)
    assert stream.unacked == 3000
    assert stream.sender.stats.bad_acks == 2  # the third one is old: it lies behind
    stream.receive_datagrams([pack(0, 0, sent)], 1.2)
    assert stream.unacked == 0


def test_bad_sack_ranges_are_ignored() -> None:
    stream = connected()
    stream.write(bytes(20_000))
    sent = len(stream.datagrams_to_send(1.0))
    bad = [(5, 5), (7, 3), (3, sent + 1), (0, 2), (2**31, 2**31 + 5)]
    stream.receive_datagrams([pack(SACK, 0, 0, encode_sack(bad) + b"odd")], 1.1)
    assert stream.unacked == 20_000
    assert stream.sender.in_flight > 20_000
    assert stream.sender.stats.bad_sacks == 3  # the last two are merely old


def events_of(stream: UdxStream) -> list[object]:
    return list(iter(stream.next_event, None))


def test_nothing_comes_after_the_end() -> None:
    stream = connected()
    stream.receive_datagrams([pack(DATA | END, 1, 0, b"end"), pack(DATA, 2, 0, b"after"), pack(END, 5)], 1.0)
    stream.receive_datagrams([pack(DATA, 0, 0, b"the "), pack(DATA, 2, 0, b"after")], 1.1)
    stream.receive_datagrams([pack(DATA, 2, 0, b"after"), pack(END, 2)], 1.2)
    assert events_of(stream) == [DataReceived(b"the end"), EndReceived()]


def test_repairs_that_were_not_needed_leave_nothing_behind() -> None:
    """A peer that heard no acknowledgement sends all of it again, also what waits behind the gap."""
    stream = connected()
    packets = [pack(DATA, seq, 0, b"%d" % seq) for seq in range(9)]
    stream.receive_datagrams(packets[1:6], 1.1)
    assert stream.receiver.holds_early
    stream.receive_datagrams(packets[:3], 1.2)  # it fills the gap, but not all of what waits came again
    stream.receive_datagrams(packets[6:8], 1.3)
    assert events_of(stream) == [DataReceived(b"012345"), DataReceived(b"67")]
    assert not stream.receiver.holds_early
    assert not stream.receiver.sack_ranges
    stream.consume(8)
    stream.receive_datagrams(packets[8:], 1.4)
    assert stream.receiver.offer == 4 * 1024 * 1024 - 1


@pytest.mark.parametrize("together", [True, False])
def test_what_comes_before_a_destroy_is_read(together: bool) -> None:
    stream = connected()
    packets = [pack(DATA, 0, 0, b"last "), pack(DATA, 1, 0, b"words"), pack(END, 2), pack(DESTROY, 3)]
    for batch in [packets] if together else [[packet] for packet in packets]:
        stream.receive_datagrams(batch, 1.1)
    *data, end, closed = events_of(stream)
    assert b"".join(event.data for event in data if isinstance(event, DataReceived)) == b"last words"
    assert (end, closed) == (EndReceived(), Closed("ECONNRESET"))
    assert stream.finished


def test_an_end_before_data_that_is_here_is_a_lie() -> None:
    stream = connected()
    stream.receive_datagrams([pack(DATA, 2, 0, b"c"), pack(END, 1), pack(DATA, 0, 0, b"a")], 1.0)
    stream.receive_datagrams([pack(DATA, 1, 0, b"b")], 1.1)
    assert events_of(stream) == [DataReceived(b"a"), DataReceived(b"bc")]


def test_a_huge_window_is_cut() -> None:
    stream = connected()
    stream.receive_datagrams([pack(0, 0, 0, window=0xFFFFFFFF)], 1.0)
    assert stream.sender.peer_window == 64 * 1024 * 1024


def test_messages_from_the_peer_cost_one_event_each() -> None:
    stream = connected()
    stream.receive_datagrams([pack(MESSAGE, 0, 0, bytes(1400))] * 10, 1.0)
    assert sum(1 for _ in iter(stream.next_event, None)) == 10


def test_a_peer_that_holds_all_but_the_first_packet_keeps_nobody_busy() -> None:
    """No more packets may be under way at once: there is nothing to wake up for until the first has arrived."""
    stream = connected()
    now, wakes = 1.0, 0
    while not stream.closed and stream.sender.next_seq < MAX_PACKETS_UNDER_WAY:
        for _ in range(100):
            stream.write(b"x")
            stream.datagrams_to_send(now)  # a packet for each byte
            now += 0.0001
        held = encode_sack([(1, stream.sender.next_seq)])
        stream.receive_datagrams([pack(SACK, 0, 0, held, window=1 << 24)], now)
    stream.write(bytes(5000))
    end = now + 0.05
    while now < end:
        stream.datagrams_to_send(now)
        timer = stream.get_timer()
        assert timer is not None
        now = max(now + 0.0001, timer)
        stream.handle_timer(now)
        wakes += 1
    assert wakes < 20


def test_padding_longer_than_the_packet_is_bad() -> None:
    stream = connected()
    stream.receive_datagrams([pack(DATA, 0, 0, b"short", offset=6)], 1.0)
    assert stream.next_event() is None
    assert stream.stats.bad == 1


def test_packets_of_another_stream_are_bad() -> None:
    stream = connected()
    stream.receive_datagrams([HEADER.pack(MAGIC, DATA, 0, 7, 0, 0, 0) + b"x"], 1.0)
    assert stream.next_event() is None
    assert stream.stats.bad == 1


def test_a_closed_stream_holds_no_data() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    streams = []
    for _ in range(20):
        stream = connected()
        stream.write(bytes(200_000))
        stream.datagrams_to_send(1.0)
        stream.receive_datagrams([pack(DATA, 5, 0, bytes(1000))], 1.1)
        stream.destroy()
        assert events_of(stream)[-1] == Closed(None)
        streams.append(stream)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held / len(streams) < 20_000


@pytest.mark.parametrize(("heard", "seconds"), [(False, 3.0), (True, 15.0)])
def test_a_stream_whose_peer_never_came_is_soon_forgotten(heard: bool, seconds: float) -> None:
    stream = UdxStream(1)
    stream.connect(2, 0.0)
    if heard:
        stream.receive_datagrams([pack(DATA, 0, 0, b"x")], 0.0)
    stream.destroy()
    told = 0
    while not stream.finished:
        timer = stream.get_timer() or 0.0
        stream.handle_timer(timer)
        told += sum(data[2] == DESTROY for data in stream.datagrams_to_send(timer))
    assert (timer, told) == (seconds, 3)


def test_ever_new_paths_on_which_nothing_is_acknowledged_do_not_keep_a_stream() -> None:
    """A client that repeats its first packets for half a minute is kept, one that comes by ever new ways is not."""
    pair = Pair()
    pair.a.stream.write(b"x")
    pair.run(lambda: bool(pair.b.received))
    for one in pair.ends:
        one.link.blocked = lambda now, data: True
    began = pair.now
    pair.a.stream.write(bytes(5000))
    while pair.a.closed is None and pair.now < began + 200:
        pair.run(seconds=0.1)
        pair.a.stream.reset_path(pair.now)
    assert pair.a.closed == Closed("ETIMEDOUT")
    assert 45 < pair.now - began < 75


def test_new_paths_without_number_cost_no_memory() -> None:
    stream = connected()
    stream.write(bytes(5000))
    times = [number / 100 for number in range(2000)]

    def take_paths(from_: int, to: int) -> int:
        for now in times[from_:to]:
            stream.reset_path(now)
            stream.datagrams_to_send(now)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    few, many = take_paths(0, 100), take_paths(100, 2000)
    tracemalloc.stop()
    assert many < few + 20_000
