"""Iterative lookups on simulated networks: what they find, whom they ask, how they end and what they store."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from kit.dht_nodes import PORT, Peer, address_of, dht, make_node, running, sorted_by_distance
from sim import Link, SimLoop, SimNetwork, run
from sim.realm import Packet

from p2pclaude.hyperdht.constants import Command, ErrorCode, InternalCommand, K
from p2pclaude.hyperdht.encoding import Address, ipv4
from p2pclaude.hyperdht.errors import Destroyed, RemoteError, Suspended, TooFewNodes
from p2pclaude.hyperdht.node.node import Node
from p2pclaude.hyperdht.node.query import CONCURRENCY, MAX_VISITS, QUERY_RETRIES, Query
from p2pclaude.hyperdht.rpc.messages import Request, decode_message, node_id
from p2pclaude.hyperdht.rpc.requests import IncomingRequest, Reply

TARGET = b"\x07" * 32
LOSSY = Link(latency=(0.005, 0.06), loss=0.05, duplicate=0.02)


def ids_of(replies: list[Reply]) -> list[bytes]:
    return [reply.id for reply in replies if reply.id is not None]


@pytest.mark.parametrize("seed", range(3))
def test_the_closest_nodes_of_the_whole_network_are_found_in_order(seed: int) -> None:
    async def main() -> None:
        net = SimNetwork(seed=seed)
        async with dht(net, 60, seed=seed) as nodes:
            client = make_node(net.host("8.8.8.8"), bootstrap=[address_of(nodes[0])])
            async with running(client):
                query = client.find_node(random.Random(seed).randbytes(32))
                seen = [reply.source async for reply in query]
                everybody = [node.id for node in nodes if node.id is not None]
                assert ids_of(query.closest_replies) == sorted_by_distance(query.target, everybody)[:K]
                assert query.closest_nodes == [reply.source for reply in query.closest_replies]
                assert len(set(seen)) == len(seen) == query.successes < 60

    run(main(), seed=seed)


def test_a_lossy_network_gives_nearly_the_same() -> None:
    async def main() -> None:
        net = SimNetwork(seed=5, link=LOSSY)
        async with dht(net, 40) as nodes:
            client = make_node(net.host("8.8.8.8"), bootstrap=[address_of(nodes[0])])
            async with running(client):
                await client.bootstrapped.wait()
                start = asyncio.get_running_loop().time()
                query = client.find_node(TARGET)
                await query.finished()
                assert asyncio.get_running_loop().time() - start < 2
                everybody = [node.id for node in nodes if node.id is not None]
                best = sorted_by_distance(TARGET, everybody)[:K]
                assert len(set(ids_of(query.closest_replies)) & set(best)) >= K - 2

    run(main(), seed=5)


class Script:
    """Bare peers that answer by script: the k-th knows the addresses given to it."""

    def __init__(self, net: SimNetwork) -> None:
        self.net = net
        self.peers: list[Peer] = []
        self.requests: list[tuple[Address, int]] = []  # who was asked what

    async def peer(
        self, *closer: Address, answer: Callable[[IncomingRequest], object] | None = None, persistent: bool = True
    ) -> Address:
        """Start one more peer; its host's number is its own in the order of starting."""
        host = self.net.host(f"7.0.0.{len(self.peers) + 1}")
        peer = await Peer(host, len(self.peers)).start()
        peer.rpc.own.identity = node_id(peer.address) if persistent else None
        peer.rpc.own.closest = lambda target: closer

        def on_request(request: IncomingRequest, external: bool) -> None:
            self.requests.append((peer.address, request.command))
            if request.internal and request.command != InternalCommand.FIND_NODE:
                request.reply(None, token=False, closer_nodes=False)
            elif answer is None:
                request.reply(b"value")
            else:
                answer(request)

        peer.rpc.on_request = on_request
        self.peers.append(peer)
        return peer.address

    async def query(self, *bootstrap: Address, **options: Any) -> tuple[Node, Query]:
        """Return a query on a node of its own that knows these bootstrap nodes."""
        node = make_node(self.net.host("8.8.8.8"), bootstrap=bootstrap)
        await node._bind()
        return node, node.query(Command.LOOKUP, TARGET, **options)


def scripted(body: Callable[[Script], Any], *, link: Link | None = None) -> None:
    """Run a test body with scripted peers."""

    async def main() -> None:
        await body(Script(SimNetwork(link=link)))

    run(main())


DEAD = [(f"6.6.6.{i}", PORT) for i in range(1, 9)]


