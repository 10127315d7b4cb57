"""Whether the network answers at all (ring 1): online, degraded, offline.

`node` reports its counters once a tick (5 s) and says what the verdict is. One bad tick says little, so a verdict takes
several. Source of the thresholds: dht-rpc lib/health.js.
"""

from collections import deque
from typing import Final

WINDOW: Final = 4  # ticks
OFFLINE_TICKS: Final = 2
MIN_EVENTS: Final = 4  # with fewer in a tick it tells nothing
DEGRADED_RATE: Final = 0.5  # of timeouts


class HealthMonitor:
    """Judge the network by the responses and timeouts of the last ticks."""

    def __init__(self) -> None:
        self.online = True
        self.degraded = False
        self._totals: deque[tuple[int, int]] = deque(maxlen=WINDOW)
        self._verdicts: deque[bool] = deque(maxlen=WINDOW)  # degraded or not, of ticks with traffic and answers
        self._offline_ticks = 0

    def reset(self) -> bool:
        """Forget everything, after a sleep; True if that changes `online` or `degraded`."""
        changed = not self.online or self.degraded
        self.online, self.degraded = True, False
        self._totals.clear()
        self._verdicts.clear()
        self._offline_ticks = 0
        return changed

    def update(self, responses: int, timeouts: int) -> bool:
        """Take the totals since the start at the end of a tick; True if `online` or `degraded` changed."""
        last = self._totals[-1] if self._totals else (responses, timeouts)
        self._totals.append((responses, timeouts))
        answered, lost = responses - last[0], timeouts - last[1]
        if len(self._totals) < WINDOW or answered + lost < MIN_EVENTS:
            return False
        before = self.online, self.degraded
        self._judge(answered, lost)
        return before != (self.online, self.degraded)

    def _judge(self, answered: int, lost: int) -> None:
        if answered == 0:
            self._offline_ticks += 1
        else:
            self._offline_ticks = 0
            self._verdicts.append(lost / (answered + lost) > DEGRADED_RATE)
        if answered:
            self.online = True
        elif self._offline_ticks >= OFFLINE_TICKS:
            self.online = False
        if not self.online:
            self.degraded = False
        elif len(self._verdicts) == WINDOW and len(set(self._verdicts)) == 1:
            self.degraded = self._verdicts[0]
