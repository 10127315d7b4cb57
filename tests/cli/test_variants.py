"""The commands before daemons that behave otherwise than ours: the TypeScript one, a stranger, one that vanishes."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli.harness import Shell, eventually
from kit.fake_daemon import DATA_KEY, FakeDaemon, FakeSession
from kit.free_ports import free_port

from p2pclaude.hyperdht import HyperDHT, KeyPair
from p2pclaude.protocol.pairing import Pairing, format_url


@contextmanager
def serving(daemon: FakeDaemon, work: Path) -> Iterator[tuple[Shell, Callable[[Callable[[], object]], None]]]:
    """Serve a stand-in over HyperDHT in a thread; yields a shell before it and a way to call into the thread."""
    started = threading.Event()
    control: list[Any] = []

    async def main() -> None:
        port, key_pair = free_port(), KeyPair.generate()
        async with HyperDHT.bootstrapper(port, "127.0.0.1") as dht:
            server = dht.create_server(daemon.serve)
            await server.listen(key_pair)
            ended = asyncio.Event()
            url = format_url(Pairing(key_pair.public_key, DATA_KEY, {"bootstrap": [f"127.0.0.1:{port}"]}))
            control.extend([asyncio.get_running_loop(), ended, url])
            started.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert started.wait(50)
        loop, _, url = control
        yield Shell(work, url), loop.call_soon_threadsafe
    finally:
        control[0].call_soon_threadsafe(control[1].set)
        thread.join(20)


def test_a_typescript_daemon(tmp_path: Path) -> None:
    with serving(FakeDaemon(old=True), tmp_path) as (shell, _):
        assert len(shell.succeed("ping", "@")) == 1
        err = shell.fail(65, "send", "@", "hi")
        assert "hint: name a directory with -C" in err
        [session] = shell.succeed("send", "-C", "/srv", "@", "one")
        lines = shell.succeed("tail", "@", session)
        assert len(lines) == 2
        assert shell.succeed("tail", "-n", "1", "@", session) == lines[1:]
        assert shell.succeed("send", "-w", "-s", session, "@", "two") == ["echo: two"]
        assert shell.succeed("send", "-w", "-C", "/srv", "@", "three") == ["echo: three"]
        chat = shell.run("send", "--lines", "-C", "/srv", "@", text="four\nfive\n")
        assert chat.lines() == ["echo: four", "echo: five"]
        assert shell.succeed("ls", "@")[0] == f"{session}\t-\t7\t2023-11-14T22:13:20Z\t-"
        assert "no such session" in shell.fail(66, "tail", "-f", "@", "nope")
        assert shell.succeed("stop", "@", session) == [session]
        assert "no such session" in shell.fail(66, "stop", "@", session)


def test_a_daemon_that_cannot_ask(tmp_path: Path) -> None:
    with serving(FakeDaemon(old=True), tmp_path) as (shell, _):
        result = shell.run("send", "--ask", "-C", "/srv", "@", "hi")
        assert (result.status, len(result.lines())) == (0, 1)
        hint = "this daemon cannot ask, the session does without what needs permission"
        assert result.err == f"p2pclaude-send: hint: {hint}\n"


def test_more_requests_than_fit_the_answer(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    daemon.pending = [{"sessionId": "s", "requestId": "r", "toolName": "Bash", "input": {}}]
    daemon.omitted = 2
    with serving(daemon, tmp_path) as (shell, _):
        result = shell.run("approve", "@")
        assert (result.status, len(result.lines())) == (0, 1)
        assert "hint: 2 more requests wait" in result.err


def test_control_characters_stay_out_of_the_list(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    daemon.sessions["s"] = FakeSession()
    with serving(daemon, tmp_path) as (shell, _):
        assert shell.succeed("ls", "@") == ["s\tidle\t7\t2023-11-14T22:13:20Z\t/srv/ab[31m"]


@pytest.mark.parametrize("session", ["\x1b[2J\x1b[31m", "one\ntwo", "one two", "--filter=reboot", "\x9b2J", ""])
def test_an_id_that_is_none_is_not_printed(tmp_path: Path, session: str) -> None:
    """It goes to a terminal, or to a script that hands it to the next command as an argument."""

    class Liar(FakeDaemon):
        async def _spawn_session(self, params: dict[str, Any]) -> object:
            return {"type": "success", "sessionId": session, "pid": 7, "accepted": True, "seq": 1}

    with serving(Liar(), tmp_path) as (shell, _):
        shell.fail(76, "send", "@", "hi")


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b'{"id":"1","ok":false,"error":"Unknown method"}\n'])
def test_something_else_answers(tmp_path: Path, answer: bytes) -> None:
    daemon = FakeDaemon()
    daemon.raw_answer = answer
    with serving(daemon, tmp_path) as (shell, _):
        for words in (["ping", "@"], ["send", "@", "x"], ["tail", "-f", "@", "s"], ["ls", "@"], ["stop", "@", "s"]):
            shell.fail(76, *words)


def test_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    daemon.mute = True
    with serving(daemon, tmp_path) as (shell, _):
        assert "no answer" in fail_in_time(shell, "no answer", "ping", "@")
        hint = "hint: the message may have arrived all the same"
        assert hint in fail_in_time(shell, hint, "send", "@", "x")


def fail_in_time(shell: Shell, wanted: str, tool: str, *arguments: str) -> str:
    """Run a tool that must time out, with more time if it has not come as far as is wanted; return what it said."""
    for seconds in ("1", "4", "16"):
        err = shell.fail(75, tool, "-t", seconds, *arguments)
        if wanted in err:
            break
    return err


def test_a_daemon_that_vanishes_in_mid_call(tmp_path: Path) -> None:
    daemon = FakeDaemon()

    async def cut(method: str, params: dict[str, Any]) -> None:
        daemon.cut()

    daemon.before_answer = cut
    with serving(daemon, tmp_path) as (shell, _):
        assert "connection to the daemon was lost" in shell.fail(75, "ls", "@")
        assert "may have arrived" in shell.fail(75, "send", "@", "x")


def test_waiting_outlives_a_lost_connection(tmp_path: Path) -> None:
    daemon = FakeDaemon()
    with serving(daemon, tmp_path) as (shell, call):
        waiting = shell.start("send", "-w", "-v", "@", "SILENT")
        eventually(lambda: any(method == "get-output" for method, _ in daemon.requests))
        [session] = daemon.sessions
        call(daemon.cut)
        result = {"type": "result", "subtype": "success", "is_error": False, "result": "late"}
        call(lambda: asyncio.ensure_future(daemon.print(session, result)))
        out, err = waiting.communicate(timeout=60)
        assert (waiting.returncode, out) == (0, b"late\n")
        assert b"trying again in 1 s" in err
        assert [method for method, _ in daemon.requests].count("spawn-session") == 1


def test_a_filter_outlives_a_claude_that_has_ended_and_an_answer_that_is_too_long(tmp_path: Path) -> None:
    """Neither is the other sessions' business."""
    daemon = FakeDaemon()
    answer = daemon._answer_permission

    async def answer_once(params: dict[str, Any]) -> object:
        ended = params["requestId"] == "first"
        return {"success": False, "error": "claude has ended"} if ended else await answer(params)

    daemon._answer_permission = answer_once  # type: ignore[method-assign]
    names = ("first", "second", "third")
    daemon.pending = [{"sessionId": name, "requestId": name, "toolName": "Bash", "input": {}} for name in names]
    long = "head -c 4000000 /dev/zero | tr '\\0' '\\1'; exit 1"
    script = f"case $P2P_CLAUDE_REQUEST_ID in second) {long};; third) sleep 1;; esac"
    with serving(daemon, tmp_path) as (shell, _):
        result = shell.run("approve", "--filter", script, "@")
    assert [json.loads(line)["requestId"] for line in result.lines()] == ["third"]
    error = "the request is longer than 8 MiB, request second is left to others"
    assert (result.status, result.err) == (0, f"p2pclaude-approve: error: {error}\n")
