"""Packets that leave together."""

import struct

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
