"""Mixed networks: who stores whose announcement, and networks that consist of Python nodes alone."""

import pytest
from interop.harness import Peer, Peers, Side, peers_on

SIDES: list[Side] = ["node", "python"]


def test_node_nodes_hold_a_python_servers_announcement(testnet: Peer, peers: Peers) -> None:
    server, asker = peers.start("python", "server"), peers.start("node", "records")
    key = server.ready["publicKey"]
    holders = asker.ask("holders", publicKey=key, nodes=testnet.ready["nodes"])["nodes"]
    assert len(holders) >= 3
    found = asker.ask("find-peer", publicKey=key)
    assert found["peers"] == [key] and set(found["nodes"]) <= set(testnet.ready["nodes"])
    server.close()
    assert asker.ask("holders", publicKey=key, nodes=testnet.ready["nodes"])["nodes"] == []


@pytest.mark.parametrize("server_side", SIDES)
@pytest.mark.parametrize("client_side", SIDES)
def test_python_nodes_alone_carry_everyone(testnet: Peer, server_side: Side, client_side: Side) -> None:
    """The only persistent nodes are Python ones: they hold the announcement and relay the handshake."""
    with peers_on([]) as nodes:
        net = nodes.start("python", "testnet", size=6)
        with peers_on(net.ready["bootstrap"]) as peers:
            server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
            asker = peers.start("node", "records")
            key = server.ready["publicKey"]
            assert len(asker.ask("holders", publicKey=key, nodes=net.ready["nodes"])["nodes"]) >= 3
            client.tell("connect", key=key, bytes=300_000, count=5, timeout=25_000)
            results = [client.expect("result") for _ in range(5)]
            assert [one for one in results if not one["ok"]] == []


@pytest.mark.parametrize("server_side", SIDES)
def test_half_the_nodes_of_each_kind(testnet: Peer, server_side: Side) -> None:
    """Three Node nodes and three persistent Python ones; whichever hold the announcement, the client finds it."""
    client_side: Side = "python" if server_side == "node" else "node"
    with peers_on([]) as nodes:
        net = nodes.start("node", "testnet", size=3)
        with peers_on(net.ready["bootstrap"]) as peers:
            joined = [peers.start("python", "records", persistent=True) for _ in range(3)]
            where = [one.ask("where")["address"] for one in joined]
            server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
            asker, key = peers.start("node", "records"), server.ready["publicKey"]
            names = net.ready["nodes"] + where
            assert len(asker.ask("holders", publicKey=key, nodes=names)["nodes"]) >= 3
            client.tell("connect", key=key, bytes=300_000, timeout=25_000)
            assert client.expect("result")["ok"]
