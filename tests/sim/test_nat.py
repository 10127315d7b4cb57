"""The simulator's NATs against a table of what each kind does; hairpinning, time-outs, rebinding, low TTLs."""

import asyncio
from typing import TypeAlias

import pytest

from sim import Dependence, Link, Nat, PortChoice, SimNetwork, run
from sim.inbox import Inbox
from sim.nat import Dependence as D

Address: TypeAlias = tuple[str, int]

NAT = "203.0.113.1"
SERVER = "10.0.0.1"
OTHER = "10.0.0.2"


async def _open_way(nat: Nat, net: SimNetwork) -> tuple[Inbox, Inbox, Address]:
    """Return an inner socket, the server's it has sent to, and the address the server saw."""
    inner = await Inbox.bind(nat.host("192.168.1.2"), 5000)
    server = await Inbox.bind(net.host(SERVER), 1)
    inner.socket.send([b"hello"], (SERVER, 1))
    [(_, _, seen)] = await server.take()
    return inner, server, seen


@pytest.mark.parametrize("mapping", D)
def test_nat_mapping(mapping: Dependence) -> None:
    """One outer port to all remotes, to all ports of a host, or to none but one."""

    async def main() -> None:
        net = SimNetwork()
        nat = net.nat(NAT, mapping=mapping)
        inner, _, first = await _open_way(nat, net)
        other_port, other_host = await Inbox.bind(net.host(SERVER), 2), await Inbox.bind(net.host(OTHER), 1)
        inner.socket.send([b"x"], (SERVER, 2))
        inner.socket.send([b"x"], (OTHER, 1))
        await asyncio.sleep(1)
        assert (other_port.sources == [first]) is (mapping in (D.ENDPOINT, D.ADDRESS))
        assert (other_host.sources == [first]) is (mapping is D.ENDPOINT)
        assert {source[0] for source in other_port.sources + other_host.sources} == {NAT}

    run(main())


@pytest.mark.parametrize("filtering", D)
def test_nat_filtering(filtering: Dependence) -> None:
    """The remote that was sent to comes in; another of its ports, and another host, as the filter allows."""

    async def main() -> None:
        net = SimNetwork()
        nat = net.nat(NAT, filtering=filtering)
        inner, server, seen = await _open_way(nat, net)
        senders = {
            b"same": server,
            b"port": await Inbox.bind(net.host(SERVER), 2),
            b"host": await Inbox.bind(net.host(OTHER), 1),
        }
        for data, sender in senders.items():
            sender.socket.send([data], seen)
        await asyncio.sleep(1)
        expected = {
            D.ENDPOINT: [b"same", b"port", b"host"],
            D.ADDRESS: [b"same", b"port"],
            D.ADDRESS_AND_PORT: [b"same"],
        }
        assert inner.data == expected[filtering]
        assert net.stats["filtered"] == 3 - len(expected[filtering])

    run(main())


@pytest.mark.parametrize("ports", PortChoice)
def test_nat_ports(ports: PortChoice) -> None:
    async def main() -> list[int]:
        net = SimNetwork(3)
        nat = net.nat(NAT, mapping=D.ADDRESS_AND_PORT, ports=ports)
        server = await Inbox.bind(net.host(SERVER), 1)
        for host in ("192.168.1.2", "192.168.1.3", "192.168.1.4"):
            inbox = await Inbox.bind(nat.host(host), 5000)
            inbox.socket.send([b"x"], (SERVER, 1))
        await asyncio.sleep(1)
        return [port for _, port in server.sources]

    seen = run(main())
    assert len(set(seen)) == 3
    assert run(main()) == seen
    consecutive = [seen[0], seen[0] + 1, seen[0] + 2]
    assert (seen == consecutive) is (ports is not PortChoice.RANDOM)
    assert (seen[0] == 5000) is (ports is PortChoice.PRESERVING)


def test_nat_mappings_and_permissions_time_out_and_inbound_may_refresh() -> None:
    async def main(inbound_refresh: bool) -> tuple[list[bytes], bool]:
        net = SimNetwork()
        nat = Nat(net.internet, NAT, timeout=30, inbound_refresh=inbound_refresh, ports=PortChoice.SEQUENTIAL)
        inner, server, seen = await _open_way(nat, net)
        for name in (b"a", b"b", b"c"):
            await asyncio.sleep(18)  # and two seconds that `take` waits: the third is 60 s after the only outbound one
            server.socket.send([name], seen)
        await asyncio.sleep(31)
        inner.socket.send([b"x"], (SERVER, 1))
        await asyncio.sleep(1)
        return inner.data, server.sources[-1] == seen

    assert run(main(False)) == ([b"a"], False)
    assert run(main(True)) == ([b"a", b"b", b"c"], False)