def test_an_error_ends_a_visit_and_its_closer_nodes_count() -> None:
    async def body(script: Script) -> None:
        far = await script.peer()
        ephemeral = await script.peer(far, answer=lambda r: r.error(ErrorCode.UNKNOWN_COMMAND), persistent=False)
        _, query = await script.query(ephemeral)
        assert [reply.source async for reply in query] == [far]
        assert (query.successes, query.errors) == (1, 1)

    scripted(body)


def test_replies_without_id_are_given_but_are_not_among_the_closest() -> None:
    async def body(script: Script) -> None:
        stranger = await script.peer(persistent=False)
        _, query = await script.query(stranger)
        assert [reply.value async for reply in query] == [b"value"]
        assert query.closest_replies == []

    scripted(body)


def test_a_dead_node_does_not_hold_up_the_others() -> None:
    async def body(script: Script) -> None:
        alive = [await script.peer(*DEAD) for _ in range(9)]
        _, query = await script.query(*alive)
        loop = asyncio.get_running_loop()
        await query.finished()
        assert loop.time() < 2.5  # eight dead nodes, each of which would cost six sends
        assert {reply.source for reply in query.closest_replies} == set(alive)
        assert not query._calls

    scripted(body)


def test_whoever_named_a_dead_node_is_told() -> None:
    async def body(script: Script) -> None:
        alive = [await script.peer(DEAD[0]) for _ in range(2)]
        hints: list[tuple[Address, bytes]] = []

        def observe(event: str, packet: Packet) -> None:
            if event == "sent" and packet.source[0] == "8.8.8.8":
                message = decode_message(packet.data)
                if isinstance(message, Request) and message.internal:
                    hints.append((packet.destination, message.value or b""))

        script.net.observe = observe
        _, query = await script.query(*alive, retries=1)
        await query.finished()
        await asyncio.sleep(1)
        assert sorted(hints) == sorted((address, ipv4(DEAD[0])) for address in alive)

    scripted(body)


def test_if_nobody_answers_the_query_ends_in_bounded_time_and_stores_nothing() -> None:
    async def body(script: Script) -> None:
        _, query = await script.query(*DEAD)

        async def store(reply: Reply) -> None:
            raise AssertionError

        with pytest.raises(TooFewNodes):
            await query.commit(store)
        assert query.errors == len(DEAD)
        assert asyncio.get_running_loop().time() < 15

    scripted(body)


def test_a_bootstrap_node_that_moved_is_found_by_its_name() -> None:
    async def body(script: Script) -> None:
        alive = await script.peer()
        script.net.names["node.example"] = alive[0]
        node = make_node(script.net.host("8.8.8.8"), bootstrap=[f"6.6.6.6@node.example:{PORT}"])
        await node._bind()
        query = node.query(Command.LOOKUP, TARGET)
        assert [reply.source async for reply in query] == [alive]

    scripted(body)


def test_a_name_that_resolves_slowly_does_not_hold_up_known_addresses() -> None:
    async def body(script: Script) -> None:
        named, known = await script.peer(), await script.peer()
        script.net.names["node.example"] = named[0]
        node = make_node(script.net.host("8.8.8.8"), bootstrap=[f"node.example:{PORT}", known])
        await node._bind()
        replies = [reply.source async for reply in node.query(Command.LOOKUP, TARGET)]
        assert sorted(replies) == sorted([named, known])

    scripted(body, link=Link(latency=(0.001, 0.001)))


def test_cached_nodes_are_asked_alone_unless_they_are_too_few() -> None:
    async def body(script: Script) -> None:
        cached = [await script.peer() for _ in range(6)]
        bootstrap = await script.peer()
        _, query = await script.query(bootstrap, nodes=cached)
        await query.finished()
        assert {address for address, _ in script.requests} == set(cached)
        script.requests.clear()
        _, query = await Script(script.net).query(bootstrap, nodes=DEAD[:3])
        await query.finished()
        assert {address for address, _ in script.requests} == {bootstrap}

    scripted(body)


def test_it_does_not_ask_itself_or_nonsense() -> None:
    async def body(script: Script) -> None:
        bogus = [("0.1.2.3", 5), ("224.0.0.1", 5), ("255.255.255.255", 5), ("9.9.9.9", 0)]
        own = ("8.8.8.8", PORT)
        peer = await script.peer(own, *bogus)
        node, query = await script.query(peer)
        node.table.rebuild(node_id(own))
        sent: list[Address] = []
        script.net.observe = lambda event, packet: sent.append(packet.destination) if event == "sent" else None
        await query.finished()
        assert set(sent) - {node.socket.address, ("8.8.8.8", node.socket.address[1])} == {peer}

    scripted(body)


