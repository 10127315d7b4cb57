"""A token bucket that spreads packets over time in bursts that millisecond timers can serve (ring 1)."""

from typing import Final

BUCKET_S: Final = 0.006  # the bucket holds this much of the rate, so that a late timer loses nothing
TICK_S: Final = 0.001  # waking earlier than this costs more than it gives


class Pacer:
    """Tokens are bytes; a burst may leave whenever there are any and may overdraw by one packet."""

    __slots__ = ("_tokens", "_updated_at", "wait_until")

    def __init__(self) -> None:
        self.wait_until: float | None = None
        """When something may leave that could not, None if nothing waits for that."""
        self._tokens: float | None = None
        self._updated_at = 0.0

    def budget(self, now: float, rate: float, quantum: int) -> int:
        """Return the bytes that may leave now at `rate` bytes a second."""
        capacity = max(2 * quantum, rate * BUCKET_S)
        if self._tokens is None:
            self._tokens = capacity
        else:
            self._tokens = min(self._tokens + max(now - self._updated_at, 0.0) * rate, capacity)
        self._updated_at = now
        return int(self._tokens)

    def spend(self, size: int) -> None:
        """Take the bytes that left."""
        if self._tokens is not None:
            self._tokens -= size

    def ready_at(self, rate: float, quantum: int) -> float:
        """Return when a whole burst may leave."""
        missing = quantum - (self._tokens or 0.0)
        return self._updated_at + max(missing / rate, TICK_S)
