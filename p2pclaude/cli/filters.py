"""A command that decides on permission requests: how it is run, and what its end means.

The request is JSON on its stdin. Whatever goes wrong with it leaves the request to others; nothing but exit status 0
ever allows.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from asyncio import FIRST_COMPLETED
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2pclaude.cli.common import printable
from p2pclaude.errors import WireError
from p2pclaude.protocol.wire import dump_json, load_json

MAX_OUTPUT_BYTES = 4 << 20
"""What a filter may print; one that prints more is ended."""
KILL_SECONDS = 1.0
"""Time between SIGTERM and SIGKILL for a filter that is no longer wanted."""
LINGER_SECONDS = 1.0
"""How long output is still read after a filter's end, if something that it started keeps its stdout open."""

ALLOWED, DENIED, LEFT = 0, 1, 75


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a filter says: an answer in the form of `answer-permission`; None leaves the request to others.

    `complaint` says why, if the filter did not say so itself.
    """

    answer: Mapping[str, Any] | None
    complaint: str | None = None


async def run_filter(command: str, request: Mapping[str, Any], timeout: float) -> Verdict:
    """Run a shell command on a request, for at most so many seconds; cancelled, the command is ended too."""
    reader, read_end, write_end = asyncio.StreamReader(), *os.pipe()
    pipe = os.fdopen(read_end, "rb", 0)
    try:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
    except BaseException:
        pipe.close()
        os.close(write_end)
        raise
    try:
        process = await _start(command, request, write_end)
    except OSError as error:
        return Verdict(None, f"could not be started: {(error.strerror or str(error)).lower()}")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may hold
        return Verdict(None, "could not be started: the request holds what is no text")
    else:
        return await _attend(process, reader, timeout)
    finally:
        transport.close()


async def _start(command: str, request: Mapping[str, Any], stdout: int) -> asyncio.subprocess.Process:
    # A file, not a pipe: the command may read all of it or nothing. A session of its own: what it starts ends with it.
    try:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(dump_json(request) + b"\n")
            stdin.seek(0)
            return await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", command, stdin=stdin, stdout=stdout, env=environment(request), start_new_session=True
            )
    finally:
        os.close(stdout)


async def _attend(process: asyncio.subprocess.Process, reader: asyncio.StreamReader, timeout: float) -> Verdict:
    output = bytearray()
    reading = asyncio.create_task(_read(reader, output))
    waiting = asyncio.create_task(process.wait())
    try:
        async with asyncio.timeout(timeout):
            while not waiting.done() and len(output) <= MAX_OUTPUT_BYTES:
                await asyncio.wait({waiting} if reading.done() else {reading, waiting}, return_when=FIRST_COMPLETED)
        await asyncio.wait({reading}, timeout=LINGER_SECONDS)
        if len(output) > MAX_OUTPUT_BYTES:
            return Verdict(None, f"printed more than {MAX_OUTPUT_BYTES >> 20} MiB")
        return judge(waiting.result(), bytes(output))
    except TimeoutError:
        return Verdict(None, f"was not done within {timeout:g} s")
    finally:
        reading.cancel()
        if not waiting.done():
            await _end(process, waiting)


async def _read(reader: asyncio.StreamReader, output: bytearray) -> None:
    """Read to the end, or until it is too much."""
    while len(output) <= MAX_OUTPUT_BYTES and (part := await reader.read(1 << 16)):
        output += part


async def _end(process: asyncio.subprocess.Process, waiting: asyncio.Task[int]) -> None:
    """End a filter and, when it has had the time for it, what it started and left."""
    try:
        _signal(process, signal.SIGTERM)
        await asyncio.wait({waiting}, timeout=KILL_SECONDS)
    finally:  # also when this is cancelled once more: then there is no more time for it
        _signal(process, signal.SIGKILL)
        await asyncio.wait({waiting}, timeout=KILL_SECONDS)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def judge(status: int, output: bytes) -> Verdict:
    """Say what a filter's exit status and output mean."""
    text = output.decode("utf-8", "replace").strip()
    if status == LEFT:
        return Verdict(None)
    if status == DENIED:
        return Verdict({"behavior": "deny", **({"message": text} if text else {})})
    if status != ALLOWED:
        return Verdict(None, f"was ended by signal {-status}" if status < 0 else f"exited with status {status}")
    if not text:
        return Verdict({"behavior": "allow"})
    try:
        changed = load_json(output)
    except WireError:
        changed = None
    if not isinstance(changed, dict):
        return Verdict(None, "printed something else than a JSON object for the tool's input")
    return Verdict({"behavior": "allow", "updatedInput": changed})


def environment(request: Mapping[str, Any]) -> dict[str, str]:
    """Give a filter's environment: ours, and what a simple one needs to know without reading JSON."""
    names = {
        "P2P_CLAUDE_SESSION_ID": "sessionId",
        "P2P_CLAUDE_REQUEST_ID": "requestId",
        "P2P_CLAUDE_TOOL": "toolName",
        "P2P_CLAUDE_DIRECTORY": "directory",
    }
    ours = {variable: printable(str(request.get(name, ""))) for variable, name in names.items()}
    return {**os.environ, **ours}
