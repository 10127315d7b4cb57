"""The event loop of a command that talks to a daemon: one client, signals, a closed pipe.

Imported only when the command line is known to be good, because it brings the network along.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Self

from p2pclaude.cli.common import Console, Interrupted, Target, is_writing
from p2pclaude.cli.lean import asyncio, run, settle
from p2pclaude.client.hintcache import HintCache, cache_directory
from p2pclaude.client.rpc_client import Client, open_client


def run_with_client(
    target: Target, console: Console, work: Callable[[Client], Coroutine[Any, Any, int]], *, acts: bool = False
) -> int:
    """Do a command's work with a client of the daemon and return its exit status; the connection is closed in any case.

    Raises what `work` raises; BrokenPipeError as soon as nobody reads stdout any more, KeyboardInterrupt on SIGINT.
    Work that `acts` is done whoever reads: it hears of a closed pipe when it prints, or calls `watch_stdout`.
    """

    hints = HintCache(cache_directory(os.environ), target.pairing)

    async def use_client() -> int:
        async with open_client(
            target.pairing, bootstrap=target.bootstrap, timeout=target.timeout, note=console.note, hints=hints
        ) as client:
            # Within, so that closing the connection is not interrupted.
            return await _until_interrupted(lambda: work(client), watch=not acts)

    settle()
    return run(use_client())


def run_until_interrupted(work: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a coroutine that prints and return its exit status; ends early as `run_with_client` says."""
    settle()
    return run(_until_interrupted(work, watch=True))


async def _until_interrupted(work: Callable[[], Coroutine[Any, Any, int]], *, watch: bool) -> int:
    """Run `work` until it ends, SIGTERM or SIGHUP arrives, or, if they `watch` it, stdout's reader is gone."""
    global _interruption
    with _Interruption() as _interruption:
        interruption = _interruption
        if watch:
            watch_stdout()
        try:
            return await work()
        except Interrupted as cut:
            return 128 + cut.number
        except asyncio.CancelledError:
            if interruption.reason is None:
                raise
            if isinstance(interruption.reason, BrokenPipeError):
                raise interruption.reason from None
            return interruption.reason


def watch_stdout() -> None:
    """End the work that runs as soon as nobody reads stdout any more, from now on: nothing is left to do but print."""
    if _interruption is not None:
        _interruption.watch()


class _Interruption:
    """Cancels the current task, once, on what ends a command from outside; `reason` is an exit status or an error.

    While stdout is written, which may wait for its reader for ever, a signal raises Interrupted there instead.
    """

    def __init__(self) -> None:
        self.reason: int | BrokenPipeError | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._pipe: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            former = signal.getsignal(number)
            # nohup ignores SIGHUP, and so it must stay; where SIGINT has a handler it is that of asyncio.run
            if former is signal.SIG_DFL or (number == signal.SIGINT and callable(former)):
                self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._pipe is not None:
            self._loop.remove_reader(self._pipe)
        for number, former in self._former.items():
            signal.signal(number, former)

    def watch(self) -> None:
        """Interrupt as soon as nobody reads stdout any more."""
        self._pipe = _stdout_pipe()
        if self._pipe is not None:
            # the end that is written to becomes readable only when the other one is closed
            self._loop.add_reader(self._pipe, self._interrupt, BrokenPipeError())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if is_writing():
            raise Interrupted(number)
        if callable(former := self._former[number]):
            former(number, frame)
        else:
            self._loop.call_soon_threadsafe(self._interrupt, 128 + number)

    def _interrupt(self, reason: int | BrokenPipeError) -> None:
        if self._pipe is not None:
            self._loop.remove_reader(self._pipe)  # it stays readable, and once is enough
        if self.reason is None and self._task is not None:
            self.reason = reason
            self._task.cancel()


_interruption: _Interruption | None = None


def _stdout_pipe() -> int | None:
    """Return stdout's descriptor if it is a pipe; one that is open for reading too has us as a reader, for ever."""
    try:
        descriptor = sys.stdout.fileno()
        only_written = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        return descriptor if only_written and stat.S_ISFIFO(os.fstat(descriptor).st_mode) else None
    except (AttributeError, OSError, ValueError):
        return None
