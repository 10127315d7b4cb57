"""Standard input, whatever it is: all of it, or its lines for a coroutine.

It may have been made non-blocking by a program that shares it, as `ssh` and Node do: nothing there yet is no end of it.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import AsyncIterator

from p2pclaude.cli.common import wait_for

_CHUNK = 1 << 16


def read_all(max_bytes: int) -> bytes:
    """Read to the end, or until it is more than so many bytes, which are for the caller to refuse. Raises OSError."""
    data = bytearray()
    while len(data) <= max_bytes and (chunk := _read_some()):
        data += chunk
    return bytes(data[: max_bytes + 1])


def _read_some() -> bytes:
    """Wait for some bytes of standard input; none are its end."""
    while True:
        try:
            return os.read(0, _CHUNK)
        except BlockingIOError:
            wait_for(0, select.POLLIN)


async def read_lines(max_bytes: int) -> AsyncIterator[bytes]:
    """Yield each line without its newline, as soon as it is complete, the last one even without a newline.

    A line is cut off after `max_bytes` + 1 bytes, for the caller to refuse it. Reading runs ahead by one chunk only.
    The thread that reads is a daemon and holds no lock of `sys.stdin`, so that a tool ends while it waits for a
    terminal. Raises OSError when standard input cannot be read: that is no end of it.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue()
    wanted = threading.Semaphore(1)
    threading.Thread(target=_read, args=(loop, chunks, wanted), daemon=True).start()
    pending = b""
    while chunk := await chunks.get():
        if isinstance(chunk, OSError):
            raise chunk
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield line[: max_bytes + 1]
        if len(pending) > max_bytes:
            yield pending[: max_bytes + 1]
            return
        wanted.release()
    if pending:
        yield pending


def _read(loop: asyncio.AbstractEventLoop, chunks: asyncio.Queue[bytes | OSError], wanted: threading.Semaphore) -> None:
    """Put a chunk for each one wanted, and an empty one or an error at the end."""
    chunk: bytes | OSError = b"?"
    while isinstance(chunk, bytes) and chunk:
        wanted.acquire()
        try:
            chunk = _read_some()
        except OSError as error:
            chunk = error
        try:
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)
        except RuntimeError:
            return  # the loop is closed: nobody listens any more
