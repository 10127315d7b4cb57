"""Ends of connections as an application sees them: clean ones with the default patience, dead peers, outages."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from kit.sim_peers import End, connect_ends, receive_all, seeds
from sim import Link, SimNetwork, run

from p2pclaude.hyperdht.dht import KEEP_ALIVE
from p2pclaude.hyperdht.errors import ConnectionClosed
from p2pclaude.hyperdht.secure.connection import Connection

AT_ONCE = 500  # connections of one network


def _forget(*ends: End) -> None:
    for end in ends:
        end.endpoint.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Do without the collector of cycles, which looks seldom, and counts objects and no bytes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def _serve(connection: Connection) -> None:
    """Answer and end, as a server's handler does."""
    while await connection.read():
        pass
    await connection.write(b"bye")
    await connection.close()


@pytest.mark.parametrize("first", range(0, len(seeds(300)), AT_ONCE))
def test_a_close_with_the_usual_patience_is_clean_on_both_sides(first: int) -> None:
    """Neither side takes lost packets of a clean end for a dead peer; P2PCLAUDE_SEEDS=10000 for the long run."""

    async def one(net: SimNetwork, number: int) -> None:
        client, server = await connect_ends(net, f"{number} ")
        serving = asyncio.create_task(_serve(server.connection))
        await client.connection.write(b"x" * 2000)
        await client.connection.write_eof()
        assert await receive_all(client.connection)
        await client.connection.close()
        await serving
        for end in (client, server):
            assert end.connection._reason is None
        await asyncio.sleep(30)
        _forget(client, server)

    async def main() -> None:
        net = SimNetwork(first, Link(latency=(0.05, 0.05), loss=0.1))
        await asyncio.gather(*(one(net, number) for number in range(min(AT_ONCE, len(seeds(300)) - first))))

    run(main(), seed=first, cpu_limit=300)


@pytest.mark.parametrize("how", ["fails", "takes too long"])
def test_a_body_that_does_not_come_to_its_end_breaks_the_connection_off(how: str) -> None:
    """At once, and so that the peer does not take half for the whole."""

    async def main() -> None:
        client, server = await connect_ends(SimNetwork(1, Link(latency=(0.05, 0.05))))
        began = asyncio.get_running_loop().time()
        with pytest.raises(ZeroDivisionError if how == "fails" else TimeoutError):
            async with asyncio.timeout(1), client.connection:
                await client.connection.write(b"the first half")
                await asyncio.sleep(0.5)
                if how == "fails":
                    raise ZeroDivisionError
                await client.connection.read()
        assert asyncio.get_running_loop().time() - began < 1.01
        assert await server.connection.read() == b"the first half"
        with pytest.raises(ConnectionClosed):
            await server.connection.read()
        await asyncio.sleep(30)
        _forget(client, server)

    run(main(), seed=1)


@pytest.mark.parametrize("seed", seeds(5))
def test_a_dead_idle_peer_is_noticed_within_fifteen_seconds(seed: int) -> None:
    async def main() -> float:
        net = SimNetwork(seed, Link(latency=(0.05, 0.05)))
        left, right = await connect_ends(net)
        for end in (left, right):
            end.connection.set_keep_alive(KEEP_ALIVE)
        await left.connection.write(b"hello")
        await receive_all(right.connection, 5)
        loop = asyncio.get_running_loop()
        await asyncio.sleep(60 + net.rng.uniform(0, KEEP_ALIVE))
        right.host.up = False
        gone = loop.time()
        with pytest.raises(ConnectionClosed, match="answer"):
            await left.connection.read()
        seconds = loop.time() - gone
        _forget(left, right)
        return seconds

    assert 11 < run(main(), seed=seed) <= 15


@pytest.mark.parametrize("rtt", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("seed", seeds(8))
def test_an_outage_of_ten_seconds_at_any_moment_kills_no_idle_connection(seed: int, rtt: float) -> None:
    async def main() -> None:
        net = SimNetwork(seed, Link(latency=(rtt / 2, rtt / 2)))
        left, right = await connect_ends(net)
        for end in (left, right):
            end.connection.set_keep_alive(KEEP_ALIVE)
        await left.connection.write(b"hello")
        await receive_all(right.connection, 5)
        for _ in range(3):
            await asyncio.sleep(20 + net.rng.uniform(0, KEEP_ALIVE))
            net.partition([left.host], [right.host])
            await asyncio.sleep(10)
            net.heal()
            await left.connection.write(b"hello")
            async with asyncio.timeout(3):
                await receive_all(right.connection, 5)
        assert not left.connection.closed and not right.connection.closed
        _forget(left, right)

    run(main(), seed=seed)


class _Large:
    """Something that a handler has at hand."""


async def _handle(connection: Connection, reads: bool, seen: "weakref.WeakSet[_Large]") -> None:
    large = _Large()
    seen.add(large)
    while reads:
        await connection.read()
    while True:
        await connection.write(bytes(1 << 20))


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("here", [True, False])
def test_what_a_handler_had_at_hand_is_gone_with_the_connection(reads: bool, here: bool) -> None:
    """Though the connection itself is remembered for a while: strangers would be served from a growing heap."""

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.01)))
        left, right = await connect_ends(net)
        seen: weakref.WeakSet[_Large] = weakref.WeakSet()
        handling = asyncio.create_task(_handle(right.connection, reads, seen))
        await asyncio.sleep(1)
        assert len(seen) == 1
        (right if here else left).connection.abort()
        with pytest.raises(ConnectionClosed):
            await handling
        del handling
        await asyncio.sleep(1)
        assert not seen
        _forget(left, right)

    run(main(), seed=1)


@pytest.mark.parametrize("ended", [False, True])
def test_a_node_that_leaves_is_not_taken_for_the_peers_end(ended: bool) -> None:
    """Who reads would think that it has everything; what came before is read, and an end that did come is one."""

    async def main() -> None:
        left, right = await connect_ends(SimNetwork(1, Link(latency=(0.01, 0.01))))
        await right.connection.write(b"half of it")
        if ended:
            await right.connection.write_eof()
        await asyncio.sleep(1)
        left.endpoint.close()
        assert await left.connection.read() == b"half of it"
        if ended:
            assert await left.connection.read() == b""
        else:
            with pytest.raises(ConnectionClosed, match="broken off on this side"):
                await left.connection.read()
        with pytest.raises(ConnectionClosed):
            await left.connection.write(b"answer")
        await right.connection.wait_closed()
        _forget(right)

    run(main(), seed=1)
