"""The event loop of a command that talks to a daemon: one client, signals, a closed pipe.

Imported only when the command line is known to be good, because it brings the network along.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable
from typing import Self

from p2pclaude.cli.common import Console, Target
from p2pclaude.cli.lean import asyncio, settle
from p2pclaude.client import Client, open_client
from p2pclaude.hintcache import HintCache, cache_directory


def run_with_client(target: Target, console: Console, work: Callable[[Client], Awaitable[int]]) -> int:
    """Do a command's work with a client of the daemon and return its exit status; the connection is closed in any case.

    Raises what `work` raises; BrokenPipeError as soon as nobody reads stdout any more, KeyboardInterrupt on SIGINT.
    """

    hints = HintCache(cache_directory(os.environ), target.pairing)

    async def use_client() -> int:
        async with open_client(
            target.pairing, bootstrap=target.bootstrap, timeout=target.timeout, note=console.note, hints=hints
        ) as client:
            # Within, so that closing the connection is not interrupted.
            return await _until_interrupted(lambda: work(client))

    settle()
    return asyncio.run(use_client())


def run_until_interrupted(work: Callable[[], Awaitable[int]]) -> int:
    """Run a coroutine that prints and return its exit status; ends early as `run_with_client` says."""
    settle()
    return asyncio.run(_until_interrupted(work))


async def _until_interrupted(work: Callable[[], Awaitable[int]]) -> int:
    """Run `work` until it ends, SIGTERM or SIGHUP arrives, or stdout's reader is gone."""
    with _Interruption() as interruption:
        try:
            return await work()
        except asyncio.CancelledError:
            if interruption.reason is None:
                raise
            if isinstance(interruption.reason, BrokenPipeError):
                raise interruption.reason from None
            return interruption.reason


class _Interruption:
    """Cancels the current task, once, on what ends a command from outside; `reason` is an exit status or an error."""

    def __init__(self) -> None:
        self.reason: int | BrokenPipeError | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._pipe = _stdout_pipe()
        # nohup ignores SIGHUP, and so it must stay
        self._signals = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]

    def __enter__(self) -> Self:
        for number in self._signals:
            self._loop.add_signal_handler(number, self._interrupt, 128 + number)
        if self._pipe is not None:
            # the end that is written to becomes readable only when the other one is closed
            self._loop.add_reader(self._pipe, self._interrupt, BrokenPipeError())
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._pipe is not None:
            self._loop.remove_reader(self._pipe)
        for number in self._signals:
            self._loop.remove_signal_handler(number)

    def _interrupt(self, reason: int | BrokenPipeError) -> None:
        if self._pipe is not None:
            self._loop.remove_reader(self._pipe)  # it stays readable, and once is enough
        if self.reason is None and self._task is not None:
            self.reason = reason
            self._task.cancel()


def _stdout_pipe() -> int | None:
    """Return stdout's descriptor if it is a pipe."""
    try:
        descriptor = sys.stdout.fileno()
        return descriptor if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else None
    except (AttributeError, OSError, ValueError):
        return None
