"""Strangers in one process that speaks JSON lines: config {bootstrap, key, host}.

They know a daemon's public key and nothing else. Events: ready. Commands: push {kind, connections, bytes} -> pushed
{sent, connects, refused, held}: as many connections at once, each made anew when it is broken off, push until `bytes`
are gone together, or each was refused GIVE_UP times in a row; `held` are the connections that the daemon still held
when it was over. KINDS says what they push.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Final
from weakref import WeakKeyDictionary

from interop.python.control import Command, config, emit, serve_commands

from p2pclaude.hyperdht import Connection, HyperDHT, HyperDHTError, KeyPair
from p2pclaude.hyperdht.errors import ConnectionClosed
from p2pclaude.protocol.wire import seal

BLOCK: Final = b"x" * (1 << 16)
FRAME: Final = b"x" * (8 << 20)  # the largest that the daemon takes
CRUMBS: Final = 500
WAIT_SECONDS: Final = 0.1
UNFINISHED: Final[WeakKeyDictionary[Connection, Iterator[bytes]]] = WeakKeyDictionary()
CONNECT_SECONDS: Final = 10.0
WRITE_SECONDS: Final = 30.0
GIVE_UP: Final = 3
PATIENCE_SECONDS: Final = 20.0  # more than a stranger has to prove the key


async def endless(connection: Connection) -> int:
    """Push a line that never ends."""
    await connection.write(BLOCK)
    return len(BLOCK)


async def lines(connection: Connection) -> int:
    """Push whole lines that are no requests."""
    block = (b"x" * 8191 + b"\n") * 8
    await connection.write(block)
    return len(block)


async def sealed(connection: Connection) -> int:
    """Push requests that are sealed under another key."""
    params = seal(bytes(32), {"text": "x" * (1 << 20)})
    line = json.dumps({"id": "1", "method": "send-message", "params": params}).encode() + b"\n"
    await connection.write(line)
    return len(line)


async def frames(connection: Connection) -> int:
    """Push an encrypted frame that is all but complete, a piece at a time; then there is nothing but to wait."""
    if connection not in UNFINISHED:
        frame = connection._secret.encrypt_frame(FRAME)  # type: ignore[union-attr]
        UNFINISHED[connection] = iter([frame[start : start + (1 << 16)] for start in range(0, len(FRAME), 1 << 16)])
    piece = next(UNFINISHED[connection], b"")
    if not piece:
        await asyncio.sleep(WAIT_SECONDS)
    else:
        connection._write_raw(piece)
    await connection._drain()
    return len(piece)


async def crumbs(connection: Connection) -> int:
    """Push a line that never ends in frames of two bytes."""
    for _ in range(CRUMBS):
        connection.send_frame(b"xx")
    await connection._drain()
    return CRUMBS * 22


KINDS: Final[dict[str, Callable[[Connection], "asyncio.Future[int] | object"]]] = {
    one.__name__: one for one in (endless, lines, sealed, frames, crumbs)
}


class Pushing:
    """What has been done so far."""

    def __init__(self, total: int) -> None:
        self.left = total
        self.sent = 0
        self.connects = 0
        self.refused = 0
        self.held = 0


async def push_one(dht: HyperDHT, kind: str, state: Pushing) -> bool:
    """Push over one connection until it is broken off or enough is sent, then see whether the daemon lets it go.

    Return whether there was a connection.
    """
    key = bytes.fromhex(config["key"])
    try:
        connection = await dht.connect(key, key_pair=KeyPair.generate(), timeout=CONNECT_SECONDS)
    except HyperDHTError:
        state.refused += 1
        await asyncio.sleep(0.2)
        return False
    state.connects += 1
    reader = asyncio.create_task(until_closed(connection))
    try:
        while state.left > 0:
            async with asyncio.timeout(WRITE_SECONDS):
                sent = await KINDS[kind](connection)  # type: ignore[misc]
            state.sent += sent
            state.left -= sent
        async with asyncio.timeout(PATIENCE_SECONDS):
            await reader
    except ConnectionClosed:
        pass
    except TimeoutError:
        state.held += not connection.closed
    finally:
        reader.cancel()
        connection.abort()
    return True


async def until_closed(connection: Connection) -> None:
    """Read what the daemon says until it ends the connection."""
    try:
        while await connection.read():
            pass
    except ConnectionClosed:
        pass


async def main() -> None:
    """Start a node, then obey."""
    async with HyperDHT(bootstrap=config["bootstrap"], host=config["host"]) as dht:
        await dht.bootstrapped.wait()

        async def push(command: Command) -> None:
            state = Pushing(command["bytes"])

            async def work() -> None:
                refused = 0
                while state.left > 0 and refused < GIVE_UP:
                    refused = 0 if await push_one(dht, command["kind"], state) else refused + 1

            await asyncio.gather(*(work() for _ in range(command["connections"])))
            emit("pushed", sent=state.sent, connects=state.connects, refused=state.refused, held=state.held)

        emit("ready")
        await serve_commands({"push": push})


if __name__ == "__main__":
    asyncio.run(main())
