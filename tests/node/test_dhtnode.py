"""p2pclaude-node as processes: its network, its relay, its key file, its log, and how it ends."""

import asyncio
import io
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli.harness import Shell
from kit.free_ports import free_port
from kit.sim_dht import ask, echo
from kit.sim_relay import Side, pair_of

from p2pclaude.errors import DataError, UsageError
from p2pclaude.host.log import Log, NodeEvent
from p2pclaude.hyperdht import ConnectionClosed, HyperDHT
from p2pclaude.node.dhtnode import DHTNode, NodeOptions, relay_key

Line = dict[str, Any]
TOKEN = b"t" * 32


class RunningNode:
    """A node in a process of its own; its log is read as it comes."""

    def __init__(self, work: Path, *options: str) -> None:
        self.port = free_port()
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), *options]
        self.process = Shell(work, "").start("node", *arguments)
        self.lines: list[Line] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def bootstrap(self) -> str:
        """How others name this node."""
        return f"127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(json.loads(line))
                self._changed.notify_all()

    def expect(self, event: str, timeout: float = 50.0) -> Line:
        """Return the first line with that event, waiting for it."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for line in self.lines:
                    if line["event"] == event:
                        return line
                assert self._changed.wait(deadline - time.monotonic()), (event, self.lines)

    def expect_warning(self, words: str, timeout: float = 50.0) -> None:
        """Wait for a warning with these words."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not any(words in line.get("message", "") for line in self.lines):
                assert self._changed.wait(deadline - time.monotonic()), (words, self.lines)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it as a user does, in good order."""
        self.process.send_signal(number)
        assert self.process.wait(30) == 0
        self._reader.join()
        assert self.process.stderr is not None and self.process.stderr.read() == b""

    def close(self) -> None:
        """Make sure that it is gone."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextmanager
def node(work: Path, *options: str) -> Iterator[RunningNode]:
    """Run a node that says that it started; it is gone afterwards."""
    running = RunningNode(work, *options)
    try:
        running.expect("node-started")
        yield running
    finally:
        running.close()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Give a shell in an empty directory."""
    return Shell(tmp_path, "no url")


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    """The first node says where it is; a second one joins it; both end by a signal, with their last words logged."""
    with node(tmp_path) as first:
        started = first.expect("node-started")
        assert started["network"] == "own"
        assert started["address"] == first.bootstrap
        assert "relay_key" not in started
        with node(tmp_path, "--bootstrap", first.bootstrap) as second:
            assert second.expect("node-started")["network"] == "joined"
            assert second.expect("network-joined")["nodes"] == 1
            second.stop(signal.SIGINT)
        first.stop()
        events = [line["event"] for line in first.lines]
        assert events == ["node-started", "network-joined", "node-stopping", "node-stopped"]
        assert first.expect("node-stopping")["signal"] == "SIGTERM"
        assert {line["level"] for line in first.lines} == {"info"}
    assert not (tmp_path / "home" / ".p2p-claude").exists()


def test_a_network_that_does_not_answer_is_not_joined_yet(tmp_path: Path) -> None:
    """It is said that nobody answers; that the network is joined, and a relay announced there, only when it is."""
    port = free_port()
    with node(tmp_path, "--relay", "--bootstrap", f"127.0.0.1:{port}") as alone:
        alone.expect_warning("no node of the network answers")
        alone.expect_warning("cannot be found yet")
        assert not {"network-joined", "relay-announced"} & {line["event"] for line in alone.lines}
        first = Shell(tmp_path, "").start("node", "--host", "127.0.0.1", "--port", str(port))
        try:
            assert alone.expect("network-joined", timeout=60)["nodes"] == 1
            alone.expect("relay-announced", timeout=60)
        finally:
            first.kill()
            first.communicate()
        alone.stop()


def test_the_environment_names_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P2P_CLAUDE_BOOTSTRAP is joined; --private wins over it."""
    with node(tmp_path) as first:
        env = {"P2P_CLAUDE_BOOTSTRAP": first.bootstrap}
        for options, network in (([], "joined"), (["--private"], "own")):
            port = str(free_port())
            process = Shell(tmp_path, "").start("node", "--host", "127.0.0.1", "--port", port, *options, env=env)
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["network"] == network
            process.terminate()
            process.communicate(timeout=30)