def test_a_mapping_that_lives_for_weeks_stays_small() -> None:
    async def main() -> None:
        net = SimNetwork()
        nat = net.nat(NAT, timeout=30)
        inner, server, _ = await _open_way(nat, net)
        for port in range(2, 200):
            inner.socket.send([b"x"], (SERVER, port))
            inner.socket.send([b"x"], (SERVER, 1))
            await asyncio.sleep(1)
            passer = await Inbox.bind(nat.host("192.168.1.3"), port)
            passer.socket.send([b"x"], (SERVER, 1))
        (mapping,) = (mapping for mapping in nat._inbound.values() if mapping.inner == ("192.168.1.2", 5000))
        assert server.sources.count((NAT, 5000)) == 198
        assert len(mapping.permits) < 40 and len(nat._inbound) < 40

    run(main())


def test_nat_rebinding_moves_ports_and_address() -> None:
    async def main() -> None:
        net = SimNetwork()
        nat = net.nat(NAT)
        inner, server, before = await _open_way(nat, net)
        nat.rebind()
        server.socket.send([b"lost"], before)
        inner.socket.send([b"x"], (SERVER, 1))
        [(_, _, after)] = await server.take()
        assert after[0] == NAT
        assert after[1] != before[1]
        nat.rebind("203.0.113.9")
        inner.socket.send([b"x"], (SERVER, 1))
        [(_, _, moved)] = await server.take()
        assert moved[0] == "203.0.113.9"
        server.socket.send([b"found"], moved)
        await asyncio.sleep(1)
        assert inner.data == [b"found"]

    run(main())


@pytest.mark.parametrize("hairpin", [False, True])
def test_nat_hairpin_lan_and_forwarded_port(hairpin: bool) -> None:
    async def main() -> None:
        net = SimNetwork()
        nat = Nat(net.internet, NAT, hairpin=hairpin)
        inner, server, seen = await _open_way(nat, net)
        neighbour = await Inbox.bind(nat.host("192.168.1.3"), 6000)
        nat.forward(7000, ("192.168.1.3", 6000))
        inner.socket.send([b"direct"], ("192.168.1.3", 6000))
        inner.socket.send([b"hairpin"], (NAT, 7000))
        await asyncio.sleep(1)
        server.socket.send([b"forwarded"], (NAT, 7000))
        await asyncio.sleep(1)
        expected = {b"direct": ("192.168.1.2", 5000), b"hairpin": seen, b"forwarded": (SERVER, 1)}
        if not hairpin:
            del expected[b"hairpin"]
        assert dict(zip(neighbour.data, neighbour.sources, strict=True)) == expected

    run(main())


def test_nats_nest() -> None:
    async def main() -> None:
        net = SimNetwork()
        carrier = Nat(net.internet, NAT, ports=PortChoice.RANDOM)
        home = Nat(carrier.lan, "100.64.0.2")
        inner, server, seen = await _open_way(home, net)
        assert seen[0] == NAT
        server.socket.send([b"back"], seen)
        await asyncio.sleep(1)
        assert inner.data == [b"back"]
        assert home.mappings() == {5000: ("192.168.1.2", 5000)}

    run(main())


def test_a_low_ttl_opens_the_own_nat_and_dies_before_the_other() -> None:
    """Hole punching's first packet: 5 hops leave the own NAT, and are too few for the 8 of the internet."""

    async def main() -> None:
        net = SimNetwork(link=Link(hops=8))
        left, right = net.nat("203.0.113.1"), net.nat("203.0.113.2")
        a, b = await Inbox.bind(left.host("192.168.1.2"), 5000), await Inbox.bind(right.host("192.168.1.2"), 6000)
        a.socket.send([b"low"], ("203.0.113.2", 6000), ttl=5)
        await asyncio.sleep(1)
        assert (net.stats["ttl"], net.stats["filtered"]) == (1, 0)
        b.socket.send([b"punch"], ("203.0.113.1", 5000))
        await asyncio.sleep(1)
        a.socket.send([b"answer"], b_seen := a.sources[0])
        await asyncio.sleep(1)
        assert b_seen == ("203.0.113.2", 6000)
        assert (a.data, b.data) == ([b"punch"], [b"answer"])
        neighbour = await Inbox.bind(left.host("192.168.1.3"), 1)
        a.socket.send([b"lan"], ("192.168.1.3", 1), ttl=5)
        await asyncio.sleep(1)
        assert neighbour.data == [b"lan"]

    run(main())
