"""Our tools against a daemon that has the TypeScript daemon's habits and knows none of our additions."""

import base64
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from interop.harness import HERE, Peer, Peers, Tools, peers_on

from p2pclaude.hyperdht import KeyPair

FAKE_CLAUDE = [sys.executable, str(HERE / "fake_claude.py")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the daemon's root directory."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def daemon(testnet: Peer, root: Path) -> Iterator[Peer]:
    """Run the Node daemon, with a small stand-in for claude."""
    with peers_on(testnet.ready["bootstrap"]) as group:
        yield group.start("node", "daemon", claude=FAKE_CLAUDE, rootDir=str(root))


@pytest.fixture
def url(daemon: Peer) -> str:
    """Give the daemon's pairing URL."""
    return str(daemon.ready["url"])


def test_ping(tools: Tools, url: str) -> None:
    reply = tools.succeed("ping", url)
    assert re.fullmatch(r"[\d.]+ ms\s(direct|punched)\s127\.0\.0\.1:\d+", reply), reply
    assert len(tools.succeed("ping", "-c", "2", url).splitlines()) == 2


def printed(tools: Tools, url: str, session: str) -> list[dict[str, Any]]:
    """Return the objects of a session's first turn, as soon as they are all there."""
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline:
        objects = [json.loads(line) for line in tools.succeed("tail", url, session).splitlines()]
        if len(objects) == 3:
            return objects
    raise AssertionError(f"only {len(objects)} objects of the turn")


def test_send_starts_a_session_and_tail_prints_it(tools: Tools, url: str, root: Path) -> None:
    session = tools.succeed("send", "-C", str(root), url, text="grüß dich\n")
    objects = printed(tools, url, session)
    assert [one["type"] for one in objects] == ["system", "assistant", "result"]
    assert objects[2]["result"] == "echo: grüß dich" and objects[0]["cwd"] == str(root)
    assert tools.succeed("tail", "--text", url, session).strip().endswith("echo: grüß dich")
    assert json.loads(tools.succeed("tail", "-n", "1", url, session))["type"] == "result"


def test_options_reach_claude(tools: Tools, url: str, root: Path) -> None:
    session = tools.succeed("send", "-C", str(root), "--permission-mode", "plan", "--model", "m", url, "first")
    argv = printed(tools, url, session)[0]["argv"]
    assert argv[argv.index("--permission-mode") + 1] == "plan" and argv[argv.index("--model") + 1] == "m"


def test_send_waits_for_the_answer(tools: Tools, url: str, root: Path) -> None:
    assert tools.succeed("send", "-w", "-C", str(root), url, "one", "two") == "echo: one two"
    session = tools.succeed("send", "-C", str(root), url, "first")
    assert tools.succeed("send", "-w", "-s", session, url, text="second") == "echo: second"


def test_lines_make_a_chat(tools: Tools, url: str, root: Path) -> None:
    chat = tools("send", "--lines", "-C", str(root), url, text="a\nb\nc\n")
    assert (chat.status, chat.lines) == (0, ["echo: a", "echo: b", "echo: c"]), chat


def test_a_line_of_three_megabytes(tools: Tools, url: str, root: Path) -> None:
    answer = tools.succeed("send", "-w", "-C", str(root), url, f"BIG:{3 << 20}")
    assert answer == "z" * (3 << 20)


def test_tail_follows_until_the_session_ends(tools: Tools, url: str, root: Path) -> None:
    session = tools.succeed("send", "-C", str(root), url, "hello")
    with tools.start("tail", "-f", url, session) as follower:
        first = [json.loads(follower.line())["type"] for _ in range(3)]
        assert tools.succeed("send", "-s", session, url, "more") == session
        second = [json.loads(follower.line())["type"] for _ in range(3)]
        assert first == second == ["system", "assistant", "result"]
        assert tools.succeed("stop", url, session) == session
        assert follower.finish() == 0 and len(follower.said) == 6


def test_their_record_is_read(tools: Tools, peers: Peers, root: Path) -> None:
    """It lies in the DHT in clear, and its number is always 0: the first one is what everybody sees from then on."""
    daemon = peers.start("node", "daemon", claude=FAKE_CLAUDE)
    url = str(daemon.ready["url"])
    session = tools.succeed("send", "-C", str(root), url, "hello")
    deadline = time.monotonic() + 50
    while session not in (listed := tools("ls", "--dht", "-q", url)).lines:
        assert time.monotonic() < deadline, listed
    daemon.close()
    assert tools.succeed("ls", "--dht", "-q", url) == session


def test_ls_and_stop(tools: Tools, url: str, root: Path) -> None:
    session = tools.succeed("send", "-C", str(root), url, "hello")
    rows = [line.split("\t") for line in tools.succeed("ls", url).splitlines()]
    assert session in [row[0] for row in rows] and all(len(row) == 5 for row in rows)
    assert session in tools.succeed("ls", "-q", url).splitlines()
    records = [json.loads(line) for line in tools.succeed("ls", "--json", url).splitlines()]
    assert session in [one["sessionId"] for one in records]
    stopped = tools.succeed("stop", "--all", url).splitlines()
    assert session in stopped
    assert tools.succeed("ls", url) == ""


def test_tools_that_share_their_key_do_not_get_in_each_others_way(tools: Tools, url: str, root: Path) -> None:
    """All tools of a pairing have one key pair; nothing on the other side may take the second for the first."""
    # A session each: their daemon gives what it clears to one of those who ask.
    sessions = [tools.succeed("send", "-C", str(root), url, "hello") for _ in range(3)]
    with ExitStack() as stack:
        followers = [stack.enter_context(tools.start("tail", "-f", url, session)) for session in sessions]
        for follower in followers:
            assert json.loads(follower.line())["type"] == "system"
        with ThreadPoolExecutor(4) as pool:
            sent = [pool.submit(tools.succeed, "send", "-w", "-C", str(root), url, f"m{n}") for n in range(4)]
            pings = [pool.submit(tools.succeed, "ping", "-c", "3", url) for _ in range(4)]
        assert [one.result() for one in sent] == [f"echo: m{n}" for n in range(4)]
        assert [len(one.result().splitlines()) for one in pings] == [3, 3, 3, 3]
        for session, follower in zip(sessions, followers, strict=True):
            tools.succeed("send", "-s", session, url, "more")
            said = [json.loads(follower.line())["type"] for _ in range(5)]
            assert said == ["assistant", "result", "system", "assistant", "result"]
            assert "lost" not in follower.transcript()


def test_what_is_not_there(tools: Tools, url: str, root: Path) -> None:
    assert tools("send", "-s", "nobody", url, "x").status == 66
    assert tools("stop", url, "nobody").status == 66
    assert tools("tail", url, "nobody").status == 66
    missing = tools("send", "-C", str(root / "missing"), url, "x")
    assert missing.status != 0 and missing.out == "" and "error: " in missing.err
    outside = tools("send", "-C", "/", url, "x")
    assert outside.status != 0 and outside.out == ""


def test_what_their_daemon_does_not_know(tools: Tools, url: str, root: Path) -> None:
    """As README.md tells under Compatibility."""
    session = tools.succeed("send", "-C", str(root), url, "hello")
    assert printed(tools, url, session)
    assert len(tools.succeed("tail", "--after", "2", url, session).splitlines()) == 3
    with tools.start("tail", "-f", url, session) as follower:
        for _ in range(3):
            follower.line()
    assert tools.succeed("tail", url, session) == ""
    assert tools.succeed("send", "--now", "-s", session, url, "more") == session
    assert [one["type"] for one in printed(tools, url, session)] == ["system", "assistant", "result"]
    assert (tools("approve", url).status, tools("stop", "--turn", url, session).status) == (76, 76)


def test_a_claude_that_their_daemon_cannot_start(tools: Tools, peers: Peers, root: Path) -> None:
    daemon = peers.start("node", "daemon", claude=["/nowhere/claude"])
    done = tools("send", "-C", str(root), str(daemon.ready["url"]), "x")
    assert (done.status, done.out) == (69, ""), done


def altered(url: str, field: str, value: bytes) -> str:
    """Return a pairing URL with another key in it."""
    prefix, _, code = url.partition("code=")
    fields = json.loads(base64.b64decode(code)) | {field: base64.b64encode(value).decode()}
    return prefix + "code=" + base64.b64encode(json.dumps(fields).encode()).decode()


def test_a_wrong_data_key_is_refused(tools: Tools, url: str) -> None:
    done = tools("ls", altered(url, "dataKey", bytes(32)))
    assert done.status == 77 and done.out == "", done


def test_a_daemon_that_is_not_there(tools: Tools, url: str) -> None:
    done = tools("ping", altered(url, "dhtPublicKey", KeyPair.from_seed(bytes(range(32))).public_key))
    assert done.status == 69 and done.out == "", done
