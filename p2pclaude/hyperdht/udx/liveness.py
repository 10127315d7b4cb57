"""Asks a peer whether it is still there, when there is no data that it would have to acknowledge (ring 1)."""

from typing import Final

INTERVAL_S: Final = 1.0


class Liveness:
    """The timer of one question, which is repeated until the peer says anything."""

    __slots__ = ("_asked_at", "at")

    def __init__(self) -> None:
        self.at: float | None = None  # when to look, and to ask again
        self._asked_at = 0.0

    def ask(self, now: float) -> None:
        """Ask now, unless an answer is awaited already."""
        if self.at is None:
            self._asked_at = self.at = now

    def handle_timer(self, last_heard: float, now: float) -> bool:
        """Return whether to ask; `last_heard` is when the peer's last packet came."""
        if self.at is None or now < self.at:
            return False
        asks = last_heard <= self._asked_at
        self.at = now + INTERVAL_S if asks else None
        return asks

    def silence(self, now: float) -> float:
        """Return for how long the peer has not answered."""
        return 0.0 if self.at is None else now - self._asked_at
