"""The server under test, a process of its own that speaks JSON lines: config {bootstrap, linger: seconds or null}.

Closed streams linger for so long, by default as always.

A connection's first byte says what it is for: `e` everything comes back, `d` everything is read, `p` data pours until
the client leaves. Events: ready {publicKey, port}. Commands: stats {collect: first the garbage} -> stats
{fds, tasks, rss, streams, pending, open, served, received}.
"""

import asyncio
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Final

from interop.python.control import Command, config, emit, resident_bytes, serve_commands

from p2pclaude.hyperdht import Connection, HyperDHT
from p2pclaude.hyperdht.udx import farewell

BLOCK: Final = bytes(1 << 16)


def open_descriptors() -> int:
    """Return how many file descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Counters:
    """What was done so far."""

    open = 0
    served = 0
    received = 0


async def serve(connection: Connection) -> None:
    """Serve one connection to its end."""
    Counters.open += 1
    try:
        data = await connection.read()
        if data[:1] == b"p":
            while not connection.closed:
                await connection.write(BLOCK)
        while data:
            Counters.received += len(data)
            if data[:1] == b"e":
                await connection.write(data)
            data = await connection.read()
        await connection.close()
    finally:
        Counters.open -= 1
        Counters.served += 1


async def main() -> None:
    """Listen, report, obey."""
    logging.basicConfig(stream=sys.stderr)
    if config.get("linger") is not None:
        farewell.LINGER_S = config["linger"]  # type: ignore[misc]
    async with HyperDHT(bootstrap=config["bootstrap"], host="127.0.0.1") as dht:
        server = dht.create_server(serve)
        await server.listen()

        async def stats(command: Command) -> None:
            if command.get("collect"):
                gc.collect()
            emit(
                "stats",
                fds=open_descriptors(),
                tasks=len(asyncio.all_tasks()),
                rss=resident_bytes(),
                cpu=sum(os.times()[:2]),
                streams=len(dht.endpoint.streams),
                pending=len(server._slots),
                open=Counters.open,
                served=Counters.served,
                received=Counters.received,
            )

        emit("ready", publicKey=server.public_key.hex(), port=dht.port)
        await serve_commands({"stats": stats})


if __name__ == "__main__":
    asyncio.run(main())
