"""The event loop of a command that talks to a daemon: one client, signals, a closed pipe.

Imported only when the command line is known to be good, because it brings the network along.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from p2pclaude.cli.common import Console, Target
from p2pclaude.client import Client, open_client


def run_with_client(target: Target, console: Console, work: Callable[[Client], Awaitable[int]]) -> int:
    """Do a command's work with a client of the daemon and return its exit status; the connection is closed in any case.

    Raises what `work` raises; BrokenPipeError as soon as nobody reads stdout any more, KeyboardInterrupt on SIGINT.
    """

    async def use_client() -> int:
        async with open_client(
            target.pairing, bootstrap=target.bootstrap, timeout=target.timeout, note=console.note
        ) as client:
            return await work(client)

    return run_until_interrupted(use_client)


def run_until_interrupted(work: Callable[[], Awaitable[int]]) -> int:
    """Run a coroutine that prints and return its exit status; ends early as `run_with_client` says."""
    return asyncio.run(_until_interrupted(work))


async def _until_interrupted(work: Callable[[], Awaitable[int]]) -> int:
    """Run `work` until it ends, SIGTERM or SIGHUP arrives, or stdout's reader is gone."""
    with _cancelled_by_world() as why:
        try:
            return await work()
        except asyncio.CancelledError:
            if not why:
                raise
            if isinstance(why[0], BrokenPipeError):
                raise why[0] from None
            return why[0]


@contextmanager
def _cancelled_by_world() -> Iterator[list[int | BrokenPipeError]]:
    """Cancel the current task on what ends a command from outside, and note which it was."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    why: list[int | BrokenPipeError] = []

    def cancel(reason: int | BrokenPipeError) -> None:
        if pipe is not None:
            loop.remove_reader(pipe)
        why.append(reason)
        if task is not None:
            task.cancel()

    pipe = _stdout_pipe()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP, and so it must stay
            loop.add_signal_handler(number, cancel, 128 + number)
    if pipe is not None:
        # the end that is written to becomes readable only when the other one is closed
        loop.add_reader(pipe, cancel, BrokenPipeError())
    try:
        yield why
    finally:
        if pipe is not None:
            loop.remove_reader(pipe)


def _stdout_pipe() -> int | None:
    """Return stdout's descriptor if it is a pipe."""
    try:
        descriptor = sys.stdout.fileno()
        return descriptor if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else None
    except (AttributeError, OSError, ValueError):
        return None
