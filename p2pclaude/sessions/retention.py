"""Ended sessions that are old enough are deleted: `p2pclaude-daemon --retain DAYS`.

`daemon` runs it beside everything else. Only what was stopped goes, never a session that could go on. A clock that
jumped deletes nothing: it looks only after a time that the system's clock and the one that cannot be set agree on, so
not at the start either, when a machine may not know the time yet. A machine that was asleep meanwhile has not jumped.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from p2pclaude.host.log import Event, Log
from p2pclaude.sessions.table import SessionTable

FIRST_SECONDS: Final = 3600.0
"""When it looks first."""
DAY_SECONDS: Final = 86_400.0
"""How often it looks then."""
JUMP_SECONDS: Final = 600.0
"""The clocks may differ by so much after that time; more is a jump."""

_STEADY_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # on macOS this one goes on in sleep, too


def steady() -> float:
    """Give the seconds of a clock that cannot be set, and goes on while the machine sleeps: the event loop's stops."""
    return time.clock_gettime(_STEADY_CLOCK)


class Retention:
    """Deletes sessions that ended more than `days` ago. `clock` gives the time of day in seconds."""

    def __init__(
        self,
        table: SessionTable,
        days: int,
        log: Log,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = steady,
    ) -> None:
        self._table = table
        self._seconds = days * DAY_SECONDS
        self._log = log
        self._clock = clock
        self._steady = steady

    async def run(self) -> None:
        """Look every day, for the first time after an hour, until it is cancelled."""
        seconds = FIRST_SECONDS
        while True:
            if await self._passes(seconds):
                await self.remove_old()
            else:
                self._log(Event.WARNING, message="the clock jumped: no old sessions are deleted today")
            seconds = DAY_SECONDS

    async def _passes(self, seconds: float) -> bool:
        """Let that time pass; tell whether the system's clock agrees."""
        begin = self._steady()
        before = self._clock() - begin
        while (left := begin + seconds - self._steady()) > 0:
            await asyncio.sleep(min(left, FIRST_SECONDS))  # of the loop's time, which may be much longer
        return abs(self._clock() - self._steady() - before) < JUMP_SECONDS

    async def remove_old(self) -> None:
        """Delete what is old enough by now."""
        for session_id in self._table.ended_before(self._clock() - self._seconds):
            try:
                removed = await self._table.remove(session_id)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                self._log(Event.WARNING, message=f"a session cannot be deleted: {reason}", session=session_id)
                continue
            if removed:
                self._log(Event.REMOVED, session=session_id)
