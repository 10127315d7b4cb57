"""Asks a peer now and then whether its closed window is open again: its word may have been lost (ring 1)."""

from typing import Final

FIRST_INTERVAL_S: Final = 0.25
MAX_INTERVAL_S: Final = 2.0


class WindowProbe:
    """The timer of zero-window probes; `due` tells the stream to send a HEARTBEAT."""

    __slots__ = ("_attempts", "_closed_at", "at", "due")

    def __init__(self) -> None:
        self.at: float | None = None  # when to ask next
        self.due = False
        self._attempts = 0
        self._closed_at = 0.0

    def watch(self, closed: bool, timeout: float, now: float) -> None:
        """Start or stop; `timeout` is how long an answer may take."""
        if not closed:
            self.at = None
            self._attempts = 0
        elif self.at is None:
            if not self._attempts:
                self._closed_at = now
            interval = max(timeout, FIRST_INTERVAL_S) * 2.0 ** min(self._attempts, 3)
            self.at = now + min(interval, MAX_INTERVAL_S)

    def handle_timer(self, now: float) -> None:
        """Make a probe due if it is time."""
        if self.at is not None and self.at <= now:
            self.at = None
            self._attempts += 1
            self.due = True

    def silence(self, last_heard: float, now: float) -> float:
        """Return for how long the peer has not answered the probes."""
        return now - max(last_heard, self._closed_at) if self._attempts else 0.0

    def stop(self) -> None:
        """Ask no more."""
        self.at = None
        self.due = False
