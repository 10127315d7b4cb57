"""What either side may be told: ways to connect that Node can be held to, turning clients away, going to sleep."""

import time
from typing import Any

import pytest
from interop.harness import Event, Peer, Peers, Side

PAIRS: list[tuple[Side, Side]] = [("python", "node"), ("node", "python")]
both_ways = pytest.mark.parametrize(("server_side", "client_side"), PAIRS)


def connect(client: Peer, server: Peer, **fields: Any) -> Event:
    """Connect once from a fresh node and send a little there and back."""
    client.tell("connect", **{"key": server.ready["publicKey"], "timeout": 25_000, "fresh": True, **fields})
    result = client.expect("result")
    client.expect("done")
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"localConnection": False},
        {"fastOpen": False},
        {"localConnection": False, "fastOpen": False},  # punching, round by round
        {"reusableSocket": True},
    ],
    ids=str,
)
def test_a_node_clients_ways(peers: Peers, options: dict[str, bool]) -> None:
    server, client = peers.start("python", "server"), peers.start("node", "client")
    results = [connect(client, server, options=options, bytes=100_000) for _ in range(3)]
    assert [one for one in results if not one["ok"]] == []


@pytest.mark.parametrize(
    "options",
    [
        {"shareLocalAddress": False},  # punching
        {"holepunch": False},
        {"reusableSocket": True},
    ],
    ids=str,
)
def test_a_node_servers_ways(peers: Peers, options: dict[str, bool]) -> None:
    server, client = peers.start("node", "server", options=options), peers.start("python", "client")
    results = [connect(client, server, bytes=100_000) for _ in range(3)]
    assert [one for one in results if not one["ok"]] == []


@both_ways
def test_turning_away_is_silent(peers: Peers, server_side: Side, client_side: Side) -> None:
    """The client learns nothing, not even that there is a server, and the server's handler sees nobody."""
    server, client = peers.start(server_side, "server", deny=True), peers.start(client_side, "client")
    result = connect(client, server, timeout=2500)
    assert not result["opened"] and not result["ok"]
    assert server.events("connection") == []


@both_ways
def test_suspend_and_resume(peers: Peers, server_side: Side, client_side: Side) -> None:
    """Asleep, a server cannot be reached and its connections are gone; awake, it is announced again."""
    server, client = peers.start(server_side, "server"), peers.start(client_side, "client")
    client.tell("connect", key=server.ready["publicKey"], job="stay", timeout=60_000)
    client.expect("staying")
    server.ask("suspend")
    assert client.expect("lost")["error"] and client.expect("done")
    client.events("result")
    assert not connect(client, server, timeout=1500)["opened"]
    server.ask("resume")
    deadline = time.monotonic() + 60
    while not connect(client, server, timeout=5000)["ok"]:  # Node's resume does not wait for the announcement
        assert time.monotonic() < deadline, "never reachable again"
        time.sleep(0.1)
