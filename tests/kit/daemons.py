"""What tests of the daemon as a process share: starting one in a private network, calling it, counting what is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from pathlib import Path

from kit.free_ports import free_port
from kit.sessions import Place
from p2pclaude.client.rpc_client import Client, open_client
from p2pclaude.host import processes
from p2pclaude.host.processes import Mark, Process
from p2pclaude.protocol.pairing import Pairing, parse_url

PROGRAM = """
import asyncio, json, os, sys
from p2pclaude.daemon.daemon import DaemonOptions, run_daemon
status = asyncio.run(run_daemon(DaemonOptions(**json.loads(sys.argv[1]))))
os._exit(status)  # each line of the log is flushed; a last flush fails where nobody reads it
"""


def start(place: Place, *, environ: dict[str, str] | None = None, **more: object) -> "subprocess.Popen[str]":
    """Start a daemon in a private network and wait until it serves."""
    options = {"private": True, "host": "127.0.0.1", "port": free_port(), "data_dir": str(place.path / "data")}
    options |= {"claude": str(place.claude), "root_dir": str(place.root), **more}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, **(environ or {})},
    )
    assert process.stdout is not None
    lines = []
    while line := process.stdout.readline():
        lines.append(line)
        if '"daemon-started"' in line:
            return process
    raise AssertionError("".join(lines) + process.communicate(timeout=30)[1])


@contextmanager
def daemon(place: Place, *, environ: dict[str, str] | None = None, **more: object) -> Iterator["subprocess.Popen[str]"]:
    """Run a daemon; what it left is ended too."""
    process = start(place, environ=environ, **more)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        for left in marked(place):
            with suppress(ProcessLookupError):  # a claude may end by itself once its daemon is gone
                os.kill(left.pid, signal.SIGKILL)


def pairing_of(place: Place) -> Pairing:
    """Give the pairing of the place's daemon."""
    return parse_url((place.path / "data" / "pairing.url").read_text())


@contextmanager
def timed(seconds: float) -> Iterator[None]:
    """Fail if something takes longer."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def client_of(place: Place) -> AbstractAsyncContextManager[Client]:
    """Give a client of the place's daemon."""
    pairing = pairing_of(place)
    return open_client(pairing, bootstrap=pairing.bootstrap)


def marked(place: Place) -> list[Process]:
    """Give every process that carries the mark of the place's sessions."""
    mark = Mark.of_sessions(place.path / "data" / "sessions")
    return processes.marked(mark)
