"""Many clients in one process that speaks JSON lines: config {bootstrap, host, nodes}.

Every client is a DHT node of its own, all on `host`. Events: ready. Commands: visit {key, count, size} -> visited
{ok, failed: {reason: count}, ms: [of each connect]}: each client connects, has `size` bytes echoed and closes, until
`count` visits are made together; pour {key}, drain {key} -> a stream that lasts, down or up; received -> {bytes}.
"""

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Final

from interop.python.control import Command, Handler, config, emit, serve_commands

from p2pclaude.hyperdht import HyperDHT

VISIT_SECONDS: Final = 30.0
BLOCK: Final = bytes(1 << 16)


class Received:
    """What streams that last have brought."""

    size = 0


async def visit(dht: HyperDHT, key: bytes, size: int) -> float:
    """Connect, have bytes echoed, close; return the seconds it took to connect."""
    began = time.perf_counter()
    async with asyncio.timeout(VISIT_SECONDS), await dht.connect(key) as connection:
        seconds = time.perf_counter() - began
        question = b"e" * size
        await connection.write(question)
        await connection.write_eof()
        answer = b""
        while data := await connection.read():
            answer += data
        if answer != question:
            raise ValueError("the echo is not what was said")
    return seconds


async def visits(command: Command, nodes: list[HyperDHT]) -> None:
    """Let every node visit until enough is done."""
    left = iter(range(command["count"]))
    failed: Counter[str] = Counter()
    ms: list[float] = []

    async def work(dht: HyperDHT) -> None:
        for _ in left:
            try:
                ms.append(1000 * await visit(dht, bytes.fromhex(command["key"]), command["size"]))
            except Exception as error:
                failed[f"{type(error).__name__}: {error}"] += 1

    await asyncio.gather(*map(work, nodes))
    emit("visited", ok=len(ms), failed=failed, ms=ms)


async def pour(command: Command, dht: HyperDHT) -> None:
    """Receive for as long as it lasts."""
    async with await dht.connect(bytes.fromhex(command["key"])) as connection:
        await connection.write(b"p")
        emit("pouring")
        try:
            while data := await connection.read():
                Received.size += len(data)
        finally:
            connection.abort()  # the server never ends by itself


async def drain(command: Command, dht: HyperDHT) -> None:
    """Send for as long as it lasts."""
    async with await dht.connect(bytes.fromhex(command["key"])) as connection:
        await connection.write(b"d")
        emit("draining")
        while True:
            await connection.write(BLOCK)


async def main() -> None:
    """Start the nodes, then obey."""
    async with AsyncExitStack() as stack:
        make = [HyperDHT(bootstrap=config["bootstrap"], host=config["host"]) for _ in range(config["nodes"])]
        nodes = [await stack.enter_async_context(node) for node in make]
        for node in nodes:
            await node.bootstrapped.wait()

        async def received(_: Command) -> None:
            emit("received", bytes=Received.size)

        emit("ready")
        handlers: dict[str, Handler] = {
            "visit": lambda command: visits(command, nodes),
            "pour": lambda command: pour(command, nodes[0]),
            "drain": lambda command: drain(command, nodes[-1]),
            "received": received,
        }
        await serve_commands(handlers)


if __name__ == "__main__":
    asyncio.run(main())
