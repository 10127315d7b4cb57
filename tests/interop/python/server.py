"""A HyperDHT server: the Python twin of `node/server.js`, with the same configuration, jobs, events and commands.

Beyond it: `relay` in the configuration is the key of a blind relay to name to clients.
"""

import asyncio
import hashlib
import itertools
from collections.abc import Awaitable, Callable

from interop.python.control import (
    Command,
    body,
    config,
    describe,
    emit,
    resident_bytes,
    serve_commands,
)
from interop.python.nodes import key_pair_of, new_node, relay_through

from p2pclaude.hyperdht import Connection, HyperDHT

Job = Callable[[Connection, bytes, int], Awaitable[int]]


async def echo(connection: Connection, data: bytes, _: int) -> int:
    """Send everything back, and the end for the end."""
    count = len(data)
    await connection.write(data)
    while data := await connection.read():
        count += len(data)
        await connection.write(data)
    await connection.write_eof()
    return count


async def sink(connection: Connection, data: bytes, _: int) -> int:
    """Read everything; answer with its SHA-256 in hex."""
    count, digest = len(data), hashlib.sha256(data)
    while data := await connection.read():
        count += len(data)
        digest.update(data)
    await connection.write(digest.hexdigest().encode())
    await connection.write_eof()
    return count


async def source(connection: Connection, _: bytes, total: int) -> int:
    """Send `total` bytes of the body, then the end."""
    for block in body(total):
        await connection.write(block)
    await connection.write_eof()
    while await connection.read():
        pass
    return 0


async def stay(connection: Connection, data: bytes, _: int) -> int:
    """Say that the connection stands, and hold it until the client ends it."""
    await connection.write(b"\n")
    while await connection.read():
        pass
    await connection.write_eof()
    return len(data)


JOBS: dict[str, Job] = {"echo": echo, "sink": sink, "source": source, "stay": stay}
connections: dict[int, Connection] = {}
numbers = itertools.count(1)


async def on_connection(connection: Connection) -> None:
    """Serve one connection from its first line to its end."""
    number = next(numbers)
    connections[number] = connection
    key, address = connection.remote_public_key.hex(), connection.remote_address
    emit("connection", id=number, remoteKey=key, remoteAddress=address, how=connection.how)
    count, error, head = 0, None, b""
    try:
        while b"\n" not in head:
            data = await connection.read()
            if not data:
                break
            head += data
        line, newline, rest = head.partition(b"\n")
        if newline:
            name, *number_of_bytes = line.decode().split(" ")
            count = await JOBS[name](connection, rest, int(number_of_bytes[0]) if number_of_bytes else 0)
        await connection.close()
    except Exception as caught:
        error = describe(caught)
    del connections[number]
    emit("closed", id=number, bytes=count, error=error, opened=b"\n" in head)


async def main() -> None:
    """Listen, report, obey."""
    host = config.get("host", "127.0.0.1")
    private = config.get("private")
    node = HyperDHT.bootstrapper(private, host, bind=host) if private else new_node()
    async with node as dht:
        server = dht.create_server(
            on_connection, allow=lambda *_: not config.get("deny"), relay_through=relay_through()
        )
        await server.listen(key_pair_of(config.get("seed")))

        async def refresh(_: Command) -> None:
            server.refresh()

        async def suspend(_: Command) -> None:
            await dht.suspend()
            emit("suspend")

        async def resume(_: Command) -> None:
            await dht.resume()
            emit("resume")

        async def close(_: Command) -> None:
            await server.close()
            emit("listening-ended")

        async def abort(command: Command) -> None:
            connections[command["id"]].abort()

        async def stats(_: Command) -> None:
            emit("stats", open=len(connections), rss=resident_bytes())

        emit("ready", publicKey=server.public_key.hex(), port=dht.port)
        handlers = {"refresh": refresh, "suspend": suspend, "resume": resume, "close": close, "abort": abort}
        await serve_commands({**handlers, "stats": stats})


if __name__ == "__main__":
    asyncio.run(main())
