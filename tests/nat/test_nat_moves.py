"""What NATs and hosts do while a server runs: mappings and addresses move, and it is soon reachable again.

Each test prints how long that took; `pytest -rP` shows it.
"""

import time
from collections.abc import Callable

import pytest
from interop.harness import Peer
from nat.conftest import MakeHome
from nat.lab import Home, Kind
from nat.peers import Dwellers, exchange
from nat.sniff import Packet, Sniffer

from p2pclaude.hyperdht.constants import Command
from p2pclaude.hyperdht.rpc.messages import Request

MAPPING_SECONDS = 10.0
ADDRESS_SECONDS = 10.0
ATTEMPT_MS = 2000

MOVES: dict[str, Callable[[Home], object]] = {
    "ports": Home.move_ports,
    "public": Home.move_public,
    "host": Home.move_address,
}


def seconds_until_reached(client: Peer, server: Peer, since: float) -> float:
    """Connect again and again until it works; returns how long that took."""
    while time.monotonic() - since < 4 * MAPPING_SECONDS:
        if exchange(client, server, timeout=ATTEMPT_MS)["ok"]:
            return time.monotonic() - since
    raise AssertionError("the server was not reached again")


def announces(packet: Packet) -> bool:
    """Tell whether a datagram stores an announcement."""
    message = packet.message()
    internal = isinstance(message, Request) and message.internal
    return isinstance(message, Request) and not internal and message.command == Command.ANNOUNCE


@pytest.mark.parametrize(("kind", "move"), [("cone", "ports"), ("symmetric", "public")])
def test_the_mapping_moved(home: MakeHome, dwellers: Dwellers, kind: Kind, move: str) -> None:
    """The router forgot its mappings or got another address: clients find the server again within ten seconds."""
    house = home(kind)
    server = dwellers.start(house, "python", "server")
    client = dwellers.start(home("open"), "python", "client")
    assert exchange(client, server)["ok"]
    moved = time.monotonic()
    MOVES[move](house)
    reached = seconds_until_reached(client, server, moved)
    print(f"{kind}, {move} moved: reachable after {reached:.1f} s")
    assert reached < MAPPING_SECONDS


@pytest.mark.parametrize("kind", ["open", "cone"])
def test_the_host_moved(home: MakeHome, dwellers: Dwellers, kind: Kind) -> None:
    """The host has another address: the server announces itself from there at once, long before it would anyway."""
    house = home(kind)
    server = dwellers.start(house, "python", "server")
    client = dwellers.start(home("cone"), "python", "client")
    assert exchange(client, server)["ok"]
    with Sniffer(house.namespace) as sniffer:
        moved = time.monotonic()
        house.move_address()
        reached = seconds_until_reached(client, server, moved)
    from_there = [one.at for one in sniffer.packets if one.source[0] == house.address and announces(one)]
    assert from_there and from_there[0] < ADDRESS_SECONDS, sniffer.text()
    print(f"{kind}, host moved: announced after {from_there[0]:.1f} s, reachable after {reached:.1f} s")
    assert reached < MAPPING_SECONDS


@pytest.mark.parametrize(("who", "move"), [("server", "ports"), ("server", "host"), ("client", "public")])
def test_a_connection_survives(home: MakeHome, dwellers: Dwellers, who: str, move: str) -> None:
    """Echoes go on after a pause, on the same connection, when the other side is open.

    Behind a NAT of its own it would hear nothing from the new address, and nobody could tell it.
    """
    houses = {role: home("cone" if role == who else "open") for role in ("server", "client")}
    server = dwellers.start(houses["server"], "python", "server")
    client = dwellers.start(houses["client"], "python", "client")
    client.tell("ping", key=server.ready["publicKey"], count=3000)
    server.expect("connection")
    time.sleep(0.2)
    MOVES[move](houses[who])
    pings = client.expect("pings", 60)["ms"]
    assert len(pings) == 3000
    print(f"{who}'s {move} moved: echoes go on after {max(pings) / 1000:.1f} s")
    assert max(pings) < MAPPING_SECONDS * 1000


@pytest.mark.parametrize("job", ["source", "sink"])
@pytest.mark.parametrize("mtu", [1300, 1100])
def test_the_path_becomes_narrower(home: MakeHome, dwellers: Dwellers, job: str, mtu: int) -> None:
    """In the middle of a transfer, as when a VPN is switched on: it goes on, and what was under way comes in pieces."""
    house = home("cone")
    server = dwellers.start(home("open"), "python", "server")
    client = dwellers.start(house, "python", "client")
    megabytes = 100
    client.tell("connect", key=server.ready["publicKey"], job=job, bytes=megabytes * 1_000_000, timeout=90_000)
    server.expect("connection")
    time.sleep(0.2)
    house.narrow(mtu)
    narrowed = time.monotonic()
    result = client.expect("result", 95)
    assert result["ok"], result
    print(f"{job} through {mtu} bytes: {megabytes} MB, done {time.monotonic() - narrowed:.1f} s after")
