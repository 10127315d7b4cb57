"""How many request datagrams may leave (ring 1): a window over the last three seconds.

`rpc` asks it before each send. It bounds what a burst of lookups can throw at a home router, as upstream's does
(dht-rpc lib/io.js, CongestionWindow): four slots of 750 ms, at most `maximum` sends in one and twice that in all.
"""

from typing import Final

SLOT_SECONDS: Final = 0.75
SLOTS: Final = 4


class CongestionWindow:
    """Count sends in the current slot and over all slots; call `rotate` every `SLOT_SECONDS` while not idle."""

    __slots__ = ("_current", "_maximum", "_slots", "total")

    def __init__(self, maximum: int = 80) -> None:
        self._maximum = maximum
        self._slots = [0] * SLOTS
        self._current = 0
        self.total = 0

    @property
    def full(self) -> bool:
        """Whether a send has to wait."""
        return self.total >= 2 * self._maximum or self._slots[self._current] >= self._maximum

    def sent(self) -> None:
        """Count one send."""
        self._slots[self._current] += 1
        self.total += 1

    def settled(self) -> None:
        """Give one send back: a reply came, or its request was given up."""
        if self._slots[self._current]:
            self._slots[self._current] -= 1
            self.total -= 1

    def rotate(self) -> None:
        """Forget the oldest slot and count in it from now on."""
        self._current = (self._current + 1) % SLOTS
        self.total -= self._slots[self._current]
        self._slots[self._current] = 0

    def clear(self) -> None:
        """Forget everything."""
        self._slots = [0] * SLOTS
        self.total = 0
