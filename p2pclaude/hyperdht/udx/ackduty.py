"""Whether an acknowledgement is owed, and when one is said again, since acknowledgements get lost too (ring 1).

While packets wait behind a gap, or a packet came twice, the peer has something to repeat or to learn. If nothing more
comes within a few round trips, our word of it was probably lost. A libudx that does not hear it waits for its
time-out, one second and then two, four and more, with all of a window sent already.
"""

from typing import Final

ROUND_TRIPS: Final = 2
LEAST_S: Final = 0.05
UNMEASURED_S: Final = 0.2
TIMES: Final = 4


class AckDuty:
    """The acknowledgement that is owed, and the timer of repeated ones, each after twice the time of the one before."""

    __slots__ = ("_left", "_pause", "at", "due")

    def __init__(self) -> None:
        self.due = False
        """Whether one shall leave; also set before the peer is known: it leaves on connect."""
        self.at: float | None = None  # when to say it again, None for never
        self._pause = 0.0
        self._left = 0

    def begin(self, srtt: float | None, now: float) -> None:
        """Start anew: an acknowledgement leaves now that is to be answered by a packet."""
        self._pause = UNMEASURED_S if srtt is None else max(ROUND_TRIPS * srtt, LEAST_S)
        self._left = TIMES
        self.at = now + self._pause

    def handle_timer(self, now: float) -> None:
        """Owe one more if it is time, and wait for the next one."""
        if self.at is None or self.at > now:
            return
        self._left -= 1
        self._pause *= 2
        self.at = now + self._pause if self._left else None
        self.due = True
