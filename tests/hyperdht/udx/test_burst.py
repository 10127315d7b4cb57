"""Packets that leave together, and what a batch of acknowledgements adds up to."""

import struct

from p2pclaude.hyperdht.udx.ackbatch import AckBatch
from p2pclaude.hyperdht.udx.burst import Burst, BurstHeader
from p2pclaude.hyperdht.udx.packet import DATA, END
from p2pclaude.hyperdht.udx.rate import Flight
from p2pclaude.hyperdht.udx.recovery import Packet


def flight(sent_at: float) -> Flight:
    """Return a snapshot of that moment."""
    return Flight(sent_at, 0, sent_at, sent_at, False)


def test_headers_share_what_the_burst_shares() -> None:
    burst = Burst(BurstHeader(7, 1000, 55, 54), flight(1.0))
    burst.add(Packet(2**32 + 3, DATA, b"abc", 51, burst.flight, 0))
    burst.add(Packet(9, END, b"", 48, burst.flight, 1))
    data, end = burst.packets
    assert data[20:] == b"abc" and end[20:] == b""
    assert struct.unpack("<BBBBIIII", data[:20]) == (255, 1, DATA, 0, 7, 1000, 3, 55)
    assert struct.unpack("<BBBBIIII", end[:20]) == (255, 1, END, 0, 7, 1000, 9, 54)  # not the peer's END


def test_a_batch_adds_up() -> None:
    batch = AckBatch()
    first, second, third = (Packet(i, DATA, b"", 100 + i, flight(1.0 + i / 10), i) for i in range(3))
    third.count = 2  # sent again: its round trip says nothing
    for packet in (second, third, first):
        batch.add(packet, 2.0)
    batch.ended_at = 2.5
    assert batch.newest is third
    acked, rtt, ended_at = batch.take()
    assert (acked, ended_at) == (303, 2.5) and rtt is not None and abs(rtt - 0.9) < 1e-9
    assert batch.newest is None and batch.take() == (0, None, 2.5)
