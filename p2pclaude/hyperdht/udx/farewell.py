"""What a stream still says when it is over, and for how long (ring 1)."""

from collections import deque
from typing import Final

LINGER_S: Final = 15.0  # longer than a peer repeats an END (libudx: 13 s)
UNHEARD_LINGER_S: Final = 3.0  # when the peer was never heard of: whoever floods a server costs it no more
DESTROY_TIMES_S: Final = (0.0, 0.3, 1.0)  # when DESTROY is sent: it is never acknowledged


class Farewell:
    """The last words of a stream, and the time when it may be forgotten."""

    __slots__ = ("_times", "finish_at", "is_broken_off", "is_due")

    def __init__(self) -> None:
        self.is_broken_off = False
        """Whether the peer is told DESTROY, and not that all has arrived."""
        self.is_due = False
        """Whether DESTROY shall leave now."""
        self.finish_at: float | None = None
        """When nobody needs to be answered any more; None before the first `linger`."""
        self._times: deque[float] = deque()  # when DESTROY is still to be sent

    @property
    def next_at(self) -> float | None:
        """When there is something to say, or to forget."""
        return self._times[0] if self._times else self.finish_at

    def linger(self, now: float, *, heard: bool) -> None:
        """Begin to say it, unless that has begun; `heard` tells whether the peer was ever heard of."""
        if self.finish_at is not None:
            return
        self.finish_at = now + (LINGER_S if heard else UNHEARD_LINGER_S)
        if self.is_broken_off:
            self._times.extend(now + delay for delay in DESTROY_TIMES_S)

    def take_destroy(self, now: float) -> bool:
        """Tell whether DESTROY leaves now: its time has come, or the peer has said something."""
        while self._times and self._times[0] <= now:
            self._times.popleft()
            self.is_due = True
        due, self.is_due = self.is_due, False
        return due