def test_tools_and_daemon_meet_there(tmp_path: Path) -> None:
    """What the README promises: a node, a daemon that joins it, a tool that finds the daemon."""
    with node(tmp_path) as first:
        env = {"P2P_CLAUDE_BOOTSTRAP": first.bootstrap}
        work = tmp_path / "daemon"
        work.mkdir()
        port = str(free_port())
        with (work / "log").open("wb") as log:
            serving = Shell(work, "").start("daemon", "--host", "127.0.0.1", "--port", port, env=env, stdout=log)
        try:
            url = work / "home" / ".p2p-claude" / "pairing.url"
            deadline = time.monotonic() + 50
            while b"daemon-started" not in (work / "log").read_bytes():
                assert time.monotonic() < deadline and serving.poll() is None
                time.sleep(0.05)
            assert "direct" in Shell(work, "").succeed("ping", str(url), env=env)[0]
        finally:
            serving.terminate()
            serving.communicate(timeout=30)


# The relay


async def _relayed(bootstrap: str, key: bytes, size: int) -> None:
    """Link two peers at the relay and send bytes there and back."""
    options: dict[str, Any] = {"bootstrap": [bootstrap], "host": "127.0.0.1", "port": 0, "ephemeral": True}
    async with HyperDHT(**options) as one, HyperDHT(**options) as two:
        sides: tuple[Side, Side] = pair_of(one, two, random.Random(size))
        await asyncio.gather(*(side.join(key, TOKEN) for side in sides))
        serving = asyncio.create_task(echo(sides[1].connection))
        try:
            assert await ask(sides[0].connection, bytes(size)) == bytes(size)
            await sides[0].connection.close()
        finally:
            await asyncio.gather(serving, return_exceptions=True)
            for side in sides:
                await side.leave()


def test_a_relay(tmp_path: Path) -> None:
    """Peers are linked under the key in the log; what happened is told, with numbers and without keys."""
    with node(tmp_path, "--relay", "--max-bytes", "1000000", "-v") as running:
        key = running.expect("node-started")["relay_key"]
        running.expect("relay-announced")
        asyncio.run(_relayed(running.bootstrap, bytes.fromhex(key), 100_000))
        closed = running.expect("link-closed")
        assert (closed["link"], closed["reason"]) == (1, "client")
        assert 200_000 < closed["bytes"] < 1_000_000  # on a busy machine much is sent again
        assert {running.expect("link-opened")[part] for part in ("initiator", "responder")} == {1, 2}
        connected = running.expect("client-connected")
        assert len(connected["peer"]) == 8 and connected["address"].startswith("127.0.0.1:")
        with pytest.raises(ConnectionClosed):
            asyncio.run(_relayed(running.bootstrap, bytes.fromhex(key), 1_000_000))
        running.stop()
        reasons = [line["reason"] for line in running.lines if line["event"] == "link-closed"]
        assert reasons == ["client", "bytes"]
        assert key not in json.dumps(running.lines[1:])


def test_a_relays_limits_reach_it(tmp_path: Path) -> None:
    """--max-connections and --max-links are obeyed, and told of as warnings."""
    with node(tmp_path, "--relay", "--max-connections", "1") as running:
        key = bytes.fromhex(running.expect("node-started")["relay_key"])
        with pytest.raises(Exception, match="relay"):
            asyncio.run(_relayed(running.bootstrap, key, 10))
        assert running.expect("client-refused")["level"] == "warning"


def test_the_key_survives(tmp_path: Path, shell: Shell) -> None:
    """Made once, readable by nobody else, the same at every start and for --print-key."""
    key_file = tmp_path / "home" / ".p2p-claude" / "relay-keypair.json"
    [key] = shell.succeed("node", "--print-key")
    assert len(bytes.fromhex(key)) == 32
    assert (key_file.stat().st_mode & 0o777, key_file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    before = key_file.read_bytes()
    for _ in range(2):
        with node(tmp_path, "--relay") as running:
            assert running.expect("node-started")["relay_key"] == key
            running.stop()
    assert key_file.read_bytes() == before
    other = tmp_path / "other.json"
    assert shell.succeed("node", "--print-key", "--key-file", str(other)) != [key]
    assert shell.succeed("node", "--print-key", "--key-file", str(key_file)) == [key]


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is advised is something that the node knows."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UsageError, match="there is no home directory") as caught:
        relay_key(NodeOptions(), environ={})
    assert caught.value.hint == "name a directory in P2P_CLAUDE_DATA_DIR"


def test_a_key_file_open_to_others(tmp_path: Path, shell: Shell) -> None:
    """It is closed, and that is said."""
    path = tmp_path / "key.json"
    shell.succeed("node", "--print-key", "--key-file", str(path))
    path.chmod(0o644)
    with node(tmp_path, "--relay", "--key-file", str(path)) as running:
        assert "key.json" in running.expect("warning")["message"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"{}", b'{"publicKey": 1, "secretKey": 2}', b'{"publicKey": "!", "secretKey": ""}', b"\xff"],
)
def test_a_damaged_key_file(tmp_path: Path, damage: bytes) -> None:
    """Never a new key in silence."""
    path = tmp_path / "key.json"
    path.write_bytes(damage)
    with pytest.raises(DataError, match="damaged"):
        relay_key(NodeOptions(key_file=str(path)), {})
    assert path.read_bytes() == damage


