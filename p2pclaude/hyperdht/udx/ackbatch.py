"""What acknowledgements brought since conclusions were last drawn from them (ring 1)."""

from .recovery import Packet


class AckBatch:
    """Adds up the packets of a batch; `Sender` draws the conclusions."""

    __slots__ = ("acked", "ended_at", "newest", "rtt")

    def __init__(self) -> None:
        self.acked = 0  # bytes
        self.ended_at = 0.0  # when the batch had been read
        self.newest: Packet | None = None  # the one that left last
        self.rtt: float | None = None  # seconds, the smallest

    def add(self, packet: Packet, now: float) -> None:
        """Count a packet on its first acknowledgement."""
        self.acked += packet.size
        if self.newest is None or packet.order > self.newest.order:
            self.newest = packet
        if packet.count == 1:
            rtt = now - packet.flight.sent_at
            if self.rtt is None or rtt < self.rtt:
                self.rtt = rtt

    def take(self) -> tuple[int, float | None, float]:
        """Return the bytes, the round trip and the time of the batch, and begin another one."""
        acked, rtt = self.acked, self.rtt
        self.newest, self.rtt, self.acked = None, None, 0
        return acked, rtt, self.ended_at
