"""A node's ticks, and how it learns that the host has slept between two of them (ring 2)."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

TICK_SECONDS: Final = 5.0
SLEEP_SECONDS: Final = 3 * TICK_SECONDS  # a gap between ticks that means the host slept


def host_sleep() -> float:
    """Return the seconds this host has slept since it booted, which the event loop's clock leaves out."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if hasattr(time, "CLOCK_UPTIME_RAW"):  # macOS, whose CLOCK_MONOTONIC goes on
        return time.clock_gettime(time.CLOCK_MONOTONIC) - time.clock_gettime(time.CLOCK_UPTIME_RAW)
    return 0.0


class Ticker:
    """Calls `on_tick(slept)` every five seconds; a failure of it is logged, and the next tick comes all the same.

    `slept` tells how long the host has slept in all, in seconds; the call learns whether it did since the last tick.
    """

    def __init__(self, on_tick: Callable[[bool], None], slept: Callable[[], float]) -> None:
        self.slept = slept
        self._on_tick = on_tick
        self._timer: asyncio.TimerHandle | None = None
        self._last = (0.0, 0.0)  # the loop's time and the host's sleep

    def start(self) -> None:
        """Begin; the first tick comes in five seconds."""
        loop = asyncio.get_running_loop()
        self._last = loop.time(), self.slept()
        self._timer = loop.call_later(TICK_SECONDS, self._tick)

    def stop(self) -> None:
        """Have no more ticks until `start`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def is_running(self) -> bool:
        """Whether another tick will come."""
        return self._timer is not None

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        last, self._last = self._last, (loop.time(), self.slept())
        self._timer = loop.call_later(TICK_SECONDS, self._tick)
        try:
            self._on_tick(sum(self._last) - sum(last) > SLEEP_SECONDS)
        except Exception:
            logger.exception("a tick failed")
