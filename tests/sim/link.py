"""What happens to a packet on its way: delay, loss, duplication, a queue of finite bandwidth, an MTU."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Final

HEADER_BYTES: Final = 28  # IPv4 and UDP, which count for the MTU and the bandwidth


@dataclass(slots=True)
class Link:
    """Describe one direction of a path. One object is one queue: whoever shares it shares its bandwidth.

    latency: seconds, drawn uniformly for each packet, so that a wide range reorders.
    loss, duplicate: probabilities.
    bandwidth: bytes a second, None for unlimited; queue_bytes is what may wait for it.
    mtu: bytes of the IP packet; larger ones vanish, unless they may be fragmented.
    hops: routers on the way, each taking one from the TTL.
    """

    latency: tuple[float, float] = (0.02, 0.02)
    loss: float = 0.0
    duplicate: float = 0.0
    bandwidth: float | None = None
    queue_bytes: int = 128 * 1024
    mtu: int = 1500
    hops: int = 0
    _busy_until: float = field(default=0.0, repr=False)

    def cross(
        self, data_bytes: int, start: float, rng: Random, stats: Counter[str], fragment: bool = False
    ) -> list[float]:
        """Return the times at which copies of a datagram sent at `start` come out: none, one or two of them."""
        size = data_bytes + HEADER_BYTES
        if size > self.mtu and not fragment:
            stats["too_big"] += 1
            return []
        if self.bandwidth is not None:
            waiting = max(0.0, self._busy_until - start) * self.bandwidth
            if waiting + size >= self.queue_bytes + 1:  # a whole byte, as the time above is not exact
                stats["queue_full"] += 1
                return []
            start = max(start, self._busy_until) + size / self.bandwidth
            self._busy_until = start
        if self.loss and rng.random() < self.loss:
            stats["lost"] += 1
            return []
        low, high = self.latency
        if self.duplicate and rng.random() < self.duplicate:
            stats["duplicated"] += 1
            return [start + rng.uniform(low, high), start + rng.uniform(low, high)]
        return [start + (rng.uniform(low, high) if high > low else low)]
