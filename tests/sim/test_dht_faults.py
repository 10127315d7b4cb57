"""DHT networks in the simulator when things go wrong: causes of failure, churn, partitions, sleep, moves, ends.

P2PCLAUDE_SEEDS=200 runs so many seeds of each case instead of the few that every run affords.
"""

import asyncio
from random import Random

import pytest
from kit.sim_dht import BOOTSTRAP, DEADLINE, Swarm, ask, can_ask, echo, eventually, internet, serve, swarm
from kit.sim_peers import seeds

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import (
    DecodeError,
    Destroyed,
    HolepunchError,
    HyperDHTError,
    PeerConnectionFailed,
    PeerNotFound,
    Suspended,
    TooFewNodes,
)
from p2pclaude.hyperdht.secure.connection import Connection
from sim import Packet, SimLoop, SimNetwork, run

# Failures settle, with their cause


async def _failure(client: HyperDHT, key: bytes, timeout: float = DEADLINE) -> tuple[type[BaseException], float]:
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(HyperDHTError) as caught:
        await client.connect(key, timeout=timeout)
    return caught.type, loop.time() - started


@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_connect_to_a_key_nobody_announced(loss: float) -> None:
    async def main() -> None:
        async with swarm(1, 20, internet(loss)) as network:
            client = await network.join(network.net.host("5.2.0.1"))
            unknown = KeyPair.generate(network.net.random("unknown"))
            cause, seconds = await _failure(client, unknown.public_key)
            assert cause is PeerNotFound
            assert seconds < 5

    run(main(), seed=1)


def test_connect_to_what_is_no_key() -> None:
    async def main() -> None:
        async with swarm(1, 2) as network:
            client = await network.join(network.net.host("5.2.0.1"))
            with pytest.raises(ValueError, match="32 bytes"):
                await client.connect(bytes(31))
            for no_point in (bytes(32), b"\xff" * 32):
                assert (await _failure(client, no_point))[0] is DecodeError
            assert len(client.endpoint.streams) == 0

    run(main(), seed=1)


@pytest.mark.parametrize(
    ("bootstrap", "most"),
    [
        ([BOOTSTRAP], 8),
        ([("5.0.0.1", 49737), ("5.0.0.2", 49737), ("5.0.0.3", 49737)], 4.5),  # as many as the public network has
        (["no.such.name:49737"], 1),
    ],
    ids=["one", "three", "no name"],
)
def test_connect_without_any_node(bootstrap: list[Address | str], most: float) -> None:
    """The network is out of reach: another cause than a peer that nobody knows, and soon told, yet not in haste."""

    async def main() -> None:
        net = SimNetwork(1)
        client = HyperDHT(bootstrap=bootstrap, port=0, network=net.host("5.2.0.1"), rng=net.random("client"))
        async with client:
            cause, seconds = await _failure(client, KeyPair.generate(net.random("unknown")).public_key)
            assert cause is TooFewNodes
            assert seconds < most

    run(main(), seed=1)


def test_connect_to_a_server_that_is_gone() -> None:
    """Its nodes still know it, but it does not answer."""

    async def main() -> None:
        async with swarm(1, 20) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            network.net.host("5.2.0.1").up = False
            cause, seconds = await _failure(client, server.public_key)
            assert cause is PeerConnectionFailed
            assert seconds < DEADLINE + 0.1

    run(main(), seed=1)


def test_connect_where_no_packet_passes_between_the_two() -> None:
    """Handshakes go through other nodes; the stream does not come through."""

    async def main() -> None:
        async with swarm(1, 20) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            network.net.partition([network.net.host("5.2.0.1")], [network.net.host("5.2.0.2")])
            cause, seconds = await _failure(client, server.public_key)
            assert cause is HolepunchError
            assert seconds < DEADLINE + 0.1
            await asyncio.sleep(30)
            assert len(server_node.endpoint.streams) == len(client.endpoint.streams) == 0

    run(main(), seed=1)


