"""Internal commands: what every node answers, what it does not, and the limits on what strangers make it do."""

import asyncio
from typing import Any

import pytest
from kit.dht_nodes import PORT, Peer, address_of, dht, make_node
from sim import SimNetwork, run

from p2pclaude.hyperdht.constants import ErrorCode, InternalCommand
from p2pclaude.hyperdht.encoding import ipv4
from p2pclaude.hyperdht.errors import Timeout
from p2pclaude.hyperdht.node.internal import MAX_DELAYED_PINGS
from p2pclaude.hyperdht.node.node import Node
from p2pclaude.hyperdht.node.routing import TableNode
from p2pclaude.hyperdht.node.ticks import TICK_SECONDS
from p2pclaude.hyperdht.node.upkeep import MAX_CHECKS, MAX_DOWN_HINTS


def now() -> float:
    return asyncio.get_running_loop().time()


async def asker(net: SimNetwork) -> tuple[Node, Peer]:
    """Return a node that knows one other, and a peer to ask it questions."""
    node = make_node(net.host("8.8.8.8"), ephemeral=False, firewalled=False, host="8.8.8.8")
    await node.start()
    await node.bootstrapped.wait()
    return node, await Peer(net.host("7.7.7.7")).start()


async def ask(peer: Peer, command: int, **options: Any) -> Any:
    return await peer.rpc.request(("8.8.8.8", PORT), command, internal=True, retries=0, **options)


def test_internal_commands_are_answered_as_upstream_does() -> None:
    async def main() -> None:
        node, peer = await asker(SimNetwork())
        node.table.add(TableNode.at(("1.2.3.4", 5)))
        ping = await ask(peer, InternalCommand.PING, value=b"padding", target=bytes(32))
        assert (ping.token, ping.closer_nodes, ping.value, ping.error) == (None, (), None, 0)
        assert ping.id == node.id and ping.to == peer.address
        found = await ask(peer, InternalCommand.FIND_NODE, target=bytes(32))
        assert (found.token, found.closer_nodes, found.value) == (None, (("1.2.3.4", 5),), None)
        unknown = await ask(peer, 77, target=bytes(32))
        assert (unknown.error, unknown.closer_nodes, unknown.token) == (1, (("1.2.3.4", 5),), None)
        external = await peer.rpc.request(("8.8.8.8", PORT), 77, target=bytes(32))
        assert (external.error, external.closer_nodes) == (ErrorCode.UNKNOWN_COMMAND, (("1.2.3.4", 5),))
        await node.destroy()

    run(main())


def test_ping_nat_is_answered_to_the_port_it_names() -> None:
    async def main() -> None:
        node, peer = await asker(SimNetwork())
        other = await peer.endpoint.bind("0.0.0.0", 0)
        reply = await ask(peer, InternalCommand.PING_NAT, value=other.address[1].to_bytes(2, "little"))
        assert reply.socket is other and reply.to == (peer.address[0], other.address[1])
        await node.destroy()

    run(main())


@pytest.mark.parametrize(
    ("command", "value"),
    [
        (InternalCommand.FIND_NODE, None),
        (InternalCommand.PING_NAT, None),
        (InternalCommand.PING_NAT, b"\x01"),
        (InternalCommand.PING_NAT, b"\x00\x00"),
        (InternalCommand.DOWN_HINT, b"12345"),
        (InternalCommand.DELAYED_PING, b"\x00"),
        (InternalCommand.DELAYED_PING, (10_001).to_bytes(4, "little")),
    ],
)
def test_malformed_internal_requests_get_no_answer(command: int, value: bytes | None) -> None:
    async def main() -> None:
        node, peer = await asker(SimNetwork())
        with pytest.raises(Timeout):
            await ask(peer, command, value=value, timeout=12)
        assert node.rpc.stats.handler_errors == 0
        await node.destroy()

    run(main(), check_timers=False)


def test_delayed_pings_come_late_and_their_number_is_bounded() -> None:
    async def main() -> None:
        node, peer = await asker(SimNetwork())
        start = now()
        assert peer.host.up
        await ask(peer, InternalCommand.DELAYED_PING, value=(2000).to_bytes(4, "little"), timeout=3)
        assert now() - start == pytest.approx(2, abs=0.1)
        delay = (10_000).to_bytes(4, "little")
        calls = [
            peer.rpc.start(("8.8.8.8", PORT), InternalCommand.DELAYED_PING, internal=True, value=delay, retries=0)
            for _ in range(MAX_DELAYED_PINGS + 300)
        ]
        await asyncio.sleep(9.9)
        assert len(node._internal._delayed) <= MAX_DELAYED_PINGS
        for call in calls:
            call.cancel()
        await node.destroy()
        assert not node._internal._delayed

    run(main(), check_timers=False)


def test_a_delayed_ping_without_an_answer_costs_no_node_its_place() -> None:
    """It asks how long a NAT keeps a mapping: silence is an answer, and says nothing about the node."""

    async def main() -> None:
        async with dht(SimNetwork(), 3) as nodes:
            asking, other = nodes[1:]
            other._internal._handlers[InternalCommand.DELAYED_PING] = lambda request: None
            assert other.id is not None and other.id in asking.table
            delayed = asyncio.create_task(asking.delayed_ping(address_of(other), 1.0))
            await asyncio.sleep(1)
            await asking.ping(address_of(nodes[0]))
            with pytest.raises(Timeout):
                await delayed
            assert other.id in asking.table

    run(main())


def test_down_hints_make_it_look_within_limits() -> None:
    async def main() -> None:
        net = SimNetwork()
        node, peer = await asker(net)
        dead = [(f"6.6.6.{i}", PORT) for i in range(1, 16)]
        for address in dead:
            node.table.add(TableNode.at(address, node.upkeep.tick))
        await ask(peer, InternalCommand.DOWN_HINT, value=ipv4(("1.2.3.4", 5)))
        assert node.rpc.in_flight == 0
        for address in dead:
            await ask(peer, InternalCommand.DOWN_HINT, value=ipv4(address))
            await ask(peer, InternalCommand.DOWN_HINT, value=ipv4(address))  # in the same tick: no second look
        assert node.rpc.in_flight == MAX_CHECKS
        await asyncio.sleep(TICK_SECONDS)
        assert len(node.table) == 5
        await node.destroy()

    run(main())


def test_down_hints_sent_are_bounded_by_tick() -> None:
    async def main() -> None:
        net = SimNetwork()
        node, peer = await asker(net)
        peer.rpc.on_request = lambda request, external: request.reply(None)
        for i in range(200):
            node.upkeep.send_down_hint(peer.address, ("6.6.6.6", i + 1))
        assert node.rpc.stats.commands_sent[InternalCommand.DOWN_HINT] == MAX_DOWN_HINTS
        await asyncio.sleep(TICK_SECONDS)
        node.upkeep.send_down_hint(peer.address, ("6.6.6.6", 1))
        assert node.rpc.stats.commands_sent[InternalCommand.DOWN_HINT] == MAX_DOWN_HINTS + 1
        await node.destroy()

    run(main())
