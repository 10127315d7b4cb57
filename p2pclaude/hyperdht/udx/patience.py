"""How long a sender waits for the peer: when it probes, and when it gives up (ring 1)."""

from typing import Final

from .rtt import RttEstimator

GIVE_UP_S: Final = 11.8  # without progress; an outage of 10 s must kill nothing, and probes leave every second
NEW_PATHS_S: Final = 60.0  # without progress, in which each new path has that time; a hole is punched in less
PROBES: Final = 2  # packets a probe timeout sends: one of them may be lost as well
OUTAGE_ATTEMPTS: Final = 3  # probe timeouts in a row that mean more than a lost tail


class Patience:
    """The clock of what is under way: it starts anew whenever an acknowledgement brings progress.

    All times are in seconds of the stream's `now`.
    """

    __slots__ = ("_answered_at", "_progress_at", "_sent_at", "attempts", "is_over", "probes_due")

    def __init__(self) -> None:
        self.probes_due = 0  # packets that shall leave whatever the window says
        self.is_over = False  # the path is dead
        self.attempts = 0  # probe timeouts since the last progress
        self._sent_at = 0.0
        self._progress_at = 0.0
        self._answered_at = 0.0  # the same, but that new paths do not move it

    def begin(self, now: float) -> None:
        """Begin to wait: nothing was under way, and something is about to be."""
        self._progress_at = self._answered_at = now

    def note_sent(self, now: float) -> None:
        """Note that something left."""
        self._sent_at = now

    def note_progress(self, now: float) -> None:
        """Note that something was acknowledged."""
        self.attempts = self.probes_due = 0
        self._progress_at = self._answered_at = max(self._progress_at, now)

    def note_room(self, now: float) -> None:
        """Give what the peer had no room for its full time again."""
        self._progress_at = now

    def reset_path(self, now: float, *, under_way: bool) -> None:
        """Give another path its time.

        Not for ever: a peer that comes by ever new ways but acknowledges nothing must not keep us.
        """
        self._progress_at = max(self._progress_at, min(now, self._answered_at + NEW_PATHS_S))
        self.attempts = 0
        self.probes_due = PROBES if under_way else 0

    def probe_at(self, rtt: RttEstimator, has_room: bool) -> float:
        """Return when to probe, or to give up; `has_room` tells whether the peer has room for a packet."""
        give_up_at = self._progress_at + GIVE_UP_S
        probe_at = max(self._sent_at, self._progress_at) + rtt.probe_timeout(self.attempts)
        # With no room it may be time to give up, and still too early, for there are answers.
        awaited = self._sent_at < give_up_at or has_room
        return give_up_at if awaited and give_up_at < probe_at else probe_at

    def run_out(self, now: float, last_heard: float, *, has_room: bool) -> bool:
        """Act on what `probe_at` promised: make probes due, or give up; return whether there is hope.

        A path works as long as there is progress; while the peer has no room for data, mere answers count as well.
        """
        alive_at = self._progress_at if has_room else max(self._progress_at, last_heard)
        if now >= alive_at + GIVE_UP_S:
            self.is_over = True
            return False
        self.attempts += 1
        self._sent_at = now
        self.probes_due = PROBES
        return True
