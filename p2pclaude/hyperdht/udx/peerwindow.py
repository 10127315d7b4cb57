"""The room that the peer has for data, by its own word (ring 1)."""

from typing import Final

from .windowprobe import WindowProbe

MAX_UNDER_WAY: Final = 64 * 1024 * 1024  # whatever window the peer offers
MAX_SPAN: Final = 3  # windows between the first unacknowledged byte and the last
UNTOLD_WINDOW: Final = 4 * 1024 * 1024  # until the peer says; libudx UDX_DEFAULT_RWND_MAX


class PeerWindow:
    """The peer's window in bytes, and the probe that asks for it again while it is closed."""

    __slots__ = ("_from", "_largest", "held", "probe", "size")

    def __init__(self, initial_remote_seq: int) -> None:
        self.size = UNTOLD_WINDOW
        self.held = 0
        """Payload bytes that the peer holds behind a gap, as it said: they take no room of the window (libudx)."""
        self.probe = WindowProbe()
        self._largest = 0
        self._from = (initial_remote_seq - 1, 0)  # (seq, ack) of the packet that the window is from

    def update(self, window: int, seq: int, ack: int) -> None:
        """Take a window unless an older packet brought it (the rule of RFC 9293 3.10.7.4)."""
        if self._from[0] < seq or (self._from[0] == seq and self._from[1] <= ack):
            self._from = (seq, ack)
            self.size = min(window, MAX_UNDER_WAY)
            self._largest = max(self._largest, self.size)

    def room(self, unacked: int) -> int:
        """Return the payload bytes that may be sent when so many are unacknowledged.

        What the peer already holds does not count, within bounds that `Receiver` keeps room for.
        """
        assert 0 <= self.held <= unacked
        span_left = MAX_SPAN * self._largest - unacked if self._largest else self.size
        return min(self.size - (unacked - self.held), span_left)