def test_connect_to_a_server_that_turns_us_away_looks_as_if_it_were_gone() -> None:
    async def main() -> None:
        async with swarm(1, 20) as network:
            server_node, client, friend = [await network.join(host) for host in network.net.hosts(3, "5.2")]
            server = server_node.create_server(echo, allow=lambda key, _address: key == friend.key_pair.public_key)
            await server.listen()
            cause, _ = await _failure(client, server.public_key)
            assert cause is PeerConnectionFailed
            assert await can_ask(friend, server.public_key)

    run(main(), seed=1)


@pytest.mark.parametrize("action", ["destroy", "suspend"])
@pytest.mark.parametrize("after", [0.0, 0.03, 0.1, 0.2, 2.0])
def test_connect_while_the_node_stops(action: str, after: float) -> None:
    async def main() -> None:
        async with swarm(1, 20, internet(loss=0.3)) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            await serve(server_node, server_node.key_pair)
            network.net.partition([network.net.host("5.2.0.1")], [network.net.host("5.2.0.2")])
            failing = asyncio.create_task(_failure(client, server_node.key_pair.public_key))
            await asyncio.sleep(after)
            await (client.destroy() if action == "destroy" else client.suspend())
            cause, seconds = await failing
            assert cause is (Destroyed if action == "destroy" else Suspended)
            assert seconds < after + 6

    run(main(), seed=1)


def test_a_cancelled_connect_leaves_nothing_behind() -> None:
    async def main(after: float) -> None:
        async with swarm(1, 10) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            await serve(server_node, server_node.key_pair)
            attempt = asyncio.create_task(client.connect(server_node.key_pair.public_key))
            await asyncio.sleep(after)
            attempt.cancel()
            await asyncio.wait([attempt])
            if attempt.cancelled():
                await asyncio.sleep(60)
                assert len(server_node.endpoint.streams) == len(client.endpoint.streams) == 0
            else:
                attempt.result().abort()

    for step in range(15):
        run(main(step * 0.02), seed=1)


def test_relays_that_corrupt_handshakes_cannot_stop_a_connect() -> None:
    """Two of the three nodes that know the server bring back forged answers; both of the client's first tries."""

    async def main() -> None:
        async with swarm(1, 20) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            relays = [reply.source[0] async for reply in client.find_peer(server.public_key)]
            assert len(relays) >= 3
            forged: list[str] = []

            def forge(packet: Packet) -> bool:
                if packet.source[0] in relays[:2] and packet.destination[0] == "5.2.0.2" and len(packet.data) > 150:
                    packet.data = packet.data[:-1] + bytes([packet.data[-1] ^ 1])
                    forged.append(packet.source[0])
                return False

            network.net.intercept = forge
            assert await can_ask(client, server.public_key)
            assert set(forged) == set(relays[:2])

    run(main(), seed=1)


# A server's life


def test_a_server_stays_findable_for_hours_and_vanishes_when_closed() -> None:
    async def main() -> None:
        async with swarm(1, 20, internet(loss=0.01)) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            for _ in range(6):
                await asyncio.sleep(20 * 60)  # the nodes forget an announcement after 13 to 27 minutes
                assert await can_ask(client, server.public_key)
            await server.close()
            assert [reply async for reply in client.find_peer(server.public_key)] == []

    run(main(), seed=1)


def test_a_server_whose_address_changes_is_found_again() -> None:
    async def main() -> float:
        async with swarm(1, 20) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            await serve(server_node, server_node.key_pair)
            assert await can_ask(client, server_node.key_pair.public_key)
            network.net.host("5.2.0.1").set_addresses("5.9.0.9")
            loop = asyncio.get_running_loop()
            changed = loop.time()
            assert await eventually(lambda: can_ask(client, server_node.key_pair.public_key), 60)
            return loop.time() - changed

    assert run(main(), seed=1) < 15


def test_a_server_outlives_the_nodes_that_know_it() -> None:
    """Every node that stores the announcement dies; the server finds others."""

    async def main() -> None:
        async with swarm(1, 30) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            relays = [reply.source[0] async for reply in client.find_peer(server.public_key)]
            for address in relays:
                network.net.host(address).up = False
            assert await eventually(lambda: can_ask(client, server.public_key), 60)

    run(main(), seed=1)


