"""The whole of it: our tools, six Node nodes between, our daemon, and the real `claude` before a stub of its API."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from interop.daemons import Daemon, start_daemon
from interop.harness import Peer, Peers, Tools, peers_on
from kit import stub_api

MEGABYTES = 3 << 20


@pytest.fixture(scope="module")
def claude_env() -> Iterator[dict[str, str]]:
    """Serve the stub of the Messages API and give the environment in which claude talks to it."""
    with stub_api.stub_api() as server:
        env = stub_api.environment(server.url, "", os.environ["PATH"])
        del env["HOME"]  # every daemon has its own
        yield env


@pytest.fixture(scope="module")
def daemon(
    testnet: Peer, claude: Path, claude_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """Run the daemon on the Node network."""
    with peers_on(testnet.ready["bootstrap"]) as group:
        yield start_daemon(group, tmp_path_factory.mktemp("daemon"), claude, env=claude_env)


@pytest.fixture
def url(daemon: Daemon) -> str:
    """Give the pairing URL, as the file that holds it."""
    return str(daemon.data / "pairing.url")


def objects(lines: list[str]) -> list[dict[str, Any]]:
    """Decode the lines that tail printed."""
    return [json.loads(line) for line in lines]


def results(lines: list[str]) -> list[str]:
    """Return the texts of the results in what tail printed."""
    return [one["result"].strip() for one in objects(lines) if one["type"] == "result"]


def until_results(follower: Peer, count: int) -> None:
    """Read on in a follower's output until it has printed so many results."""
    while len(results(follower.said)) < count:
        follower.line()


def test_send_then_follow_then_stop(tools: Tools, url: str) -> None:
    session = tools.succeed("send", url, text="hello there\n")
    with tools.start("tail", "-f", url, session) as follower:
        until_results(follower, 1)
        assert tools.succeed("send", "-s", session, url, "and again") == session
        until_results(follower, 2)
        assert results(follower.said) == ["echo: hello there", "echo: and again"]
        assert {"system", "assistant", "result"} <= {one["type"] for one in objects(follower.said)}
        assert tools.succeed("stop", url, session) == session
        assert follower.finish() == 0
        assert tools.succeed("tail", url, session).splitlines() == [line.rstrip("\n") for line in follower.said]


def test_send_waits(tools: Tools, url: str) -> None:
    assert tools.succeed("send", "-w", url, "one", "two").strip() == "echo: one two"
    failed = tools("send", "-w", url, "ERR:400")
    assert failed.status == 1, failed


def test_lines_make_a_chat(tools: Tools, url: str) -> None:
    chat = tools("send", "--lines", url, text="first\nsecond\nthird\n")
    assert chat.status == 0
    assert [line.strip() for line in chat.lines] == ["echo: first", "echo: second", "echo: third"]


def test_a_line_of_three_megabytes(tools: Tools, url: str) -> None:
    session = tools.succeed("send", url, f"BIG:{MEGABYTES}")
    answer = tools.succeed("send", "-w", "-s", session, url, "short").strip()
    assert answer == "echo: short"
    lines = tools.succeed("tail", url, session).splitlines()
    assert max(map(len, lines)) > MEGABYTES and results(lines)[0] == "z" * MEGABYTES


def test_two_sessions_at_once(tools: Tools, url: str, daemon: Daemon) -> None:
    def one(name: str) -> tuple[str, str]:
        directory = daemon.root / name
        directory.mkdir()
        session = tools.succeed("send", "-C", name, url, "SLOW:3")
        answer = tools.succeed("send", "-w", "-s", session, url, f"to {name}").strip()
        lines = tools.succeed("tail", url, session).splitlines()
        assert objects(lines)[0]["cwd"] == str(directory) and results(lines) == ["w0 w1 w2", f"echo: to {name}"]
        return session, answer

    with ThreadPoolExecutor(2) as pool:
        (first, a), (second, b) = pool.map(one, ("left", "right"))
    assert first != second and (a, b) == ("echo: to left", "echo: to right")
    rows = [line.split("\t") for line in tools.succeed("ls", url).splitlines()]
    assert {row[0]: row[4] for row in rows}[first].endswith("/left")