def test_nodes_too_far_to_matter_are_not_asked() -> None:
    async def body(script: Script) -> None:
        peers = [await script.peer() for _ in range(60)]
        _, query = await script.query(*peers)
        await query.finished()
        assert K <= len(script.requests) <= K + CONCURRENCY

    scripted(body)


def test_a_hostile_node_cannot_make_it_wander_for_ever() -> None:
    async def body(script: Script) -> None:
        rng = random.Random(1)

        def invent(target: bytes) -> list[Address]:
            return [(f"6.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}", 1) for _ in range(64)]

        peers = [await script.peer() for _ in range(30)]
        for peer in script.peers:
            peer.rpc.own.closest = invent
        _, query = await script.query(*peers, retries=0)
        await query.finished()
        assert query._frontier._visits <= MAX_VISITS
        assert len(query.closest_replies) == K
        assert query._frontier._visits <= len(peers) * (K + 1)  # no more than twenty of what each one said

    scripted(body)


def test_retries_are_those_of_a_query() -> None:
    async def body(script: Script) -> None:
        counts: list[Address] = []
        script.net.observe = lambda event, packet: counts.append(packet.destination) if event == "sent" else None
        _, query = await script.query(DEAD[0])
        await query.finished()
        assert len(counts) == QUERY_RETRIES + 1

    scripted(body)


def test_leaving_early_forgets_what_is_in_flight() -> None:
    async def body(script: Script) -> None:
        peer = await script.peer(*DEAD)
        node, query = await script.query(peer)
        async with query:
            async for reply in query:
                assert reply.source == peer
                break
        assert node.rpc.in_flight == 0
        assert [reply async for reply in query] == []

    scripted(body)


@pytest.mark.parametrize("error", [Suspended, Destroyed])
def test_the_end_of_the_node_ends_its_queries_with_that_error(error: type[Suspended] | type[Destroyed]) -> None:
    async def body(script: Script) -> None:
        node, query = await script.query(*DEAD)
        waiting = asyncio.create_task(query.finished())
        await asyncio.sleep(0.1)
        await (node.suspend() if error is Suspended else node.destroy())
        with pytest.raises(error):
            await waiting
        with pytest.raises(error):
            await node.query(Command.LOOKUP, TARGET).finished()
        with pytest.raises(error):
            await anext(aiter(node.query(Command.LOOKUP, TARGET)))

    scripted(body)


def test_commit_counts_successes_and_keeps_the_errors() -> None:
    async def body(script: Script) -> None:
        peers = [await script.peer() for _ in range(5)]
        _, query = await script.query(*peers)
        stored: list[Address] = []

        async def store(reply: Reply) -> None:
            assert reply.token is not None
            await asyncio.sleep(0)
            if len(stored) == 3:
                raise RemoteError(ErrorCode.SEQ_TOO_LOW)
            stored.append(reply.source)

        assert await query.commit(store) == 3
        assert [type(error) for error in query.commit_errors] == [RemoteError, RemoteError]

        async def refuse(reply: Reply) -> None:
            raise RemoteError(ErrorCode.SEQ_REUSED)

        with pytest.raises(RemoteError) as caught:
            await query.commit(refuse)
        assert caught.value.code == ErrorCode.SEQ_REUSED

    scripted(body)


def test_a_listener_that_fails_does_not_stall_the_walk(caplog: pytest.LogCaptureFixture) -> None:
    async def body(script: Script) -> None:
        peers = [await script.peer() for _ in range(3)]
        _, query = await script.query(*peers)

        def fail(*args: object) -> None:
            raise RuntimeError("a bug")

        query.on_reply = fail
        await query.finished()
        assert query.successes == 3
        _, query = await script.query(*peers)
        query._add = fail  # type: ignore[method-assign, assignment]
        for _ in range(2):
            with pytest.raises(RuntimeError):
                await query.finished()

    loop = SimLoop()
    try:
        loop.run_until_complete(body(Script(SimNetwork())))
    finally:
        loop.close()
    assert "a bug" in caplog.text


def test_many_queries_at_once_all_end() -> None:
    async def main() -> None:
        net = SimNetwork(seed=3, link=Link(latency=(0.005, 0.05), loss=0.1))
        async with dht(net, 25) as nodes:
            rng = random.Random(3)
            queries = [nodes[i % 25].find_node(rng.randbytes(32)) for i in range(200)]
            await asyncio.gather(*(query.finished() for query in queries))
            assert all(len(query.closest_replies) >= K - 2 for query in queries)
            assert all(node.rpc.in_flight < 60 for node in nodes)

    run(main(), seed=3)
