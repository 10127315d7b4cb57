"""One attempt's sockets: whom they probe and whom not, how the own NAT is judged, and that none stays open."""

import asyncio
import errno
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from kit.sim_dht import Swarm, swarm
from sim import Dependence, PortChoice, run
from sim.realm import Packet

from p2pclaude.hyperdht.constants import Firewall
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.net.sockets import Socket
from p2pclaude.hyperdht.peer import puncher as module
from p2pclaude.hyperdht.peer.punch_throttle import PunchThrottle
from p2pclaude.hyperdht.peer.puncher import Puncher

PEER: Address = ("5.77.0.1", 4000)


@asynccontextmanager
async def place(random: bool = False) -> AsyncIterator[tuple[Swarm, HyperDHT, Puncher]]:
    """Give a puncher of a node behind a NAT."""
    async with swarm(1, 12) as network:
        net = network.net
        if random:
            nat = net.nat("5.8.0.1", mapping=Dependence.ADDRESS_AND_PORT, ports=PortChoice.RANDOM)
        else:
            nat = net.nat("5.8.0.1")
        node = await network.join(nat.host("192.168.1.2"))
        await asyncio.sleep(5)
        puncher = Puncher(node.node, node.rng, node.context.throttle, is_initiator=True)
        await puncher.open()
        try:
            yield network, node, puncher
        finally:
            puncher.close()
            await asyncio.sleep(0)
            assert len(node.endpoint.sockets) == 2


def watch_probes(network: Swarm) -> Counter[Address]:
    """Count the probes that leave, by where they go."""
    probes: Counter[Address] = Counter()

    def observe(event: str, packet: Packet) -> None:
        if event == "sent" and len(packet.data) == 1:
            probes[packet.destination] += 1

    network.net.observe = observe
    return probes


@pytest.mark.parametrize(("random", "kind"), [(False, Firewall.CONSISTENT), (True, Firewall.RANDOM)])
def test_the_own_nat_is_recognized_in_one_round_trip(random: bool, kind: Firewall) -> None:
    async def main() -> None:
        async with place(random) as (_, _, puncher):
            loop = asyncio.get_running_loop()
            started = loop.time()
            await puncher.analyse(reopen=False)
            assert puncher.nat.firewall == kind
            assert loop.time() - started < 0.1

    run(main(), seed=1)


def test_silent_helpers_do_not_hold_the_verdict_up() -> None:
    async def main() -> None:
        async with place() as (network, node, puncher):
            puncher.close()
            for address in puncher._helpers()[:3]:
                network.net.host(address[0]).up = False
            second = Puncher(node.node, node.rng, node.context.throttle, is_initiator=True)
            await second.open()
            loop = asyncio.get_running_loop()
            started = loop.time()
            assert await second.analyse(reopen=False)
            assert loop.time() - started < 0.1
            second.close()

    run(main(), seed=1)


def test_nobody_answers_means_unknown_and_ends_in_time() -> None:
    async def main() -> None:
        async with place() as (network, node, puncher):
            puncher.close()
            network.net.partition([network.net.nat("5.8.0.2")], [])
            network.net.intercept = lambda packet: packet.origin is not None
            second = Puncher(node.node, node.rng, node.context.throttle, is_initiator=True)
            await second.open()
            loop = asyncio.get_running_loop()
            started = loop.time()
            assert not await second.analyse(reopen=True)
            assert second.nat.firewall == Firewall.UNKNOWN
            assert loop.time() - started < 30
            second.close()

    run(main(), seed=1)


def test_closing_ends_an_analysis_that_waits() -> None:
    async def main() -> None:
        async with place() as (network, _, puncher):
            network.net.intercept = lambda packet: True
            puncher.close()
            async with asyncio.timeout(1):
                assert not await puncher.analyse(reopen=True)

    run(main(), seed=1)


def test_verified_addresses_are_probed_often_and_claimed_ones_seldom() -> None:
    """What a peer merely claims could be a victim's address; a port of 0 is none."""

    async def main() -> None:
        async with place() as (network, _, puncher):
            await puncher.analyse(reopen=False)
            claimed = [(f"5.78.0.{i}", 1) for i in range(1, 20)]
            puncher.update_remote(Firewall.CONSISTENT, (PEER, (PEER[0], 0), *claimed), True, PEER[0])
            probes = watch_probes(network)
            assert puncher.punch() and puncher.punch()
            await puncher.wait_exhausted()
            assert probes[PEER] == 12
            assert probes[claimed[0]] == 3
            assert (PEER[0], 0) not in probes
            assert len(probes) <= module.MAX_REMOTE_ADDRESSES

    run(main(), seed=1)


@pytest.mark.parametrize(("own_random", "remote"), [(False, Firewall.RANDOM), (True, Firewall.CONSISTENT)])
def test_thousands_of_probes_go_to_a_verified_host_only(own_random: bool, remote: Firewall) -> None:
    async def main() -> None:
        async with place(own_random) as (network, node, puncher):
            await puncher.analyse(reopen=False)
            probes = watch_probes(network)
            address = (PEER[0], 0 if remote == Firewall.RANDOM else PEER[1])
            puncher.update_remote(remote, (address,), True, None)
            assert not puncher.punch() and not probes
            puncher.update_remote(remote, (("5.78.0.1", 1), address), True, PEER[0])
            assert puncher.punch()
            await asyncio.sleep(2)
            assert {host for host, _ in probes} == {PEER[0]}
            assert 90 <= probes.total() <= module.BIRTHDAY_SOCKETS + 450
            assert len(node.endpoint.sockets) == 2 + (module.BIRTHDAY_SOCKETS if own_random else 1)

    run(main(), seed=1)


