"""The end of asyncio tasks that race each other: the losers are cancelled and not awaited (ring 2)."""

import asyncio
from collections.abc import Iterable
from typing import Any


def cancel_all(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks that nobody awaits any longer."""
    for task in tasks:
        task.cancel()
        task.add_done_callback(_ignore_outcome)


def _ignore_outcome(task: "asyncio.Task[Any]") -> None:
    """Look at what became of a task that nobody awaits, so that asyncio does not report it as lost."""
    if not task.cancelled():
        task.exception()
