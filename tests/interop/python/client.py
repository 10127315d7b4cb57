"""A HyperDHT client: the Python twin of `node/client.js`, with the same configuration, commands and events.

Beyond it: `relay` in the configuration is the key of a blind relay, and a result has `how` the server was reached.
A connect takes `connectTimeout` milliseconds at most.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from interop.python.control import Command, Handler, body, describe, digest_of, emit, resident_bytes, serve_commands
from interop.python.nodes import new_node, relay_through

from p2pclaude.hyperdht import Connection, ConnectionClosed, HyperDHT

Result = dict[str, Any]
Job = Callable[[Connection, int], Awaitable[Result]]


async def receive(connection: Connection) -> tuple[int, str, str]:
    """Read to the end; return the number of bytes, their SHA-256 in hex, and how they begin."""
    digest, count, text = hashlib.sha256(), 0, b""
    while data := await connection.read():
        digest.update(data)
        count += len(data)
        text = (text + data[:128])[:128]
    return count, digest.hexdigest(), text.decode("latin-1")


async def send(connection: Connection, line: str, total: int) -> None:
    """Send the first line, the body and the end."""
    await connection.write(line.encode() + b"\n")
    for block in body(total):
        await connection.write(block)
    await connection.write_eof()


async def echo(connection: Connection, total: int) -> Result:
    """Send the body and read it back at the same time."""
    (count, digest, _), _ = await asyncio.gather(receive(connection), send(connection, "echo", total))
    at, sent = time.perf_counter(), digest_of(total)
    return {"ok": digest == sent, "bytes": count, "sha256": digest, "sent": sent, "at": at}


async def sink(connection: Connection, total: int) -> Result:
    """Send the body and compare the digest that comes back."""
    await send(connection, "sink", total)
    _, _, text = await receive(connection)
    at, sent = time.perf_counter(), digest_of(total)
    return {"ok": text == sent, "bytes": total, "sha256": text, "sent": sent, "at": at}


async def source(connection: Connection, total: int) -> Result:
    """Read the body that the server sends."""
    await connection.write(f"source {total}\n".encode())
    count, digest, _ = await receive(connection)
    at = time.perf_counter()
    await connection.write_eof()
    sent = digest_of(total)
    return {"ok": digest == sent, "bytes": count, "sha256": digest, "sent": sent, "at": at}


async def stay(connection: Connection, _: int) -> Result:
    """Stand until the other side ends or loses the connection."""
    await connection.write(b"stay\n")
    if not await connection.read():
        raise ConnectionClosed("closed before the end")
    emit("staying")
    try:
        await connection.read()
    except ConnectionClosed as error:
        emit("lost", error=describe(error))
    return {"ok": True}


JOBS: dict[str, Job] = {"echo": echo, "sink": sink, "source": source, "stay": stay}


async def exchange(number: int, command: Command, dht: HyperDHT) -> Result:
    """Connect once, run the job, and say how it went."""
    result: Result = {"i": number, "ok": False, "opened": False, "bytes": 0}
    job = JOBS[command.get("job", "echo")]
    started = time.perf_counter()
    try:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(asyncio.timeout(command.get("timeout", 30000) / 1000))
            node = await stack.enter_async_context(new_node()) if command.get("fresh") else dht
            limit = command.get("connectTimeout", 20000) / 1000
            connecting = node.connect(bytes.fromhex(command["key"]), relay_through=relay_through(), timeout=limit)
            connection = await stack.enter_async_context(await connecting)
            result.update(opened=True, openMs=(time.perf_counter() - started) * 1000, how=connection.how)
            result.update(await job(connection, command.get("bytes", 64)))
    except Exception as error:
        result.update(ok=False, error=describe(error))
    if "at" in result:
        result["bodyMs"] = (result.pop("at") - started) * 1000 - result["openMs"]
    result["totalMs"] = (time.perf_counter() - started) * 1000
    return result


async def connect(command: Command, dht: HyperDHT) -> None:
    """Run `count` exchanges, `parallel` at a time."""
    waiting = iter(range(command.get("count", 1)))

    async def work() -> None:
        for number in waiting:
            emit("result", **await exchange(number, command, dht))

    await asyncio.gather(*(work() for _ in range(command.get("parallel", 1))))
    emit("done")


async def ping(command: Command, dht: HyperDHT) -> None:
    """Measure echo round trips on one connection, in milliseconds."""
    size, ms = command.get("bytes", 64), []
    async with await dht.connect(bytes.fromhex(command["key"])) as connection:
        await connection.write(b"echo\n")
        for _ in range(command.get("count", 100)):
            started = time.perf_counter()
            await connection.write(b"x" * size)
            left = size
            while left > 0:
                left -= len(await connection.read(left))
            ms.append((time.perf_counter() - started) * 1000)
    emit("pings", ms=ms)


async def main() -> None:
    """Start a node, then obey."""
    async with new_node() as dht:
        await dht.bootstrapped.wait()
        emit("ready")

        async def stats(_: Command) -> None:
            emit("stats", rss=resident_bytes())

        handlers: dict[str, Handler] = {
            "connect": lambda command: connect(command, dht),
            "ping": lambda command: ping(command, dht),
            "stats": stats,
        }
        await serve_commands(handlers)


if __name__ == "__main__":
    asyncio.run(main())
