"""Whole DHT networks in the simulator: 200 nodes, records, topics, servers, lossy paths, NATs, replay.

P2PCLAUDE_SEEDS=200 runs so many seeds of each case instead of the few that every run affords.
"""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from random import Random

import pytest
from kit.sim_dht import DEADLINE, Swarm, ask, can_ask, internet, percentile, serve, swarm
from kit.sim_peers import seeds

from p2pclaude.hyperdht.constants import ErrorCode
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.errors import HyperDHTError, RemoteError
from p2pclaude.hyperdht.secure.connection import Connection
from sim import Dependence, Host, Nat, PortChoice, SimNetwork, run

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


# Who reaches whom without hole punching


@pytest.mark.parametrize("mapping", Dependence)
@pytest.mark.parametrize("ports", PortChoice)
@pytest.mark.parametrize("natted", ["server", "client"])
def test_an_open_peer_and_one_behind_any_nat_connect_either_way(
    natted: str, ports: PortChoice, mapping: Dependence
) -> None:
    async def main() -> None:
        async with swarm(1, 8, internet(loss=0.01)) as network:
            inside = network.net.nat("5.8.0.1", mapping=mapping, ports=ports).host("192.168.1.2")
            outside = network.net.host("5.2.0.1")
            hosts = (inside, outside) if natted == "server" else (outside, inside)
            server_node, client = [await network.join(host, port=49737) for host in hosts]
            server = await serve(server_node, server_node.key_pair)
            connection = await client.connect(server.public_key, timeout=3)
            assert await ask(connection, bytes(20_000)) == bytes(20_000)
            assert connection.how == "direct"
            await asyncio.sleep(600)  # keep-alives hold the NAT's mapping
            assert await ask(connection, b"still there") == b"still there"
            await connection.close()
            assert await can_ask(client, server.public_key)

    run(main(), seed=1)


def _same_host(net: SimNetwork) -> tuple[Host, Host]:
    host = net.host("5.2.0.1")
    return host, host


def _same_lan(net: SimNetwork) -> tuple[Host, Host]:
    nat = net.nat("5.8.0.1")
    return nat.host("192.168.1.2"), nat.host("192.168.1.3")


def _same_host_behind_nat(net: SimNetwork) -> tuple[Host, Host]:
    host = net.nat("5.8.0.1").host("192.168.1.2")
    return host, host


def _same_lan_two_addresses(net: SimNetwork) -> tuple[Host, Host]:
    """The server has a second address, which the client cannot reach and which is listed first."""
    nat = net.nat("5.8.0.1")
    return nat.host("10.8.0.1", "192.168.1.2"), nat.host("192.168.1.3")


def _two_lans_of_one_carrier(net: SimNetwork) -> tuple[Host, Host]:
    """The outer NAT hairpins; the server's port is forwarded by the inner one, as UPnP does."""
    carrier = Nat(net.internet, "5.8.0.1", hairpin=True, filtering=Dependence.ENDPOINT)
    homes = [Nat(carrier.lan, f"100.64.0.{i}", filtering=Dependence.ENDPOINT) for i in (1, 2)]
    return homes[0].host("192.168.1.2"), homes[1].host("192.168.1.2")


@pytest.mark.parametrize(
    "place", [_same_host, _same_lan, _same_host_behind_nat, _same_lan_two_addresses, _two_lans_of_one_carrier]
)
def test_neighbours_connect_without_help_of_the_nat(place: Callable[[SimNetwork], tuple[Host, Host]]) -> None:
    async def main() -> None:
        async with swarm(1, 8) as network:
            server_node, client = [await network.join(host) for host in place(network.net)]
            server = await serve(server_node, server_node.key_pair)
            connection = await client.connect(server.public_key, timeout=5)
            assert await ask(connection, bytes(20_000)) == bytes(20_000)
            await connection.close()

    run(main(), seed=1)


def test_a_node_connects_to_its_own_server_and_two_nodes_to_each_other_at_once() -> None:
    async def main() -> None:
        async with swarm(1, 8) as network:
            left, right = [await network.join(host) for host in network.net.hosts(2, "5.2")]
            for node in (left, right):
                await serve(node, node.key_pair)
            assert await can_ask(left, left.key_pair.public_key)
            answered = await asyncio.gather(
                can_ask(left, right.key_pair.public_key), can_ask(right, left.key_pair.public_key)
            )
            assert all(answered)

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


async def _traced(seed: int) -> str:
    async with swarm(seed, 15, internet(loss=0.1, duplicate=0.05), trace=True) as network:
        hosts = network.net.host("5.2.0.1"), network.net.nat("5.8.0.1").host("192.168.1.2")
        server_node, client = [await network.join(host) for host in hosts]
        for key_pair in (server_node.key_pair, KeyPair.generate(network.net.random("second"))):
            await serve(server_node, key_pair)
            await can_ask(client, key_pair.public_key, bytes(20_000))
        await asyncio.sleep(300)
    return network.net.trace_digest()


def test_a_seed_replays_a_whole_network_exactly() -> None:
    """Also in processes that hash differently: nothing may depend on the order of a set."""
    script = "import sys; from sim import run; from sim.test_dht import _traced; print(run(_traced(7)))"
    digests = set()
    for hash_seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    digests.add(run(_traced(7), seed=7))
    assert len(digests) == 1
    assert run(_traced(8), seed=8) not in digests