@pytest.mark.parametrize(("own_random", "remote"), [(True, Firewall.RANDOM), (False, Firewall.UNKNOWN)])
def test_there_is_no_way_for_some_pairs(own_random: bool, remote: Firewall) -> None:
    async def main() -> None:
        async with place(own_random) as (_, _, puncher):
            await puncher.analyse(reopen=False)
            puncher.update_remote(remote, (PEER,), True, PEER[0])
            assert not puncher.punch()
            assert puncher.closed is False

    run(main(), seed=1)


def test_a_puncher_makes_do_with_the_sockets_it_gets() -> None:
    async def main() -> None:
        async with place(True) as (network, node, puncher):
            await puncher.analyse(reopen=False)
            puncher.update_remote(Firewall.CONSISTENT, (PEER,), True, PEER[0])
            bind = Endpoint.bind

            async def few(self: Endpoint, host: str, port: int) -> Socket:
                if len(self.sockets) >= 22:
                    raise OSError(errno.EMFILE, "too many open files")
                return await bind(self, host, port)

            probes = watch_probes(network)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Endpoint, "bind", few)
                assert puncher.punch()
                await asyncio.sleep(3)
            assert len(node.endpoint.sockets) == 22
            assert probes[PEER] > 100

    run(main(), seed=1)


def test_without_a_fresh_socket_the_verdict_stands() -> None:
    async def main() -> None:
        async def none(_endpoint: Endpoint, _host: str, _port: int) -> Socket:
            raise OSError(errno.EMFILE, "too many open files")

        async with place(True) as (_, _, puncher):
            puncher.update_remote(Firewall.RANDOM, (PEER,), False, None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Endpoint, "bind", none)
                assert not await puncher.analyse(reopen=True)
            assert puncher.nat.firewall == Firewall.RANDOM
            assert puncher._reopening is not None and puncher._reopening.exception() is None  # nobody would see it

    run(main(), seed=1)


def test_the_socket_of_the_winning_way_lives_as_long_as_its_stream() -> None:
    async def main() -> None:
        async with place(True) as (_, node, puncher):
            await puncher.analyse(reopen=False)
            puncher.update_remote(Firewall.CONSISTENT, (PEER,), True, PEER[0])
            assert puncher.punch()
            await asyncio.sleep(0.5)
            stream = node.endpoint.streams.create()
            stream.connect(puncher.sockets[100], 7, PEER)
            puncher.hand_over(stream)
            await asyncio.sleep(0)
            assert len(node.endpoint.sockets) == 3 and not puncher.sockets[100].closed
            assert puncher.closed and not puncher.punching
            stream.destroy()
            await asyncio.sleep(60)
            assert puncher.sockets[100].closed

    run(main(), seed=1)


def test_random_punches_are_rare() -> None:
    throttle = PunchThrottle()
    for _ in range(PunchThrottle.LIMIT):
        assert throttle.allows(0.0)
        throttle.begin(0.0)
    assert not throttle.allows(1.0)
    for second in range(2, 2 + PunchThrottle.BURST - PunchThrottle.LIMIT):
        throttle.end()  # the next one may begin at once
        assert throttle.allows(second)
        throttle.begin(second)
    throttle.end()
    assert not throttle.allows(PunchThrottle.WINDOW - 0.1)
    assert throttle.allows(PunchThrottle.WINDOW)


def test_the_throttle_is_given_back_however_an_attempt_ends() -> None:
    async def main() -> None:
        async with place(True) as (_, node, puncher):
            await puncher.analyse(reopen=False)
            puncher.update_remote(Firewall.CONSISTENT, (PEER,), True, PEER[0])
            now = asyncio.get_running_loop().time()
            assert puncher.punch()
            puncher.close()
            puncher.close()
            assert node.context.throttle.allows(now)
            node.context.throttle.begin(now)
            assert node.context.throttle.allows(now)  # ended once, not twice: one of two is left
            node.context.throttle.begin(now)
            assert not node.context.throttle.allows(now)

    run(main(), seed=1)


def test_two_that_answer_probes_do_not_answer_each_other_for_ever() -> None:
    """A probe with a forged source makes each of them take the other's answer for a probe."""

    async def main() -> None:
        async with place() as (network, node, _):
            ends = [Puncher(node.node, node.rng, node.context.throttle, is_initiator=False) for _ in range(2)]
            for end in ends:
                await end.open()
            one, other = (end.socket for end in ends)
            probes = watch_probes(network)
            assert one.on_probe is not None
            one.on_probe(one, ("192.168.1.2", other.address[1]))
            await asyncio.sleep(20)
            assert 1 < probes.total() <= 2 * module.MAX_ANSWERS
            for end in ends:
                end.close()

    run(main(), seed=1)
