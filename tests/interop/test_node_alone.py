"""The Node side against itself: what the other interoperability tests stand on."""

import json
import sys
from pathlib import Path

import pytest
from interop.harness import HERE, Event, Peer, Peers

FAKE_CLAUDE = [sys.executable, str(HERE / "fake_claude.py")]
SEED = "07" * 32


def test_the_network_is_persistent_and_holds_an_announcement(testnet: Peer, peers: Peers) -> None:
    server, asker = peers.start("node", "server"), peers.start("node", "records")
    nodes = testnet.ready["nodes"]
    assert len(nodes) == 6
    assert len(asker.ask("holders", publicKey=server.ready["publicKey"], nodes=nodes)["nodes"]) >= 3


@pytest.mark.parametrize("job", ["echo", "sink", "source"])
def test_a_body_arrives_whole(peers: Peers, job: str) -> None:
    server, client = peers.start("node", "server"), peers.start("node", "client")
    client.tell("connect", key=server.ready["publicKey"], job=job, bytes=3_000_001)
    result = client.expect("result")
    assert result["ok"] and result["opened"] and result["sha256"] == result["sent"]
    assert server.expect("closed")["opened"]


def test_an_unknown_key_is_reported(peers: Peers) -> None:
    client = peers.start("node", "client")
    client.tell("connect", key="ab" * 32)
    result = client.expect("result")
    assert not result["ok"] and not result["opened"] and result["error"]["code"] == "PEER_NOT_FOUND"


def test_records_and_announcements_go_round(testnet: Peer, peers: Peers) -> None:
    writer, reader = peers.start("node", "records"), peers.start("node", "records")
    public_key = writer.ask("mutable-put", seed=SEED, value=b"one".hex(), seq=4)["publicKey"]
    found = reader.ask("mutable-get", publicKey=public_key)
    assert (found["seq"], bytes.fromhex(found["value"])) == (4, b"one")
    target = writer.ask("immutable-put", value=b"two".hex())["target"]
    assert bytes.fromhex(reader.ask("immutable-get", target=target)["value"]) == b"two"
    topic = "11" * 32
    writer.ask("announce", target=topic, seed=SEED)
    assert reader.ask("lookup", target=topic)["peers"] == [public_key]
    writer.ask("unannounce", target=topic, seed=SEED)
    assert reader.ask("lookup", target=topic)["peers"] == []
    older = {"node": testnet.ready["nodes"][1], "seed": SEED, "value": b"old".hex()}
    assert reader.ask("ask-mutable-put", seq=4, **older)["error"] == 16
    assert reader.ask("ask-mutable-put", seq=3, **older)["error"] == 17


def call(client: Peer, method: str, **params: object) -> Event:
    """Call a method through a chat client and return its answer."""
    client.tell("call", tag=method, method=method, params=params)
    return client.expect("answer", tag=method)


def test_chat_client_and_daemon_speak_the_contract(peers: Peers, tmp_path: Path) -> None:
    daemon = peers.start("node", "daemon", claude=FAKE_CLAUDE)
    client = peers.start("node", "chat-client", url=daemon.ready["url"])
    client.tell("chat", directory=str(tmp_path), sessionId="mine", text="grüße")
    assert client.expect("spawned")["result"]["type"] == "success"
    assert client.expect("sent")["result"] == {"success": True}
    output = [client.expect("output")["data"] for _ in range(3)]
    assert [one["type"] for one in output] == ["system", "assistant", "result"]
    assert output[0]["entry"] == "p2p-daemon" and "--permission-mode acceptEdits" in " ".join(output[0]["argv"])
    assert output[2]["result"] == "echo: grüße"
    [session] = call(client, "list-sessions")["result"]
    assert session["sessionId"] == "mine"
    assert call(client, "get-session-state")["result"]["sessions"][0]["directory"] == str(tmp_path)
    assert call(client, "stop-session", sessionId="mine")["result"] == {"success": True}
    assert call(client, "stop-session", sessionId="mine")["result"] == {"success": False}
    unknown = {"success": False, "error": "Session not found"}
    assert call(client, "send-message", sessionId="mine", text="x")["result"] == unknown
    assert call(client, "get-output", sessionId="mine")["result"] == {"messages": []}
    assert call(client, "ping")["result"]["pong"] is True


def test_bad_requests_are_answered(peers: Peers, tmp_path: Path) -> None:
    daemon = peers.start("node", "daemon", claude=FAKE_CLAUDE)
    client = peers.start("node", "chat-client", url=daemon.ready["url"])
    stranger = peers.start("node", "chat-client", url=daemon.ready["url"], dataKey="00" * 32)
    assert call(client, "nonsense") == {
        "event": "answer", "tag": "nonsense", "ok": False, "error": "Unknown method: nonsense",
    }  # fmt: skip
    client.tell("raw", line="{half")
    answer = client.expect("response")["response"]
    assert answer["id"] == "unknown" and answer["ok"] is False
    assert call(stranger, "ping")["ok"] is False
    missing = call(client, "spawn-session", directory=str(tmp_path / "none"))["result"]
    assert missing["type"] == "error"


def test_a_data_directory_keeps_the_identity(peers: Peers, tmp_path: Path) -> None:
    first = peers.start("node", "daemon", claude=FAKE_CLAUDE, dataDir=str(tmp_path / "data"))
    first.close()
    second = peers.start("node", "daemon", claude=FAKE_CLAUDE, dataDir=str(tmp_path / "data"))
    assert second.ready["url"] == first.ready["url"]
    assert set(json.loads((tmp_path / "data" / "dht-keypair.json").read_text())) == {"publicKey", "secretKey"}