def test_keys_that_do_not_belong_together(tmp_path: Path) -> None:
    """A public key beside another's secret one is damage too; so is one in a directory that is not there."""
    paths = [tmp_path / name for name in ("one.json", "two.json")]
    for path in paths:
        relay_key(NodeOptions(key_file=str(path)), {})
    one, two = (json.loads(path.read_text()) for path in paths)
    paths[0].write_text(json.dumps({**one, "publicKey": two["publicKey"]}))
    with pytest.raises(DataError, match="damaged"):
        relay_key(NodeOptions(key_file=str(paths[0])), {})
    with pytest.raises(UsageError, match="does not exist"):
        relay_key(NodeOptions(key_file=str(tmp_path / "nowhere" / "key.json")), {})


# Command lines, and ends


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("more", "too many arguments"),
        ("--port 0", "--port needs a whole number, 1 or more"),
        ("--port 70000", "--port needs a number up to 65535"),
        ("--host example.org", "--host needs an IPv4 address"),
        ("--public-host ::1", "--public-host needs an IPv4 address"),
        ("--public-host 0.0.0.0", "--public-host needs one address"),
        ("--bootstrap nowhere", "the nodes in --bootstrap are not HOST:PORT"),
        ("--bootstrap h:1 --public", "--bootstrap and --public do not go together"),
        ("--private --public", "--public and --private do not go together"),
        ("--key-file=", "--key-file needs an argument that is not empty"),
        ("--relay --max-connections 0", "--max-connections needs a whole number, 1 or more"),
        ("--relay --max-links none", "--max-links needs a whole number, 1 or more"),
        ("--relay --max-bytes 1e9", "--max-bytes needs a whole number, 1 or more"),
        ("--relay --max-seconds 0", "--max-seconds needs a number of seconds above 0"),
    ],
)
def test_a_wrong_command_line(shell: Shell, words: str, message: str) -> None:
    """Said at once, with the usage, and nothing is made."""
    err = shell.fail(64, "node", *words.split())
    assert f"p2pclaude-node: error: {message}" in err
    assert not (shell.work / "home" / ".p2p-claude").exists()


def test_a_port_that_is_taken(tmp_path: Path, shell: Shell) -> None:
    """The first node of a network has to be where others look for it."""
    with node(tmp_path) as first:
        err = shell.fail(69, "node", "--host", "127.0.0.1", "--port", str(first.port))
        assert f"port {first.port} cannot be used" in err
        first.stop()


def test_a_second_signal() -> None:
    """Whoever does not want to wait for the ordered shutdown need not."""
    exits: list[int] = []
    log = io.StringIO()

    async def main() -> int:
        options = NodeOptions(host="127.0.0.1", port=free_port())
        running = asyncio.create_task(DHTNode(options, environ={}, log=Log(log), exit_now=exits.append).run())
        while "node-started" not in log.getvalue():
            await asyncio.sleep(0.01)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return await running

    assert asyncio.run(main()) == 0
    assert exits == [128 + signal.SIGTERM]
    stopping = [line["signal"] for line in map(json.loads, log.getvalue().splitlines()) if "signal" in line]
    assert stopping == ["SIGINT"]


def test_a_hangup_ends_nothing_and_is_logged(tmp_path: Path) -> None:
    """As with the daemon: what rotates logs sends it."""
    with node(tmp_path) as running:
        running.process.send_signal(signal.SIGHUP)
        line = running.expect("signal-ignored")
        assert (line["signal"], line["level"]) == ("SIGHUP", "info")
        running.stop()


def test_levels_of_events() -> None:
    """What a client brings about is a warning at most; status and details are for who asks."""
    for debug in (False, True):
        log = io.StringIO()
        for event in NodeEvent:
            Log(log, debug=debug)(event)
        levels = {line["event"]: line["level"] for line in map(json.loads, log.getvalue().splitlines())}
        assert {event for event, level in levels.items() if level != "info"} == {
            *("warning", "client-refused", "link-refused", "internal-error"),
            *(["node-status", "library-note"] if debug else []),
        }


def test_a_log_that_nobody_reads(tmp_path: Path) -> None:
    """The node outlives its log's reader."""
    process = Shell(tmp_path, "").start("node", "--host", "127.0.0.1", "--port", str(free_port()))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(30) == 0
    process.communicate()
