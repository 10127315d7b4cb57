"""The TypeScript client's habits, played by Node, before the Python daemon: every method, and every bad request."""

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from interop.daemons import Daemon, start_daemon
from interop.harness import HERE, Peer, Peers, Tools, peers_on
from kit.free_ports import free_port

from p2pclaude.protocol.pairing import parse_url


@pytest.fixture(scope="module")
def daemon(testnet: Peer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Run the Python daemon, with a small stand-in for claude."""
    with peers_on(testnet.ready["bootstrap"]) as group:
        yield start_daemon(group, tmp_path_factory.mktemp("daemon"), HERE / "fake_claude.py")


@pytest.fixture
def client(peers: Peers, daemon: Daemon) -> Peer:
    """Give a Node chat client, connected."""
    return peers.start("node", "chat-client", url=daemon.url)


def call(client: Peer, method: str, **params: object) -> Any:
    """Call a method that must be answered with ok, and return its result."""
    client.tell("call", tag=method, method=method, params=params)
    answer = client.expect("answer", tag=method)
    assert answer["ok"], answer
    return answer["result"]


def refusal(client: Peer, method: str, **params: object) -> str:
    """Call a method that must be answered with ok false, and return the error."""
    client.tell("call", tag=method, method=method, params=params)
    answer = client.expect("answer", tag=method)
    assert not answer["ok"], answer
    return str(answer["error"])


def chat(client: Peer, directory: Path, session: str, text: str) -> list[dict[str, Any]]:
    """Start a session as their client does and return the three objects of its first turn."""
    client.tell("chat", directory=str(directory), sessionId=session, text=text)
    spawned = client.expect("spawned")["result"]
    assert (spawned["type"], spawned["sessionId"]) == ("success", session) and spawned["pid"] > 0
    assert client.expect("sent")["result"]["success"] is True
    return [client.expect("output") for _ in range(3)]


def test_a_chat(client: Peer, daemon: Daemon) -> None:
    before = time.time() * 1000
    output = chat(client, daemon.root, "11111111-0000-4000-8000-000000000001", "grüße")
    assert {one["type"] for one in output} == {"session-output"}
    assert [one["data"]["type"] for one in output] == ["system", "assistant", "result"]
    assert output[2]["data"]["result"] == "echo: grüße"
    assert output[0]["data"]["entry"] == "p2p-daemon" and output[0]["data"]["cwd"] == str(daemon.root)
    argv = output[0]["data"]["argv"]
    assert "--verbose" in argv and argv[argv.index("--permission-mode") + 1] == "acceptEdits"
    assert all(abs(one["timestamp"] - before) < 60_000 for one in output)
    assert client.events("output") == []


def test_every_method_answers_in_their_shape(client: Peer, daemon: Daemon) -> None:
    session = "11111111-0000-4000-8000-000000000002"
    chat(client, daemon.root, session, "x")
    [listed] = [one for one in call(client, "list-sessions") if one["sessionId"] == session]
    assert {"sessionId", "pid", "createdAt"} <= set(listed)
    state = call(client, "get-session-state")
    [stored] = [one for one in state["sessions"] if one["sessionId"] == session]
    assert stored["directory"] == str(daemon.root) and state["updatedAt"]
    pong = call(client, "ping")
    assert pong["pong"] is True and abs(pong["timestamp"] - time.time() * 1000) < 60_000
    client.tell("unpoll")
    assert call(client, "send-message", sessionId=session, text="again")["success"] is True
    kept = wait_for_messages(client, session, 3)
    assert call(client, "get-output", sessionId=session)["messages"] == kept
    assert call(client, "get-output", sessionId=session, clear=True)["messages"] == kept
    assert call(client, "get-output", sessionId=session, clear=True)["messages"] == []
    assert call(client, "stop-session", sessionId=session)["success"] is True
    assert session not in [one["sessionId"] for one in call(client, "list-sessions")]


def wait_for_messages(client: Peer, session: str, count: int) -> list[Any]:
    """Ask for output, without clearing, until there are so many messages."""
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline:
        messages: list[Any] = call(client, "get-output", sessionId=session)["messages"]
        if len(messages) >= count:
            return messages
    raise AssertionError(f"no {count} messages of {session}")


def test_unknown_sessions(client: Peer) -> None:
    unknown = call(client, "send-message", sessionId="nobody", text="x")
    assert unknown["success"] is False and unknown["error"] == "Session not found"
    assert call(client, "stop-session", sessionId="nobody")["success"] is False
    assert call(client, "get-output", sessionId="nobody")["messages"] == []
    assert call(client, "get-output", sessionId="nobody", clear=True)["messages"] == []


def test_spawns_that_fail(client: Peer, daemon: Daemon) -> None:
    for directory in (daemon.root / "missing", Path("/"), daemon.root.parent):
        result = call(client, "spawn-session", directory=str(directory), sessionId="fails")
        assert result["type"] == "error" and result["errorMessage"], result
    assert "fails" not in [one["sessionId"] for one in call(client, "list-sessions")]
    outside = daemon.root / "way-out"
    if not outside.is_symlink():
        outside.symlink_to("/")
    assert call(client, "spawn-session", directory=str(outside))["type"] == "error"
    bad_mode = call(client, "spawn-session", directory=str(daemon.root), permissionMode="everything")
    assert bad_mode["type"] == "error"


def test_unknown_method_and_bad_lines(client: Peer) -> None:
    assert refusal(client, "nonsense") == "Unknown method: nonsense"
    for line in ("{half", "[1]", "null", "\x00", '"text"'):
        client.tell("raw", line=line)
        response = client.expect("response")["response"]
        assert response["id"] == "unknown" and response["ok"] is False and response["error"], (line, response)
    client.tell("raw", line=json.dumps({"id": "x", "method": "ping", "params": "bm90IHNlYWxlZA=="}))
    response = client.expect("response")["response"]
    assert response["id"] == "x" and response["ok"] is False
    assert call(client, "ping")["pong"] is True


def test_a_character_cut_in_two(client: Peer) -> None:
    """Lines are split on bytes: however a line arrives, its characters are whole when it is decoded."""
    line = json.dumps({"id": "höher", "method": "größe"}, ensure_ascii=False).encode() + b"\n"
    cut = line.index("ö".encode()) + 1
    client.tell("raw", hex=line[:cut].hex())
    time.sleep(0.1)  # or both pieces leave in one packet
    client.tell("raw", hex=line[cut:].hex())
    response = client.expect("response")["response"]
    assert response["id"] == "höher" and response["ok"] is False


def test_a_line_without_end_is_cut_off(peers: Peers, daemon: Daemon) -> None:
    """Nine megabytes without a newline end that connection, and nothing else."""
    greedy = peers.start("node", "chat-client", url=daemon.url)
    patient = peers.start("node", "chat-client", url=daemon.url)
    greedy.tell("raw", line="x" * (9 << 20))
    greedy.expect("closed")
    assert call(patient, "ping")["pong"] is True


def test_a_private_network(peers: Peers, tmp_path: Path) -> None:
    """The daemon is the network: a Node client needs nothing but the pairing URL."""
    private = start_daemon(peers, tmp_path, HERE / "fake_claude.py", "--private", "--port", str(free_port()))
    code = json.loads(base64.b64decode(private.url.partition("code=")[2]))
    [bootstrap] = code["metadata"]["bootstrap"]
    client = peers.start("node", "chat-client", url=private.url, bootstrap=[bootstrap])
    assert chat(client, private.root, "11111111-0000-4000-8000-000000000004", "hi")[2]["data"]["result"] == "echo: hi"
    assert "echo: there" in Tools([]).succeed("send", "-w", private.url, "there")


def test_a_wrong_data_key(peers: Peers, daemon: Daemon) -> None:
    stranger = peers.start("node", "chat-client", url=daemon.url, dataKey="00" * 32)
    error = refusal(stranger, "list-sessions")
    assert daemon.url not in error and str(daemon.root) not in error


def test_many_requests_in_flight(client: Peer, daemon: Daemon) -> None:
    for number in range(60):
        client.tell("call", tag=number, method="ping", params={})
    assert all(client.expect("answer", tag=number)["ok"] for number in range(60))


def test_three_mebibytes_in_one_line(client: Peer, daemon: Daemon) -> None:
    output = chat(client, daemon.root, "11111111-0000-4000-8000-000000000003", f"BIG:{3 << 20}")
    assert output[2]["data"]["result"] == "z" * (3 << 20)


def test_several_clients_at_once(peers: Peers, daemon: Daemon) -> None:
    clients = [peers.start("node", "chat-client", url=daemon.url) for _ in range(4)]

    def one(number: int) -> str:
        session = f"22222222-0000-4000-8000-{number:012}"
        return str(chat(clients[number], daemon.root, session, f"from {number}")[2]["data"]["result"])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [f"echo: from {number}" for number in range(4)]


def test_their_data_directory_works_for_us(peers: Peers, tmp_path: Path) -> None:
    """The Node daemon made it; the Python daemon goes on with the same keys, so the old pairing URL still works."""
    theirs = peers.start("node", "daemon", claude=["false"], dataDir=str(tmp_path / "data"))
    url = theirs.ready["url"]
    theirs.close()
    (tmp_path / "data" / "encryption.key").chmod(0o644)
    ours = start_daemon(peers, tmp_path, HERE / "fake_claude.py")
    client = peers.start("node", "chat-client", url=url)
    assert call(client, "ping")["pong"] is True
    assert (ours.data / "encryption.key").stat().st_mode & 0o777 == 0o600


def test_a_strict_daemon_is_not_for_the_typescript_client(tmp_path: Path, peers: Peers, tools: Tools) -> None:
    """It makes a new key pair for each run, and so cannot be told from a stranger."""
    strict = start_daemon(peers, tmp_path, HERE / "fake_claude.py", "--strict")
    stranger = peers.start("node", "client")
    stranger.tell("connect", key=parse_url(strict.url).public_key.hex(), count=1, timeout=2500)
    result = stranger.expect("result")
    assert (result["ok"], result["opened"]) == (False, False), result
    assert tools.succeed("ping", strict.url)
    assert strict.peer.expect("connection-opened") and not strict.peer.events("connection-opened")  # the tool's alone
