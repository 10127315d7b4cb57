"""How often a node may punch holes through NATs whose ports nobody can foresee (ring 1)."""

from collections import deque
from typing import Final


class PunchThrottle:
    """Keeps random punching rare: each leaves a few hundred mappings in the NATs. One for each node."""

    LIMIT: Final = 2  # at a time
    BURST: Final = 4  # within a window; a client of upstream's does not ask again when it is told to try later
    WINDOW: Final = 16.0  # seconds

    def __init__(self) -> None:
        self._active = 0
        self._begun: deque[float] = deque(maxlen=self.BURST)

    def allows(self, now: float) -> bool:
        """Tell whether a random punch may begin."""
        begun = self._begun
        return self._active < self.LIMIT and (len(begun) < self.BURST or now - begun[0] >= self.WINDOW)

    def begin(self, now: float) -> None:
        """Count one that begins."""
        self._active += 1
        self._begun.append(now)

    def end(self) -> None:
        """Count one that ended."""
        self._active -= 1
