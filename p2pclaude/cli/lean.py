"""A light start: asyncio without TLS, and no collector of garbage while modules load.

`network` and the daemons import asyncio through here. Nothing in p2pclaude speaks TLS, and OpenSSL takes a fifth of
the time that a tool needs to start, and megabytes of a daemon's memory.
"""

from __future__ import annotations

import gc
import sys

if "ssl" not in sys.modules and "asyncio" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # as in a Python built without it, which asyncio provides for
    try:
        import asyncio
    finally:
        del sys.modules["ssl"]
else:
    import asyncio

__all__ = ["asyncio", "settle"]


def settle() -> None:
    """Begin to collect garbage, apart from what is loaded by now: that stays."""
    gc.freeze()
    gc.enable()
