"""What every Python peer shares, as `node/control.js` does for Node: configuration in, events out, commands in."""

import asyncio
import hashlib
import json
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

Command = dict[str, Any]
Handler = Callable[[Command], Awaitable[None]]

config: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}

BLOCK_BYTES = 65536
BLOCK = hashlib.shake_256(b"p2pclaude").digest(BLOCK_BYTES)


def emit(event: str, **fields: Any) -> None:
    """Print one event."""
    print(json.dumps({"event": event, **fields}), flush=True)


def describe(error: BaseException) -> dict[str, str]:
    """Give an error the shape of the Node peers' ones."""
    return {"code": type(error).__name__, "message": str(error)}


def body(total: int) -> Iterator[bytes]:
    """Yield the deterministic body of `total` bytes: numbered blocks, the same as the Node peers make."""
    for index in range((total + BLOCK_BYTES - 1) // BLOCK_BYTES):
        block = index.to_bytes(8, "little") + BLOCK[8:]
        yield block[: total - index * BLOCK_BYTES]


def digest_of(total: int) -> str:
    """Return the SHA-256 of the body in hex."""
    digest = hashlib.sha256()
    for block in body(total):
        digest.update(block)
    return digest.hexdigest()


def resident_bytes() -> int:
    """Return this process's resident memory, in bytes."""
    with open("/proc/self/statm") as statm:  # noqa: PTH123 (one line of a pseudo file)
        return int(statm.read().split()[1]) * 4096


async def serve_commands(handlers: Mapping[str, Handler]) -> None:
    """Run commands from stdin, each in a task of its own, until stdin ends or a signal comes."""
    loop = asyncio.get_running_loop()
    leaving = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leaving.set)
    lines = asyncio.StreamReader(limit=1 << 20)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running: set[asyncio.Task[Any]] = set()
    ends = [asyncio.create_task(_read(lines, handlers, running)), asyncio.create_task(leaving.wait())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for task in (*ends, *running):
        task.cancel()
    await asyncio.gather(*ends, *running, return_exceptions=True)
    transport.close()


async def _read(lines: asyncio.StreamReader, handlers: Mapping[str, Handler], running: set[asyncio.Task[Any]]) -> None:
    while line := await lines.readline():
        command = json.loads(line)
        task = asyncio.create_task(_run(handlers[command["cmd"]], command))
        running.add(task)
        task.add_done_callback(running.discard)


async def _run(handler: Handler, command: Command) -> None:
    try:
        await handler(command)
    except Exception as error:
        traceback.print_exc()
        emit("failed", tag=command.get("tag"), error=describe(error))