def test_three_readers_see_everything(tools: Tools, url: str) -> None:
    session = tools.succeed("send", url, "SLOW:2")
    followers = [tools.start("tail", "-f", url, session) for _ in range(3)]
    try:
        for text in ("one", "two"):
            tools.succeed("send", "-s", session, url, text)
        for follower in followers:
            until_results(follower, 3)
        tools.succeed("stop", url, session)
        assert [follower.finish() for follower in followers] == [0, 0, 0]
        assert followers[0].said == followers[1].said == followers[2].said
        assert results(followers[0].said) == ["w0 w1", "echo: one", "echo: two"]
    finally:
        for follower in followers:
            follower.close()


def test_tail_from_a_place(tools: Tools, url: str) -> None:
    session = tools.succeed("send", url, "hello")
    assert tools.succeed("send", "-w", "-s", session, url, "last").strip() == "echo: last"
    envelopes = objects(tools.succeed("tail", "--meta", url, session).splitlines())
    numbers = [one["seq"] for one in envelopes]
    assert numbers == list(range(1, len(numbers) + 1))
    middle = numbers[len(numbers) // 2]
    rest = objects(tools.succeed("tail", "--meta", "--after", str(middle), url, session).splitlines())
    assert [one["seq"] for one in rest] == numbers[middle:]
    assert results(tools.succeed("tail", "-n", "1", url, session).splitlines()) == ["echo: last"]
    assert "echo: last" in tools.succeed("tail", "--text", url, session)


def test_refusals(tools: Tools, url: str) -> None:
    assert tools("send", "-C", "/", url, "x").status == 77
    assert tools("send", "-s", "11111111-0000-4000-8000-00000000abcd", url, "x").status == 66
    assert tools("tail", url, "11111111-0000-4000-8000-00000000abcd").status == 66
    assert tools("stop", url, "11111111-0000-4000-8000-00000000abcd").status == 66


def test_the_record_in_the_dht(tools: Tools, url: str) -> None:
    session = tools.succeed("send", url, "hello")
    deadline = time.monotonic() + 50
    while session not in (listed := tools("ls", "--dht", "-q", url)).lines:
        assert listed.status == 0 and time.monotonic() < deadline, listed


def test_ping(tools: Tools, url: str) -> None:
    assert len(tools.succeed("ping", "-c", "2", url).splitlines()) == 2


def test_the_typescript_clients_habits(peers: Peers, daemon: Daemon) -> None:
    client = peers.start("node", "chat-client", url=daemon.url)
    session = "33333333-0000-4000-8000-000000000001"
    client.tell("chat", directory=str(daemon.root), sessionId=session, text=f"BIG:{MEGABYTES}")
    assert client.expect("spawned")["result"]["type"] == "success"
    output = client.expect("output")
    while output["data"]["type"] != "result":
        output = client.expect("output")
    assert output["data"]["result"].strip() == "z" * MEGABYTES


def test_a_session_outlives_its_daemon(
    tools: Tools, peers: Peers, claude: Path, claude_env: dict[str, str], tmp_path: Path
) -> None:
    """After a kill the output is still there, and the next message brings the conversation back."""
    first = start_daemon(peers, tmp_path, claude, env=claude_env)
    url = str(first.data / "pairing.url")
    session = tools.succeed("send", url, "remember this")
    tools.succeed("send", "-w", "-s", session, url, "and this")
    before = tools.succeed("tail", url, session).splitlines()
    first.peer.process.send_signal(signal.SIGKILL)
    first.peer.process.wait(30)
    start_daemon(peers, tmp_path, claude, env=claude_env)
    assert tools.succeed("tail", url, session).splitlines() == before
    assert tools.succeed("send", "-w", "-s", session, url, "go on").strip() == "echo: go on"
    after = tools.succeed("tail", url, session).splitlines()
    assert after[: len(before)] == before and results(after)[-1] == "echo: go on"


def test_a_follower_survives_a_restart(
    tools: Tools, peers: Peers, claude: Path, claude_env: dict[str, str], tmp_path: Path
) -> None:
    """It reconnects and goes on where it was: nothing is lost and nothing comes twice."""
    first = start_daemon(peers, tmp_path, claude, env=claude_env)
    url = str(first.data / "pairing.url")
    session = tools.succeed("send", url, "before")
    with tools.start("tail", "-f", url, session) as follower:
        until_results(follower, 1)
        first.peer.close()
        start_daemon(peers, tmp_path, claude, env=claude_env)
        assert tools.succeed("send", "-s", session, url, "after") == session
        until_results(follower, 2)
        assert results(follower.said) == ["echo: before", "echo: after"]
        tools.succeed("stop", url, session)
        assert follower.finish() == 0
        assert tools.succeed("tail", url, session).splitlines() == [line.rstrip("\n") for line in follower.said]
