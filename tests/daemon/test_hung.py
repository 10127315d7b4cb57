"""What hangs, a disk or a name server, holds up nobody else, and keeps no command from ending in its time."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.harness import environment
from kit.free_ports import free_port
from kit.sessions import prepare, run, wait_for_state

from p2pclaude.daemon.daemon import SHUTDOWN_SECONDS
from p2pclaude.errors import TryAgain
from p2pclaude.hyperdht import KeyPair
from p2pclaude.protocol.pairing import Pairing, format_url
from p2pclaude.sessions import launcher
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State

HANG = """
import os, socket, sys, time

def hang(*args, **kwargs):
    os.write(2, b"it hangs\\n")
    time.sleep(100)

socket.getaddrinfo = hang
"""
URL = format_url(Pairing(KeyPair.generate().public_key, b"d" * 32, {}))
START = "\nfrom p2pclaude.cli.{tool} import main\nsys.argv[0] = 'p2pclaude-{tool}'\nsys.exit(main())"


def start(work: Path, tool: str, *arguments: str, before: str = "") -> "subprocess.Popen[bytes]":
    """Start a tool in whose world things hang."""
    environ = {**environment(work / "home"), "PYTHONWARNINGS": ""}
    code = HANG + before + START.format(tool=tool)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=work, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until_it_hangs(process: "subprocess.Popen[bytes]") -> None:
    """Read what a tool says until something hangs."""
    assert process.stderr is not None
    while line := process.stderr.readline():
        if line == b"it hangs\n":
            return
    raise AssertionError(f"it ended with {process.wait()}, and nothing hung")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_tool_does_not_wait_for_names_after_its_end(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "ping", "--bootstrap", "nowhere.example:1", URL)
    try:
        wait_until_it_hangs(process)
        process.send_signal(number)
        assert process.wait(30) == -number
    finally:
        process.kill()
        process.communicate()


def test_a_tool_does_not_wait_for_names_longer_than_it_shall(tmp_path: Path) -> None:
    process = start(tmp_path, "ls", "-t", "1", "--bootstrap", "nowhere.example:1", URL)
    try:
        assert process.wait(30) in (69, 75)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("tool", ["daemon", "node"])
def test_a_daemon_ends_while_a_name_is_looked_up(tmp_path: Path, tool: str) -> None:
    options = ["--bootstrap", "nowhere.example:1", "--host", "127.0.0.1", "--port", str(free_port())]
    process = start(tmp_path, tool, *options)
    try:
        wait_until_it_hangs(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SHUTDOWN_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


MANY = """
import asyncio, p2pclaude.daemon.presence as presence

class Presence(presence.Presence):
    async def run(self):
        for _ in range(100):
            asyncio.get_running_loop().run_in_executor(None, hang)
        await super().run()

presence.Presence = Presence
"""


def test_a_daemon_ends_with_a_disk_that_hangs(tmp_path: Path) -> None:
    """All threads are taken: the processes of sessions are looked for all the same, and nothing is waited for."""
    process = start(tmp_path, "daemon", "--private", "--host", "127.0.0.1", "--port", str(free_port()), before=MANY)
    try:
        assert process.stdout is not None
        while b"daemon-started" not in process.stdout.readline():
            pass
        wait_until_it_hangs(process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(SHUTDOWN_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_directory_that_hangs_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """As one on another machine that is gone: who asks for it is told so, and others are served meanwhile."""
    place = prepare(tmp_path, monkeypatch)
    gone, looks, answers = place.root / "gone", [0], threading.Event()
    gone.mkdir()
    answers.set()

    def hanging(look: Callable[..., Any]) -> Callable[..., Any]:
        def answer(path: object, *rest: object) -> Any:
            if str(path) == str(gone) and not answers.is_set():
                looks[0] += 1
                answers.wait(30)
            return look(path, *rest)

        return answer

    monkeypatch.setattr(os, "access", hanging(os.access))
    monkeypatch.setattr(os.path, "realpath", hanging(os.path.realpath))
    new = Spawn(session_id="there", directory=str(gone), text="hello")
    monkeypatch.setattr(launcher, "REACH_SECONDS", 30.0)

    async def main() -> None:
        async with place.table() as table:
            if resumed:
                await table.spawn(new)
                await wait_for_state(table, "there", State.IDLE)
                assert await table.find("there").sleep()
            answers.clear()
            monkeypatch.setattr(launcher, "REACH_SECONDS", 0.3)

            async def ask() -> None:
                if resumed:
                    await table.send("there", "hello")
                else:
                    await table.spawn(new)

            begin = time.monotonic()
            asked = [asyncio.create_task(ask()) for _ in range(5)]
            await asyncio.sleep(0.05)
            assert time.monotonic() - begin < 15  # of 30
            for task in asked:
                with pytest.raises(TryAgain, match="does not answer"):
                    await task
            assert looks == [1]
            answers.set()
            monkeypatch.setattr(launcher, "REACH_SECONDS", 30.0)
            await ask()
            await wait_for_state(table, "there", State.IDLE)

    try:
        run(main())
    finally:
        answers.set()
