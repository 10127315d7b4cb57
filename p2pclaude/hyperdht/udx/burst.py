"""Packets that leave together: their headers, and what they share (ring 1)."""

from typing import NamedTuple

from .packet import END, HEADER, MAGIC, SEQ_MASK
from .rate import Flight
from .recovery import Packet


class BurstHeader(NamedTuple):
    """What the headers of all packets of a burst share; numbers as they stand on the wire.

    END never acknowledges the peer's END: libudx would close on that acknowledgement before it answers this END
    (src/udx.c, process_packet). So `end_ack` is `ack` without the peer's END.
    """

    remote_id: int
    window: int
    ack: int
    end_ack: int


class Burst:
    """Packets that leave in one call: what their headers and bookkeeping share."""

    __slots__ = ("flight", "header", "packets")

    def __init__(self, header: BurstHeader, flight: Flight) -> None:
        self.header = header
        self.flight = flight
        self.packets: list[bytes] = []

    def add(self, packet: Packet) -> None:
        """Append a packet as it is, without padding."""
        remote_id, window, ack, end_ack = self.header
        ack = end_ack if packet.kind & END else ack
        header = HEADER.pack(MAGIC, packet.kind, 0, remote_id, window, packet.seq & SEQ_MASK, ack)
        self.packets.append(header + packet.payload)
