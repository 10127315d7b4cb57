"""Clients that come anew all the time, in a process of their own: does one find the door shut?

Usage: newcomers URL BOOTSTRAP, from `followers`. A client with a DHT node of its own, as a tool is, comes every EVERY
seconds whether the one before is done or not, lists the sessions and leaves. When stdin ends and the last is gone a
JSON object says {ms: [of each], failed: [why]}.
"""

import asyncio
import json
import sys
import threading
import time
from typing import Final

from p2pclaude.client import remote_sessions
from p2pclaude.client.rpc_client import open_client
from p2pclaude.errors import P2PClaudeError
from p2pclaude.protocol.pairing import Pairing, parse_url

EVERY: Final = 0.2


async def come(pairing: Pairing, bootstrap: str, ms: list[float], failed: list[str]) -> None:
    """Do what `p2pclaude-ls` does."""
    began = time.monotonic()
    try:
        async with open_client(pairing, bootstrap=[bootstrap]) as client:
            await remote_sessions.list_sessions(client)
            ms.append((time.monotonic() - began) * 1000)
    except P2PClaudeError as error:
        failed.append(f"after {time.monotonic() - began:.1f} s: {error} ({error.__cause__!r})")


async def main(url: str, bootstrap: str) -> None:
    """Let them come until stdin ends."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(over.set)), daemon=True).start()
    ms: list[float] = []
    failed: list[str] = []
    async with asyncio.TaskGroup() as coming:
        while not over.is_set():
            coming.create_task(come(parse_url(url), bootstrap, ms, failed))
            await asyncio.sleep(EVERY)
    print(json.dumps({"ms": ms, "failed": failed}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