@pytest.mark.parametrize("sleeper", ["server", "client"])
def test_suspend_and_resume(sleeper: str) -> None:
    async def main() -> None:
        async with swarm(1, 20) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            async with await client.connect(server.public_key) as connection:
                assert await ask(connection, b"before") == b"before"
                node = server_node if sleeper == "server" else client
                await node.suspend()
                await node.suspend()
                async with asyncio.timeout(30):
                    await connection.wait_closed()
            before = network.net.stats["sent"]
            if sleeper == "client":
                assert (await _failure(client, server.public_key))[0] is Suspended
            else:
                assert [reply async for reply in client.find_peer(server.public_key)] == []
            await asyncio.sleep(3600)
            assert network.net.stats["sent"] > before
            await node.resume()
            assert await eventually(lambda: can_ask(client, server.public_key), 10)

    run(main(), seed=1)


def test_a_suspended_node_is_silent() -> None:
    async def main() -> None:
        async with swarm(1, 5) as network:
            node = await network.join(network.net.host("5.2.0.1"))
            await serve(node, node.key_pair)
            await node.suspend()
            sent: list[str] = []
            network.net.observe = lambda event, packet: (
                sent.append(event) if event == "sent" and packet.origin is network.net.host("5.2.0.1") else None
            )
            await asyncio.sleep(600)
            assert sent == []

    run(main(), seed=1)


# Churn and faults


@pytest.mark.parametrize("seed", seeds(2))
def test_a_server_stays_reachable_while_nodes_come_and_go(seed: int) -> None:
    """Half an hour in which every node of forty is replaced once, at 5 % loss; a client comes each half minute."""

    async def main() -> tuple[int, int]:
        async with swarm(seed, 40, internet(loss=0.05)) as network:
            rng = network.net.random("churn")
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            answered = []
            for round_number in range(60):
                await _replace_one(network, network.nodes, rng, round_number)
                await asyncio.sleep(30)
                answered.append(await can_ask(client, server.public_key))
            return sum(answered), len(answered)

    answered, asked = run(main(), seed=seed)
    assert answered >= 0.97 * asked


async def _replace_one(network: Swarm, nodes: list[HyperDHT], rng: Random, number: int) -> None:
    """One node leaves, politely or not, and another comes."""
    leaving = nodes.pop(rng.randrange(len(nodes)))
    if rng.random() < 0.5:
        leaving_host = leaving.endpoint.network
        assert hasattr(leaving_host, "up")
        leaving_host.up = False
    await leaving.destroy()
    host = network.net.host(f"5.3.{number // 250}.{number % 250 + 1}")
    nodes.append(await network.join(host, ephemeral=False, port=49737))


def test_a_network_heals_after_a_partition() -> None:
    async def main() -> None:
        async with swarm(1, 30) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            hosts = list(network.net.internet.nodes.values())
            network.net.partition(hosts[::2], hosts[1::2])
            await asyncio.sleep(600)
            network.net.heal()
            assert await eventually(lambda: can_ask(client, server.public_key), 60)

    run(main(), seed=1)


