"""Connections between Node and Python through a network of Node nodes: bodies both ways, many connects, ends."""

import pytest
from interop.harness import Peer, Peers, Side

PAIRS: list[tuple[Side, Side]] = [("python", "node"), ("node", "python")]
MEGABYTE = 1 << 20

both_ways = pytest.mark.parametrize(("server_side", "client_side"), PAIRS)


@both_ways
@pytest.mark.parametrize("job", ["sink", "source"])
def test_64_megabytes(peers: Peers, server_side: Side, client_side: Side, job: str) -> None:
    server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
    client.tell("connect", key=server.ready["publicKey"], job=job, bytes=64 * MEGABYTE, timeout=90_000)
    result = client.expect("result", timeout=100)
    assert result["ok"] and result["sha256"] == result["sent"], result
    closed = server.expect("closed")
    assert closed["error"] is None and closed["opened"], closed


@both_ways
def test_both_directions_at_once(peers: Peers, server_side: Side, client_side: Side) -> None:
    server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
    client.tell("connect", key=server.ready["publicKey"], job="echo", bytes=8 * MEGABYTE + 7, timeout=60_000)
    result = client.expect("result", timeout=70)
    assert result["ok"] and result["bytes"] == 8 * MEGABYTE + 7, result
    assert server.expect("closed")["error"] is None


@both_ways
def test_both_know_each_other(peers: Peers, server_side: Side, client_side: Side) -> None:
    server, client = peers.start(server_side, "server", seed="05" * 32), peers.start(client_side, "client")
    client.tell("connect", key=server.ready["publicKey"], bytes=1)
    assert client.expect("result")["ok"]
    connection = server.expect("connection")
    assert len(bytes.fromhex(connection["remoteKey"])) == 32 and connection["remoteAddress"][0] == "127.0.0.1"


@both_ways
def test_fifty_connects_from_fresh_nodes(peers: Peers, server_side: Side, client_side: Side) -> None:
    """Open means that an echo went round; what opened and then hung would be a half-open connection."""
    server = peers.start(server_side, "server")
    clients = [peers.start(client_side, "client") for _ in range(5)]
    for client in clients:
        client.tell("connect", key=server.ready["publicKey"], count=10, parallel=2, fresh=True, timeout=25_000)
    results = [client.expect("result", timeout=90) for client in clients for _ in range(10)]
    assert [result for result in results if not result["ok"]] == []
    closed = [server.expect("closed") for _ in range(50)]
    assert all(one["opened"] for one in closed)


@both_ways
def test_fifty_connects_on_one_node(peers: Peers, server_side: Side, client_side: Side) -> None:
    server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
    client.tell("connect", key=server.ready["publicKey"], count=50, parallel=10, timeout=25_000)
    results = [client.expect("result", timeout=90) for _ in range(50)]
    assert [result for result in results if not result["ok"]] == []


@both_ways
def test_the_servers_abort_is_noticed(peers: Peers, server_side: Side, client_side: Side) -> None:
    server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
    client.tell("connect", key=server.ready["publicKey"], job="stay", timeout=60_000)
    client.expect("staying")
    server.tell("abort", id=server.expect("connection")["id"])
    assert client.expect("lost", timeout=10)["error"]  # by its keep-alive alone it would know after 11 s at best


def test_killed_servers_are_noticed(peers: Peers) -> None:
    """Nobody says goodbye: the keep-alive of 5 s and the retransmissions find out, on either side."""
    pairs = [(peers.start(one, "server"), peers.start(two, "client")) for one, two in PAIRS]
    for server, client in pairs:
        client.tell("connect", key=server.ready["publicKey"], job="stay", timeout=60_000)
        client.expect("staying")
    for server, _ in pairs:
        server.kill()
    for _, client in pairs:
        assert client.expect("lost", timeout=60)["error"]


def not_found(client: Peer, key: str) -> bool:
    """Connect to a key and tell whether the error is that nobody knows it."""
    client.tell("connect", key=key, timeout=25_000)
    result = client.expect("result")
    return not result["opened"] and result["error"]["code"] in ("PEER_NOT_FOUND", "PeerNotFound")


@both_ways
def test_a_closed_server_is_forgotten(peers: Peers, server_side: Side, client_side: Side) -> None:
    """Closing unannounces: whoever asks afterwards is told at once that nobody knows the key."""
    server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
    server.tell("close")
    server.expect("listening-ended")
    assert not_found(client, server.ready["publicKey"])
