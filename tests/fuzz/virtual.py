"""Virtual time for targets of ring 2: one fresh event loop an input, and no error may be swallowed."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

from sim import SimLoop

from fuzz import remember

CPU_SECONDS: Final = 30.0


class _Errors(logging.Handler):
    """Remembers what the library caught and logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_errors: Final = _Errors()
logging.getLogger("p2pclaude").addHandler(_errors)
logging.getLogger("asyncio").addHandler(_errors)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` in virtual time; raises what it raises, or the first error that somebody swallowed."""
    loop = SimLoop(cpu_limit=CPU_SECONDS)
    _errors.records.clear()
    try:
        with remember.key_arithmetic():
            loop.run_until_complete(main)
    finally:
        loop.close()
    for record in _errors.records:
        raise AssertionError(f"logged: {record.getMessage()}") from (record.exc_info or (None, None))[1]
    for context in loop.swallowed:
        raise AssertionError(f"swallowed: {context['message']}") from context.get("exception")


async def settle(turns: int) -> None:
    """Let the loop turn until nothing is left to do at this instant, or so often."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    for _ in range(turns):
        if not ready:
            return
        await asyncio.sleep(0)
