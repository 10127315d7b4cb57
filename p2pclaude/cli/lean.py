"""A light start: asyncio without TLS, and no collector of garbage while modules load.

`network` and the daemons import asyncio through here. Nothing in p2pclaude speaks TLS, and OpenSSL takes a fifth of
the time that a tool needs to start, and megabytes of a daemon's memory.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Coroutine
from typing import Any

if "ssl" not in sys.modules and "asyncio" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # as in a Python built without it, which asyncio provides for
    try:
        import asyncio
    finally:
        del sys.modules["ssl"]
else:
    import asyncio

__all__ = ["asyncio", "run", "settle"]


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run an event loop as `asyncio.run` does, and do not wait at its end for what hangs in a thread.

    That is a name server that does not answer, or a disk: nobody waits for it any more, and it may take for ever. The
    process is to be left with `os._exit`, or the interpreter waits for it.
    """
    with asyncio.Runner() as runner:
        try:
            return runner.run(main)
        finally:
            if (threads := sys.modules.get("concurrent.futures.thread")) is not None:
                runner.get_loop().set_default_executor(threads.ThreadPoolExecutor())  # to wait for instead: idle


def settle() -> None:
    """Begin to collect garbage, apart from what is loaded by now: that stays."""
    gc.freeze()
    gc.enable()