def test_nodes_become_persistent_by_themselves_when_nothing_stands_before_them() -> None:
    """After 20 minutes and more: those on the open network do, those behind a NAT never."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            net = network.net
            opened = [await network.join(host, ephemeral=None, port=49737) for host in net.hosts(4, "5.2")]
            behind = [
                await network.join(net.nat(f"5.8.0.{i}").host("192.168.1.2"), ephemeral=None, port=49737)
                for i in range(1, 5)
            ]
            assert [node.node.ephemeral for node in opened + behind] == [True] * 8
            await asyncio.sleep(3 * 3600)
            assert [node.node.ephemeral for node in opened] == [False] * 4
            assert [node.remote_address for node in opened] == [(f"5.2.0.{i}", 49737) for i in range(1, 5)]
            assert [node.node.ephemeral for node in behind] == [True] * 4
            assert [node.remote_address for node in behind] == [None] * 4

    run(main(), seed=1)


def test_everything_looks_around_at_once_after_the_machines_slept() -> None:
    """The clock jumps by hours: every stored announcement is stale by then."""

    async def main() -> float:
        async with swarm(1, 20) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimLoop)
            await asyncio.sleep(7)
            loop.jump(4 * 3600)
            woken = loop.time()
            assert await eventually(lambda: can_ask(client, server.public_key), 60)
            return loop.time() - woken

    assert run(main(), seed=1) < 30


@pytest.mark.parametrize("seed", seeds(5))
def test_a_server_that_crashed_is_reachable_as_soon_as_it_is_back(seed: int) -> None:
    """No farewell: the nodes still hold the old announcement, which leads to ports nobody listens on."""

    async def main() -> None:
        async with swarm(seed, 20, internet(loss=0.02)) as network:
            hosts = network.net.hosts(2, "5.2")
            crashing, client = [await network.join(host) for host in hosts]
            key_pair = KeyPair.generate(network.net.random("server"))
            await serve(crashing, key_pair)
            assert await can_ask(client, key_pair.public_key)
            hosts[0].up = False
            await crashing.destroy()
            hosts[0].up = True
            again = await network.join(hosts[0])
            await serve(again, key_pair)
            assert await eventually(lambda: can_ask(client, key_pair.public_key), 5)
            stranger = await network.join(network.net.host("5.2.0.3"))
            assert await eventually(lambda: can_ask(stranger, key_pair.public_key), 5)

    run(main(), seed=seed)


def test_open_connections_outlive_their_server() -> None:
    async def main() -> None:
        async with swarm(1, 8) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            connection = await client.connect(server.public_key)
            assert await ask(connection, b"before") == b"before"
            await server.close()
            assert await ask(connection, b"still there") == b"still there"
            await connection.close()

    run(main(), seed=1)


@pytest.mark.parametrize("before", ["suspended", "serving", "offline"])
def test_destroy_ends_everything_in_its_time(before: str) -> None:
    """Handlers that never return, connects under way and a network that is gone included."""

    async def main() -> None:
        async def hang(connection: Connection) -> None:
            await asyncio.Event().wait()

        async with swarm(1, 8) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = server_node.create_server(hang)
            await server.listen()
            connection = await client.connect(server.public_key)
            await asyncio.sleep(1)
            if before == "suspended":
                await server_node.suspend()
            elif before == "offline":
                network.net.host("5.2.0.1").up = False
            loop = asyncio.get_running_loop()
            started = loop.time()
            await server_node.destroy()
            assert loop.time() - started < 6.1
            assert len(server_node.endpoint.streams) == 0
            if before != "offline":
                async with asyncio.timeout(3):
                    await connection.wait_closed()

    run(main(), seed=1, check_timers=True)


def test_garbage_and_forgeries_at_every_port_change_nothing() -> None:
    """Random bytes behind every first byte that means something, from addresses known and unknown."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            net, rng = network.net, network.net.random("garbage")
            hosts = net.hosts(2, "5.2")
            server_node, client = [await network.join(host) for host in hosts]
            server = await serve(server_node, server_node.key_pair)
            sender = await net.host("5.6.6.6").bind("0.0.0.0", 0, lambda _batch: None)
            targets = [(host.addresses[0], port) for host in [*hosts, *net.hosts(12)] for _, port in host.sockets]

            async def flood() -> None:
                for _ in range(3000):
                    head = rng.choice([b"", b"\x03", b"\x13", b"\x03\x10", b"\x13\x10", b"\xff\x01"])
                    sender.send([head + rng.randbytes(rng.randrange(300))], rng.choice(targets))
                    await asyncio.sleep(0.002)

            flooding = asyncio.create_task(flood())
            for _ in range(10):
                assert await can_ask(client, server.public_key, rng.randbytes(10_000))
            await flooding
            assert server_node.node.rpc.stats.handler_errors == client.node.rpc.stats.handler_errors == 0
            assert server_node.node.rpc.stats.garbage > 50

    run(main(), seed=1)
