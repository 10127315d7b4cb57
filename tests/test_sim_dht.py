"""Whole DHT networks in the simulator: records, lookups, servers and clients, faults, and the true cause of failures.

P2PCLAUDE_SEEDS=200 runs so many seeds of each case instead of the few that every run affords.
"""

import asyncio
import hashlib
from random import Random

import pytest
from sim import SimNetwork, run
from sim_dht import BOOTSTRAP, Swarm, ask, echo, eventually, internet, percentile, swarm
from sim_peers import seeds

from p2pclaude.hyperdht.connection import Connection
from p2pclaude.hyperdht.constants import ErrorCode
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import (
    DecodeError,
    Destroyed,
    HolepunchError,
    HyperDHTError,
    PeerConnectionFailed,
    PeerNotFound,
    RemoteError,
    Suspended,
)
from p2pclaude.hyperdht.server import Server

DEADLINE = 20.0


async def serve(node: HyperDHT, key_pair: KeyPair) -> Server:
    server = node.create_server(echo)
    await server.listen(key_pair)
    return server


async def can_ask(client: HyperDHT, key: bytes, data: bytes = b"ping") -> bool:
    """Tell whether one connection and one answer come within the deadline; any failure must have settled by then."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with await client.connect(key, timeout=DEADLINE) as connection, asyncio.timeout(60):
            return await ask(connection, data) == data
    except HyperDHTError:
        return False
    finally:
        assert loop.time() - started < DEADLINE + 60.1


# Two hundred nodes


def test_a_network_of_two_hundred_nodes_finds_what_it_was_given() -> None:
    """Records, topics and peers put in by some nodes are found by others, at 2 % loss."""

    async def main() -> None:
        async with swarm(1, 200, internet(loss=0.02)) as network:
            rng = network.net.random("test")
            await _check_records(network, rng)
            await _check_topics(network, rng)
            await _check_servers(network, rng)

    run(main(), seed=1)


async def _check_records(network: Swarm, rng: Random) -> None:
    for number in range(5):
        writer, reader = rng.sample(network.nodes, 2)
        value = rng.randbytes(rng.choice([0, 1, 500, 1000]))
        target = await writer.immutable_put(value)
        assert await reader.immutable_get(target) == value
        key_pair = KeyPair.generate(rng)
        for seq in (0, 1, 7):
            await writer.mutable_put(key_pair, b"%d" % seq + value[:900], seq)
            record = await reader.mutable_get(key_pair.public_key)
            assert record is not None
            assert (record.seq, record.value) == (seq, b"%d" % seq + value[:900]), number
        assert await reader.mutable_get(key_pair.public_key, seq=8) is None
        for seq, code in ((6, ErrorCode.SEQ_TOO_LOW), (7, ErrorCode.SEQ_REUSED)):
            with pytest.raises(RemoteError) as refused:
                await writer.mutable_put(key_pair, b"other", seq)
            assert refused.value.code == code
    stranger = KeyPair.generate(rng)
    assert await network.nodes[0].mutable_get(stranger.public_key) is None
    assert await network.nodes[0].immutable_get(rng.randbytes(32)) is None


async def _check_topics(network: Swarm, rng: Random) -> None:
    async def found(target: bytes) -> set[bytes]:
        node = rng.choice(network.nodes)
        return {peer.public_key async for result in node.lookup(target) for peer in result.peers}

    for topic in (rng.randbytes(32) for _ in range(5)):
        key_pairs = [KeyPair.generate(rng) for _ in range(4)]
        announcers = rng.sample(network.nodes, 4)
        for node, key_pair in zip(announcers, key_pairs, strict=True):
            await node.announce(topic, key_pair)
        assert await found(topic) == {key_pair.public_key for key_pair in key_pairs}
        await announcers[0].unannounce(topic, key_pairs[0])
        assert await found(topic) == {key_pair.public_key for key_pair in key_pairs[1:]}
    assert await found(rng.randbytes(32)) == set()


async def _check_servers(network: Swarm, rng: Random) -> None:
    key_pairs = [KeyPair.generate(rng) for _ in range(8)]
    hosts = network.net.hosts(16, "5.2")
    nodes = await asyncio.gather(*(network.join(host) for host in hosts))
    servers = [await serve(node, key_pair) for node, key_pair in zip(nodes[:8], key_pairs, strict=True)]
    for client, key_pair in zip(nodes[8:], key_pairs, strict=True):
        relays = [reply.source async for reply in client.find_peer(key_pair.public_key)]
        assert len(relays) >= 2
        assert await can_ask(client, key_pair.public_key, rng.randbytes(10_000))
    for server in servers:
        await server.close()
    assert [reply async for reply in nodes[15].find_peer(key_pairs[0].public_key)] == []


# Connections


@pytest.mark.parametrize(("loss", "least"), [(0.0, 1.0), (0.01, 1.0), (0.05, 1.0), (0.2, 0.95), (0.3, 0.8)])
def test_connections_keep_every_byte_on_lossy_networks(loss: float, least: float) -> None:
    """Each seed is a network, a server and a client that exchange 50 kB both ways."""
    connected: list[float] = []

    async def main(seed: int) -> bool:
        async with swarm(seed, 6, internet(loss, duplicate=0.02)) as network:
            rng = network.net.random("test")
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            key_pair = KeyPair.generate(rng)
            await serve(server_node, key_pair)
            loop = asyncio.get_running_loop()
            started = loop.time()
            try:
                connection = await client.connect(key_pair.public_key, timeout=DEADLINE)
            except HyperDHTError:
                assert loop.time() - started <= DEADLINE + 0.1
                return False
            connected.append(loop.time() - started)
            await _exchange(connection, rng)
            return True

    count = len(seeds(20))
    successes = [run(main(seed), seed=seed) for seed in range(count)]
    assert sum(successes) >= least * count, f"{sum(successes)} of {count} connected"
    assert percentile(connected, 0.9) < (1.0 if loss <= 0.05 else 10.0)


async def _exchange(connection: Connection, rng: Random) -> None:
    data = rng.randbytes(50_000)
    digest = hashlib.sha256()
    async with asyncio.timeout(120):

        async def read() -> None:
            while part := await connection.read():
                digest.update(part)

        reader = asyncio.create_task(read())
        await connection.write(data)
        await connection.write_eof()
        await reader
        await connection.wait_closed()
    assert digest.digest() == hashlib.sha256(data).digest()


def test_many_clients_at_once_are_all_served() -> None:
    async def main() -> None:
        async with swarm(1, 10, internet(loss=0.02)) as network:
            rng = network.net.random("test")
            server_node = await network.join(network.net.host("5.2.0.1"))
            clients = await asyncio.gather(*(network.join(host) for host in network.net.hosts(50, "5.3")))
            key_pair = KeyPair.generate(rng)
            server = await serve(server_node, key_pair)
            data = [rng.randbytes(3000) for _ in clients]
            asked = [can_ask(client, server.public_key, d) for client, d in zip(clients, data, strict=True)]
            assert all(await asyncio.gather(*asked))

    run(main(), seed=1)


def test_one_client_opens_many_connections_to_one_server_one_after_the_other() -> None:
    async def main() -> None:
        async with swarm(1, 6) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            await serve(server_node, server_node.key_pair)
            for _ in range(50):
                assert await can_ask(client, server_node.key_pair.public_key)
            await asyncio.sleep(60)
            assert len(server_node.endpoint.streams) == len(client.endpoint.streams) == 0

    run(main(), seed=1)


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


def test_connect_without_any_node() -> None:
    async def main() -> None:
        net = SimNetwork(1)
        client = HyperDHT(bootstrap=[BOOTSTRAP], port=0, network=net.host("5.2.0.1"), rng=net.random("client"))
        async with client:
            cause, seconds = await _failure(client, KeyPair.generate(net.random("unknown")).public_key)
            assert cause is PeerNotFound
            assert seconds < DEADLINE

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
            assert seconds < DEADLINE

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
            assert seconds < DEADLINE
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


# The whole


def test_a_destroyed_network_leaves_no_task_timer_or_socket() -> None:
    async def main() -> None:
        async with swarm(1, 10) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            assert await can_ask(client, server.public_key)
            connection = await client.connect(server.public_key)
            await ask(connection, b"left open")
        assert connection.closed
        for host in network.net.hosts(10) + network.net.hosts(2, "5.2"):
            assert host.sockets == {}

    run(main(), seed=1, check_timers=True)


def test_a_seed_replays_a_whole_network_exactly() -> None:
    async def main() -> str:
        async with swarm(7, 15, internet(loss=0.1, duplicate=0.05), trace=True) as network:
            server_node, client = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            server = await serve(server_node, server_node.key_pair)
            await can_ask(client, server.public_key, bytes(20_000))
            await asyncio.sleep(300)
        return network.net.trace_digest()

    assert run(main(), seed=7) == run(main(), seed=7)
