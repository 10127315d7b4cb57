"""Which packets are lost: time-based loss detection in the manner of RACK (RFC 8985) (ring 1).

A packet is lost when one that left later has arrived, and a reordering window passed as well. Packets that left last
have none behind them; the sender's probes make up for that. The window adapts: it is nothing until reordering was
seen and while repairing, a quarter of the minimum round trip otherwise, and grows when a retransmission turns out to
have been needless. UDX has no duplicate reports (DSACK); an answer that comes sooner than any round trip after the
retransmission must be the first transmission's, and serves instead.
"""

from collections import deque
from typing import Final

from .rate import Flight
from .rtt import RttEstimator

IN_FLIGHT: Final = 0
LOST: Final = 1
DELIVERED: Final = 2

MAX_WINDOW_STEPS: Final = 16  # in quarters of the minimum round trip
CALM_RECOVERIES: Final = 16  # after that many repairs without a needless one the window shrinks back (RFC 8985)
SACKS_WITHOUT_REORDERING: Final = 3


class Packet:
    """A packet with a sequence number, from its first departure until its acknowledgement."""

    __slots__ = ("count", "first_order", "flight", "kind", "order", "padded_mtu", "payload", "seq", "size", "state")

    def __init__(self, seq: int, kind: int, payload: bytes, size: int, flight: Flight, order: int) -> None:
        self.seq = seq  # unbounded
        self.kind = kind
        self.payload = payload
        self.size = size  # bytes on the wire, IP header included
        self.flight = flight  # of the latest transmission
        self.order = order  # number of the latest transmission
        self.first_order = order
        self.count = 1  # transmissions
        self.state = IN_FLIGHT
        self.padded_mtu = 0  # the size an MTU probe tests, 0 for other packets


class LossDetector:
    """Keeps transmissions in the order they left and names those that must be lost."""

    def __init__(self, rtt: RttEstimator) -> None:
        self._rtt = rtt
        self.sent: deque[tuple[int, Packet]] = deque()
        """Every transmission with its packet, in the order they left: add to it. Outdated ones are skipped."""
        self._newest_order = -1  # the latest transmission known to have arrived
        self._newest_rtt = 0.0
        self.highest_seq = -1  # of the packets that arrived
        self._reordering_seen = False
        self._window_steps = 1
        self._calm = 0
        self._recovery_end = -1  # repairs last until this packet is acknowledged
        self.next_order = 0  # number of the next transmission
        self.repairs: list[int] = []  # heap of sequence numbers to send again; outdated ones are skipped
        self.sacked = 0  # packets the peer holds behind a gap
        self.deadline: float | None = None  # when a packet will have to be called lost
        self.spurious = 0

    def on_delivered(self, packet: Packet, now: float) -> None:
        """Note a packet's first acknowledgement."""
        elapsed = now - packet.flight.sent_at
        if packet.count > 1:
            minimum = self._rtt.minimum
            if minimum is not None and elapsed < minimum:
                self._on_spurious()
                return
        elif packet.seq < self.highest_seq:
            self._reordering_seen = True
        if packet.seq > self.highest_seq:
            self.highest_seq = packet.seq
        if packet.order > self._newest_order:
            self._newest_order = packet.order
            self._newest_rtt = elapsed

    def _on_spurious(self) -> None:
        self.spurious += 1
        self._reordering_seen = True
        self._window_steps = min(self._window_steps + 1, MAX_WINDOW_STEPS)
        self._calm = 0

    def detect(self, acked_below: int, next_seq: int, now: float) -> list[Packet]:
        """Return the packets now lost, marked so, and set `deadline` for the next one."""
        self.deadline = None
        lost: list[Packet] = []
        sent = self.sent
        patience = self._newest_rtt + self._reordering_window(acked_below)
        while sent:
            order, packet = sent[0]
            if packet.order == order and packet.state == IN_FLIGHT:
                if order >= self._newest_order:
                    break
                if packet.flight.sent_at + patience > now:
                    self.deadline = packet.flight.sent_at + patience
                    break
                packet.state = LOST
                lost.append(packet)
            sent.popleft()
        if lost and acked_below > self._recovery_end:
            self._begin_recovery(next_seq)
        return lost

    def forget_path(self) -> None:
        """Drop what was learnt of the path; what is under way is judged by later packets only."""
        self.sent = deque(entry for entry in self.sent if entry[1].order == entry[0])  # paths may change often
        self._reordering_seen = False
        self._window_steps = 1
        self._newest_order = -1

    def _begin_recovery(self, next_seq: int) -> None:
        self._recovery_end = next_seq - 1
        self._calm += 1
        if self._calm >= CALM_RECOVERIES:
            self._window_steps = 1

    def _reordering_window(self, acked_below: int) -> float:
        repairing = acked_below <= self._recovery_end
        if not self._reordering_seen and (repairing or self.sacked >= SACKS_WITHOUT_REORDERING):
            return 0.0
        srtt, minimum = self._rtt.srtt, self._rtt.minimum
        if minimum is None:
            return 0.0
        assert srtt is not None  # one measurement gives both
        return min(self._window_steps * minimum / 4, srtt)
