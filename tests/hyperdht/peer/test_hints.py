"""What is remembered of a server makes the next connect short, and costs nothing when it is old."""

import asyncio
from collections.abc import Sequence

import pytest
from kit.sim_dht import Swarm, ask, cone, is_request, serve, swarm
from sim import Host, Link, run
from sim.realm import Packet

from p2pclaude.hyperdht.constants import Command
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import PeerConnectionFailed, PeerNotFound
from p2pclaude.hyperdht.peer.server import Server

LATENCY = 0.05  # one way, between any two hosts
ROUND_TRIP = 2 * LATENCY
MARGIN = 0.005


async def server_on(network: Swarm, host: Host) -> Server:
    """Start a server that echoes."""
    node = await network.join(host)
    return await serve(node, node.key_pair)


async def connect_seconds(client: HyperDHT, key: bytes, early_data: bytes = b"") -> tuple[float, float]:
    """Connect, ask for an echo of five bytes, and return the seconds until connected and until answered."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with await client.connect(key, early_data=early_data) as connection:
        connected = loop.time() - started
        if not early_data:
            await connection.write(b"hello")
        received = b""
        while len(received) < 5:
            received += await connection.read()
        assert received == b"hello"
        return connected, loop.time() - started


async def fresh_client(network: Swarm, host: Host, remembered: Sequence[Address], key: bytes) -> HyperDHT:
    """Start a node that has not joined yet, as a tool does, with what another one remembered."""
    client = network.make(host)
    network.joined.append(client)
    client.remember_relays(key, remembered)
    await client.start()
    return client


async def remembered_by_another(network: Swarm, host: Host, key: bytes) -> tuple[Address, ...]:
    """Connect once and return what is remembered of the server."""
    client = await network.join(host)
    await connect_seconds(client, key)
    return client.remembered_relays(key)


def test_a_remembered_server_is_one_round_trip_away() -> None:
    async def main() -> tuple[float, float]:
        async with swarm(1, 12, Link(latency=(LATENCY, LATENCY))) as network:
            server = await server_on(network, network.net.host("5.8.0.1"))
            host = network.net.host("5.8.0.2")
            remembered = await remembered_by_another(network, host, server.public_key)
            assert remembered[0][0] == "5.8.0.1" and len(remembered) == 4
            return await connect_seconds(
                await fresh_client(network, host, remembered, server.public_key), server.public_key
            )

    connected, answered = run(main(), seed=1)
    assert connected <= ROUND_TRIP + MARGIN
    assert answered <= 2 * ROUND_TRIP + MARGIN


def test_behind_nats_the_remembered_relays_are_asked_at_once() -> None:
    """The first packet that leaves is a handshake through a relay; no lookup comes before it."""

    async def main() -> None:
        async with swarm(2, 12, Link(latency=(LATENCY, LATENCY))) as network:
            server = await server_on(network, cone(network.net, 1))
            remembered = await remembered_by_another(network, network.net.host("5.8.0.3"), server.public_key)
            assert [address for address in remembered if address[0].startswith("192.168.")] == []
            host = cone(network.net, 2)
            client = await fresh_client(network, host, remembered, server.public_key)
            asked: list[Address] = []

            def watch(packet: Packet) -> bool:
                if packet.origin is host and is_request(packet, Command.PEER_HANDSHAKE) and not asked:
                    now = network.net.loop.now
                    asked.append(packet.destination)
                    assert now - started < MARGIN
                return False

            started = network.net.loop.now
            network.net.intercept = watch
            await connect_seconds(client, server.public_key)
            assert asked and asked[0] in remembered

    run(main(), seed=2)


@pytest.mark.parametrize("stale", ["silent", "another node", "another server", "itself"])
def test_a_stale_hint_costs_a_packet_and_no_time(stale: str) -> None:
    """Ten addresses that are all wrong: the connect takes as long as without them."""

    async def main() -> tuple[float, float]:
        async with swarm(3, 12, Link(latency=(LATENCY, LATENCY))) as network:
            server = await server_on(network, network.net.host("5.8.0.1"))
            other = await server_on(network, network.net.host("5.8.0.4"))
            hosts = [network.net.host(f"5.8.1.{n}") for n in (1, 2)]
            wrong: dict[str, Sequence[Address]] = {
                "silent": [(f"5.9.0.{n}", 49737) for n in range(1, 11)],
                "another node": [("5.0.0.1", 49737)],
                "another server": [(other._context.own_addresses()[0])],
                "itself": [("5.8.1.2", 49737)],
            }
            plain = await fresh_client(network, hosts[0], (), server.public_key)
            cold, _ = await connect_seconds(plain, server.public_key)
            client = await fresh_client(network, hosts[1], wrong[stale], server.public_key)
            sent = 0

            def count(packet: Packet) -> bool:
                nonlocal sent
                sent += packet.destination in wrong[stale] and is_request(packet, Command.PEER_HANDSHAKE)
                return False

            network.net.intercept = count
            hinted, _ = await connect_seconds(client, server.public_key)
            assert sent <= len(wrong[stale])
            return cold, hinted

    cold, hinted = run(main(), seed=3)
    assert hinted <= cold + ROUND_TRIP + MARGIN  # a walk of another seed


def test_a_daemon_that_moved_is_found_and_its_new_place_remembered() -> None:
    async def main() -> None:
        async with swarm(4, 12, Link(latency=(LATENCY, LATENCY))) as network:
            node = await network.join(network.net.host("5.8.0.1"))
            await serve(node, node.key_pair)
            host = network.net.host("5.8.0.2")
            key = node.key_pair.public_key
            remembered = await remembered_by_another(network, host, key)
            await node.destroy()
            moved = network.make(network.net.host("5.8.0.9"))
            network.joined.append(moved)
            await moved.start()
            await moved.bootstrapped.wait()
            await serve(moved, node.key_pair)
            client = await fresh_client(network, host, remembered, key)
            connected, _ = await connect_seconds(client, key)
            assert connected < 1.0
            assert client.remembered_relays(key)[0][0] == "5.8.0.9"

    run(main(), seed=4)


def test_a_daemon_that_is_gone_is_reported_as_soon_as_the_search_is_over() -> None:
    """Remembered addresses that stay silent do not make the answer wait for all their tries."""

    async def main() -> float:
        async with swarm(5, 12, Link(latency=(LATENCY, LATENCY))) as network:
            key = KeyPair.generate(network.net.random("gone")).public_key
            hints = [(f"5.9.0.{n}", 49737) for n in range(1, 5)]
            client = await fresh_client(network, network.net.host("5.8.0.2"), hints, key)
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(PeerNotFound):
                await client.connect(key)
            return loop.time() - started

    assert run(main(), seed=5) < 2.5


def test_a_lost_packet_to_a_remembered_server_is_sent_again() -> None:
    """With every DHT node dead, the server is still reached at its own address, though packets get lost."""

    async def main() -> None:
        async with swarm(6, 6, Link(latency=(LATENCY, LATENCY))) as network:
            server = await server_on(network, network.net.host("5.8.0.1"))
            host = network.net.host("5.8.0.2")
            remembered = await remembered_by_another(network, host, server.public_key)
            client = await fresh_client(network, host, remembered, server.public_key)
            lost = 0

            def lose(packet: Packet) -> bool:
                nonlocal lost
                if packet.destination[0] != "5.8.0.1" and packet.origin is host:
                    return True
                lost += packet.origin is host
                return packet.origin is host and lost <= 1

            network.net.intercept = lose
            await connect_seconds(client, server.public_key)

    run(main(), seed=6)


@pytest.mark.parametrize("remember", [False, True])
def test_early_data_saves_a_round_trip_and_arrives_once(remember: bool) -> None:
    """The server's handler sees the first bytes exactly once, though the client tries several ways."""

    async def main() -> tuple[float, float]:
        async with swarm(7, 12, Link(latency=(LATENCY, LATENCY))) as network:
            server = await server_on(network, network.net.host("5.8.0.1"))
            host = network.net.host("5.8.0.2") if remember else cone(network.net, 2)
            remembered = await remembered_by_another(network, host, server.public_key) if remember else ()
            client = await fresh_client(network, host, remembered, server.public_key)
            return await connect_seconds(client, server.public_key, b"hello")

    connected, answered = run(main(), seed=7)
    # Cold, and behind a NAT that the server cannot come through, the answer comes with the server's first bytes.
    assert answered <= (2 * ROUND_TRIP + MARGIN if remember else connected + MARGIN)


