"""Connections between two hosts behind NATs of every kind, Python and Node on either side.

Where one NAT has random ports the time is a matter of luck, and so in the end is success: an attempt ends before every
port was tried. Figures over many runs come from measure.py.
"""

from pathlib import Path

import pytest
from interop.harness import Event, Peers, Side, command, tool_command
from nat.conftest import MakeHome
from nat.lab import KINDS, PUBLIC_HOSTS, Kind, Lab
from nat.peers import Dwellers, exchange

PAIRS = [(client, server) for client in KINDS for server in KINDS if {client, server} != {"symmetric"}]
SIDES: list[tuple[Side, Side]] = [("python", "python"), ("node", "python"), ("python", "node")]
RELAY_HOST = PUBLIC_HOSTS[-1]
SOON = 8000  # milliseconds: more than a lost packet costs, or a process that was held up


def connect(
    home: MakeHome, dwellers: Dwellers, kinds: tuple[Kind, Kind], sides: tuple[Side, Side], **config: str
) -> Event:
    """Connect a new client to a new server and return the client's result; (client, server) both times."""
    server = dwellers.start(home(kinds[1]), sides[1], "server", **config)
    client = dwellers.start(home(kinds[0]), sides[0], "client", **config)
    return exchange(client, server)


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_pair(home: MakeHome, dwellers: Dwellers, kinds: tuple[Kind, Kind], sides: tuple[Side, Side]) -> None:
    lucky = set(kinds) == {"symmetric", "cone"}
    result = connect(home, dwellers, kinds, sides)
    if lucky and not result["ok"] and "node" in sides:
        # Node sends fifty probes a second at one of our sockets of chance: a long wait is a matter of bad luck.
        result = connect(home, dwellers, kinds, sides)
    assert result["ok"], result
    assert lucky or "node" in sides or result["openMs"] < SOON


@pytest.mark.parametrize("kinds", [pair for pair in PAIRS if "symmetric" not in pair], ids="-".join)
def test_node_alone(home: MakeHome, dwellers: Dwellers, kinds: tuple[Kind, Kind]) -> None:
    """What fails between Node and Node is the laboratory's fault, not ours."""
    result = connect(home, dwellers, kinds, ("node", "node"))
    assert result["ok"], result


@pytest.mark.parametrize("kinds", [("open", "cone"), ("cone", "cone"), ("cone", "symmetric")], ids="-".join)
def test_with_python_nodes_alone(home: MakeHome, python_dwellers: Dwellers, kinds: tuple[Kind, Kind]) -> None:
    result = connect(home, python_dwellers, kinds, ("python", "python"))
    assert result["ok"], result


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
def test_a_second_attempt_at_once(home: MakeHome, dwellers: Dwellers, sides: tuple[Side, Side]) -> None:
    """Random punches are throttled; a client that comes again within 20 s, as does another one, is served.

    One of Node's refuses to by itself, so that it is another one; a server of Node's lets ours wait for 20 s.
    """
    server_home, client_home = home("symmetric"), home("cone")
    server = dwellers.start(server_home, sides[1], "server")
    clients = [dwellers.start(client_home, sides[0], "client")]
    clients.append(dwellers.start(client_home, "node", "client") if sides[0] == "node" else clients[0])
    results = [exchange(client, server, connectTimeout=40_000) for client in clients]
    assert all(result["ok"] for result in results), results
    assert sides[1] == "node" or results[1]["openMs"] < 20_000


def test_neighbours_behind_one_nat_each_reach_the_server(home: MakeHome, dwellers: Dwellers) -> None:
    """Two clients on one host behind a cone NAT, at the same time."""
    server, house = dwellers.start(home("cone"), "python", "server"), home("cone")
    clients = [dwellers.start(house, "python", "client") for _ in range(2)]
    for client in clients:
        client.tell("connect", key=server.ready["publicKey"], bytes=50_000, count=5)
    results = [client.expect("result") for client in clients for _ in range(5)]
    assert all(result["ok"] for result in results), results


def test_loss_behind_both_nats(home: MakeHome, dwellers: Dwellers) -> None:
    """One datagram in ten is lost, each way, at both NATs."""
    server_home, client_home = home("cone"), home("cone")
    server = dwellers.start(server_home, "python", "server")
    client = dwellers.start(client_home, "python", "client")
    for house in (server_home, client_home):
        house.lose(0.1)
    results = [exchange(client, server) for _ in range(10)]
    assert all(result["ok"] for result in results), results


def test_two_random_nats_without_a_relay(home: MakeHome, dwellers: Dwellers) -> None:
    """There is no way; the cause is told at once."""
    result = connect(home, dwellers, ("symmetric", "symmetric"), ("python", "python"))
    assert result["error"]["code"] == "HolepunchError" and "random" in result["error"]["message"]
    assert result["totalMs"] < 15_000


def start_relay(lab: Lab, side: Side, group: Peers, directory: Path) -> str:
    """Run a blind relay in the public network, ours or the npm package's; returns its public key."""
    if side == "node":
        config = {"bootstrap": group.bootstrap, "host": RELAY_HOST}
        return str(group.run("relay", lab.command(command("node", "relay", config))).ready["publicKey"])
    options = ["--relay", "--host", RELAY_HOST, "--bootstrap", ",".join(group.bootstrap), "--key-file"]
    argv = lab.command(tool_command("node", *options, str(directory / "key.json")))
    relay = group.run("relay", argv, ready="relay-announced", heeds_stdin=False)
    return str(relay.expect("node-started")["relay_key"])


@pytest.mark.parametrize("named_by", ["server", "client"])
@pytest.mark.parametrize("relay_side", ["python", "node"])
def test_two_random_nats_and_a_relay(
    lab: Lab, home: MakeHome, dwellers: Dwellers, tmp_path: Path, relay_side: Side, named_by: str
) -> None:
    """The ninth pair, which Node does not connect by itself: through a relay that either side names."""
    named = {named_by: start_relay(lab, relay_side, dwellers.group, tmp_path)}
    server = dwellers.start(home("symmetric"), "python", "server", relay=named.get("server"))
    client = dwellers.start(home("symmetric"), "python", "client", relay=named.get("client"))
    results = [exchange(client, server, bytes=1_000_000) for _ in range(2)]
    assert all(result["ok"] and result["openMs"] < SOON for result in results), results
    assert {result["how"] for result in results} == {"relayed"}