def test_early_data_goes_through_nats_and_loss() -> None:
    """Repeated packets, ways tried and given up: what the server reads is the same bytes, once."""

    async def main() -> None:
        async with swarm(8, 12, Link(latency=(0.01, 0.04), loss=0.1, duplicate=0.05)) as network:
            server = await server_on(network, cone(network.net, 1))
            for n in range(2, 8):
                client = await network.join(cone(network.net, n))
                async with await client.connect(server.public_key, early_data=b"first ") as connection:
                    answer = await ask(connection, b"second")
                    await connection.write_eof()
                    while data := await connection.read():
                        answer += data
                    assert answer == b"first second"

    run(main(), seed=8)


def test_a_remembered_relay_that_the_search_finds_too_is_waited_for() -> None:
    """The server vanished, its announcement did not: that is not "unknown", and no relay is asked twice at once."""

    async def main() -> None:
        async with swarm(9, 12, Link(latency=(LATENCY, LATENCY))) as network:
            host = network.net.host("5.8.0.1")
            server = await server_on(network, host)
            client = await network.join(network.net.host("5.8.0.2"))
            await connect_seconds(client, server.public_key)
            assert len(client.remembered_relays(server.public_key)) == 4
            host.up = False
            with pytest.raises(PeerConnectionFailed):
                await client.connect(server.public_key)

    run(main(), seed=9)
