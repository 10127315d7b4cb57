"""The DHT node on simulated networks: joining, firewalls, persistence, sleep, suspension, the end."""

import asyncio
import random
from functools import partial
from typing import Any

import pytest
from kit.dht_nodes import PORT, Peer, address_of, dht, make_node, running
from sim import Link, SimLoop, SimNetwork, run

from p2pclaude.hyperdht import HyperDHT
from p2pclaude.hyperdht.constants import InternalCommand
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import Destroyed, Suspended
from p2pclaude.hyperdht.node.reachability import STABLE_TICKS
from p2pclaude.hyperdht.node.ticks import TICK_SECONDS, host_sleep
from p2pclaude.hyperdht.rpc.messages import Response, encode_response, node_id
from p2pclaude.hyperdht.rpc.requests import IncomingRequest

TWENTY_MINUTES = STABLE_TICKS * TICK_SECONDS


def now() -> float:
    return asyncio.get_running_loop().time()


# Joining


def test_start_returns_at_once_and_a_network_of_one_is_ready() -> None:
    async def main() -> None:
        node = make_node(SimNetwork().host("8.8.8.8"), ephemeral=False, firewalled=False, host="8.8.8.8")
        async with running(node):
            assert now() == 0
            await node.bootstrapped.wait()
            assert now() == 0
            assert node.id == node_id(("8.8.8.8", PORT)) and not node.ephemeral
            assert node.remote_address() == ("8.8.8.8", PORT)

    run(main(), check_timers=True)


@pytest.mark.parametrize("place", ["localhost", "::1", "", "10.1", "10.0.0.256"])
def test_names_are_no_addresses_to_bind_or_to_be_reached_at(place: str) -> None:
    choices: list[dict[str, Any]] = [{"host": place}, {"public_address": (place, 1)}]
    for options in choices:
        with pytest.raises(ValueError, match="IPv4"):
            HyperDHT(**options)


def test_without_a_reachable_bootstrap_node_it_is_bootstrapped_in_bounded_time() -> None:
    async def main() -> None:
        node = make_node(SimNetwork().host("8.8.8.8"), bootstrap=["9.9.9.9:1", "no.such.name:2"])
        async with running(node):
            await asyncio.wait_for(node.bootstrapped.wait(), 20)
            assert len(node.table) == 0 and node.host is None and node.remote_address() is None

    run(main(), check_timers=True)


def test_it_joins_later_when_the_network_comes_later() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 8) as nodes:
            host = net.host("8.8.8.8")
            host.up = False
            forced = make_node(host, bootstrap=[address_of(nodes[0])], ephemeral=False)
            async with running(forced):
                await forced.bootstrapped.wait()
                assert forced.ephemeral and not len(forced.table)
                host.up = True
                await asyncio.sleep(60)
                assert len(forced.table) == 8 and not forced.ephemeral
                assert forced.remote_address() == ("8.8.8.8", PORT)

    run(main())


@pytest.mark.parametrize("taken", [[], [PORT], list(range(PORT, PORT + 5))])
def test_the_port_is_the_wanted_one_or_one_of_the_next_or_any(taken: list[int]) -> None:
    async def main() -> None:
        host = SimNetwork().host("8.8.8.8")
        sockets = [await host.bind("0.0.0.0", port, lambda batch: None) for port in taken]
        node = make_node(host)
        async with running(node):
            assert node.server_socket is not None and node.client_socket is not None
            port = node.server_socket.address[1]
            assert port == PORT + len(taken) if len(taken) < 5 else port > 0
            assert node.client_socket.address[1] != port
            assert node.socket is node.client_socket  # until it is known to be open
        strict = make_node(host, any_port=False)
        if taken:
            with pytest.raises(OSError):
                await strict.start()
        for socket in sockets:
            socket.close()
        assert not host.sockets

    run(main(), check_timers=True)


# Firewalls


def test_an_open_node_learns_that_it_is_open_and_stays_ephemeral() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 8) as nodes:
            node = make_node(net.host("8.8.8.8"), bootstrap=[address_of(nodes[0])])
            async with running(node):
                await node.bootstrapped.wait()
                assert not node.firewalled and node.ephemeral
                assert node.remote_address() == ("8.8.8.8", PORT)
                assert node.socket is node.server_socket
                assert all(node_id(("8.8.8.8", PORT)) not in other.table for other in nodes)

    run(main())


def test_in_the_smallest_network_it_is_known_when_the_walk_ends() -> None:
    async def main() -> None:
        net = SimNetwork(link=Link(latency=(0.1, 0.1)))
        async with dht(net, 1) as [first]:
            node = make_node(net.host("8.8.8.8"), bootstrap=[address_of(first)])
            async with running(node):
                await node.bootstrapped.wait()
                assert now() < 1.5 and node.remote_address() == ("8.8.8.8", PORT)

    run(main())


def test_the_hosts_own_account_of_its_sleep() -> None:
    slept = host_sleep()
    assert slept > -0.001 and host_sleep() - slept < 1


@pytest.mark.parametrize("ephemeral", [None, False])
def test_a_node_behind_a_nat_stays_firewalled_and_ephemeral(ephemeral: bool | None) -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 8) as nodes:
            nat = net.nat("203.0.113.7")
            node = make_node(nat.host("192.168.1.2"), bootstrap=[address_of(nodes[0])], ephemeral=ephemeral)
            async with running(node):
                await node.bootstrapped.wait()
                await asyncio.sleep(TWENTY_MINUTES + 60)
                assert node.firewalled and node.ephemeral and node.remote_address() is None
                assert node.host == "203.0.113.7" and node.port > 0  # the NAT keeps the port

    run(main())


def test_an_adaptive_node_becomes_persistent_after_twenty_quiet_minutes() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 12) as nodes:
            node = make_node(net.host("8.8.8.8"), bootstrap=[address_of(nodes[0])])
            became: list[float] = []
            node.events.persistent.append(lambda: became.append(now()))
            start = now()
            async with running(node):
                await asyncio.sleep(TWENTY_MINUTES - 60)
                assert node.ephemeral
                await asyncio.sleep(120)
                assert node.id == node.table.id == node_id(("8.8.8.8", PORT))
                assert became == [pytest.approx(start + TWENTY_MINUTES, abs=10)]
                await asyncio.sleep(60)
                assert sum(node.id in other.table for other in nodes) >= 10

    run(main())


def test_a_node_that_shall_be_ephemeral_stays_so() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 8) as nodes:
            node = make_node(net.host("8.8.8.8"), bootstrap=[address_of(nodes[0])], ephemeral=True)
            async with running(node):
                await asyncio.sleep(2 * TWENTY_MINUTES)
                assert node.ephemeral and not node.firewalled

    run(main())


def test_an_answer_on_the_wrong_socket_proves_nothing() -> None:
    async def main() -> None:
        net = SimNetwork()
        peers = [await Peer(host, seed).start() for seed, host in enumerate(net.hosts(6))]

        def lie(peer: Peer, request: IncomingRequest, external: bool) -> None:
            # To where the question came from, PING_NAT's too, while telling of the server socket's port.
            closer = tuple(other.address for other in peers)
            message = Response(request.tid, ("8.8.8.8", PORT), node_id(peer.address), closer_nodes=closer)
            peer.rpc.own.send_datagram(peer.rpc.own.socket, encode_response(message), request.source)

        for peer in peers:
            peer.rpc.on_request = partial(lie, peer)
        node = make_node(net.host("8.8.8.8"), bootstrap=[peers[0].address])
        async with running(node):
            await asyncio.sleep(TWENTY_MINUTES + 60)
            assert len(node.table) == 6 and node.host == "8.8.8.8"
            assert node.firewalled and node.ephemeral

    run(main())


def test_a_node_that_moves_behind_a_nat_notices() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 8) as nodes:
            host = net.host("8.8.8.8")
            node = make_node(host, bootstrap=[address_of(nodes[0])])
            changes: list[str] = []
            node.events.network_change.append(lambda: changes.append("network"))
            node.events.ephemeral.append(lambda: changes.append("ephemeral"))
            async with running(node):
                await asyncio.sleep(TWENTY_MINUTES + 60)
                assert not node.ephemeral and not node.firewalled
                nat = net.nat("203.0.113.7")
                host.move(nat.lan, "192.168.1.2")
                await asyncio.sleep(60)
                assert node.firewalled and node.ephemeral and node.remote_address() is None
                assert node.host == "203.0.113.7"
                assert sorted(changes) == ["ephemeral", "network"]
                host.move(net.internet, "8.8.4.4")
                await asyncio.sleep(60)
                assert node.remote_address() == ("8.8.4.4", PORT) and node.ephemeral

    run(main())


# Upkeep


def test_dead_nodes_leave_the_tables() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 12) as nodes:
            gone = nodes[5]
            gone_id = gone.id
            assert gone_id is not None and sum(gone_id in node.table for node in nodes) >= 8
            await gone.destroy()
            await asyncio.sleep(600)
            assert not any(gone_id in node.table for node in nodes if node is not gone)

    run(main())


def test_while_everything_is_silent_nobody_is_forgotten() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 12) as nodes:
            updates: list[bool] = []
            node = nodes[3]
            node.events.network_update.append(lambda: updates.append(node.online))
            await asyncio.sleep(60)
            host = net.host(node.endpoint.network.interfaces()[-1])
            host.up = False
            for _ in range(30):  # traffic, so that the silence is noticed
                node.find_node(bytes(32)).start()
                await asyncio.sleep(5)
            assert not node.online and updates == [False]
            remembered = len(node.table)
            assert remembered > 0
            await asyncio.sleep(300)
            assert len(node.table) == remembered
            host.up = True
            node.find_node(bytes(32)).start()
            await asyncio.sleep(300)
            assert node.online and updates == [False, True] and len(node.table) == 11

    run(main())


def test_a_full_row_lets_a_newcomer_in_only_for_a_silent_node() -> None:
    async def main() -> None:
        net = SimNetwork()
        node = make_node(net.host("8.8.8.8"))
        async with running(node):
            await node.bootstrapped.wait()
            rng = random.Random(4)
            top = node.table.id[0] & 0x80
            peers: list[Peer] = []
            while len(peers) < 22:  # all in the row of those that differ in the first bit
                address = f"7.{rng.randrange(256)}.0.{rng.randrange(1, 255)}"
                if node_id((address, PORT))[0] & 0x80 != top:
                    peer = await Peer(net.host(address)).start()
                    peer.rpc.own.identity = node_id(peer.address)
                    peer.rpc.on_request = lambda request, external: request.reply(None)
                    peers.append(peer)
            for peer in peers[:20]:
                await node.ping(peer.address)
            assert len(node.table) == 20
            await asyncio.sleep(TICK_SECONDS)
            await node.ping(peers[20].address)
            await asyncio.sleep(TICK_SECONDS)
            assert node_id(peers[20].address) not in node.table  # everybody answers
            silent = node.table.oldest(1)[0]
            net.host(silent.host).up = False
            await asyncio.sleep(TICK_SECONDS)
            for _ in range(3):
                await node.ping(peers[21].address)
                await asyncio.sleep(TICK_SECONDS)
            assert silent.id not in node.table and node_id(peers[21].address) in node.table

    run(main())


def test_requests_do_not_teach_us_our_address() -> None:
    async def main() -> None:
        net = SimNetwork()
        node = make_node(net.host("8.8.8.8"), firewalled=False)
        async with running(node):
            peer = await Peer(net.host("7.7.7.7")).start()
            peer.rpc.own.identity = node_id(peer.address)
            await peer.rpc.request(("8.8.8.8", PORT), InternalCommand.PING, internal=True)
            assert len(node.table) == 1 and node.remote_address() is None
            peer.rpc.on_request = lambda request, external: request.reply(None)
            await node.ping(peer.address)
            assert (node.host, node.port) == ("8.8.8.8", PORT)

    run(main())


# Sleep, suspension, the end


def test_waking_up_is_noticed_and_the_table_is_looked_through() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 12) as nodes:
            node = make_node(net.host("8.8.8.8"), bootstrap=[address_of(nodes[0])])
            async with running(node):
                await asyncio.sleep(TWENTY_MINUTES + 60)
                assert not node.ephemeral
                woken: list[float] = []
                node.events.wakeup.append(lambda: woken.append(now()))
                loop = asyncio.get_running_loop()
                assert isinstance(loop, SimLoop)
                asked = node.rpc.stats.requests
                loop.jump(3600)
                await asyncio.sleep(20)
                assert len(woken) == 1 and node.ephemeral
                assert node.rpc.stats.requests > asked + 5
                assert not node.firewalled and node.remote_address() == ("8.8.8.8", PORT)

    run(main())


def test_a_sleep_that_the_loops_clock_did_not_see_is_noticed_too() -> None:
    async def main() -> None:
        clock = [1000.0]
        node = make_node(SimNetwork().host("8.8.8.8"), slept=lambda: clock[0])
        async with running(node):
            woken: list[float] = []
            node.events.wakeup.append(lambda: woken.append(now()))
            await asyncio.sleep(12)
            clock[0] += 60
            await asyncio.sleep(12)
            assert woken == [15]

    run(main())


def test_suspension_fails_what_is_under_way_and_resuming_takes_the_same_ports() -> None:
    async def main() -> None:
        net = SimNetwork()
        async with dht(net, 8) as nodes:
            host = net.host("8.8.8.8")
            node = make_node(host, bootstrap=[address_of(nodes[0])])
            async with running(node):
                await node.bootstrapped.wait()
                ports = sorted(port for _, port in host.sockets)
                pending = [asyncio.create_task(node.ping(("9.9.9.9", 9))) for _ in range(200)]
                await asyncio.sleep(0)
                await node.suspend()
                outcomes = await asyncio.gather(*pending, return_exceptions=True)
                assert all(isinstance(outcome, Suspended) for outcome in outcomes)
                assert not host.sockets
                with pytest.raises(Suspended):
                    await node.ping(address_of(nodes[0]))
                node.refresh()
                await node.suspend()
                await asyncio.sleep(3600)
                await node.resume()
                await node.resume()
                assert sorted(port for _, port in host.sockets) == ports
                await node.ping(address_of(nodes[0]))
                await asyncio.sleep(30)
                assert node.remote_address() == ("8.8.8.8", PORT) and len(node.table) == 8

    run(main(), check_timers=False)


def test_suspended_while_bootstrapping_it_bootstraps_after_resuming() -> None:
    async def main() -> None:
        net = SimNetwork(link=Link(latency=(0.2, 0.2)))
        async with dht(net, 8) as nodes:
            node = make_node(net.host("8.8.8.8"), bootstrap=[address_of(nodes[0])])
            async with running(node):
                await asyncio.sleep(0.3)
                await node.suspend()
                assert not node.bootstrapped.is_set()
                await node.resume()
                await asyncio.wait_for(node.bootstrapped.wait(), 20)
                assert len(node.table) == 8

    run(main())


def test_the_end_settles_everything_and_leaves_nothing() -> None:
    async def main() -> None:
        net = SimNetwork()
        host = net.host("8.8.8.8")
        node = make_node(host, bootstrap=["9.9.9.9:1", "slow.name:1"])
        await node.start()
        pending = [asyncio.create_task(node.ping(("9.9.9.9", 9))) for _ in range(200)]
        query = node.find_node(bytes(32))
        walking = asyncio.create_task(query.finished())
        await asyncio.sleep(0.1)
        await node.destroy()
        await node.destroy()
        outcomes = await asyncio.gather(*pending, walking, return_exceptions=True)
        assert all(isinstance(outcome, Destroyed) for outcome in outcomes)
        assert node.bootstrapped.is_set()  # who waits for it learns from the next request
        assert not host.sockets
        for action in (node.suspend, node.resume):
            await action()
        node.refresh()
        with pytest.raises(Destroyed):
            await node.ping(("9.9.9.9", 9))

    run(main(), check_timers=True)


def test_nobody_waits_for_a_node_whose_end_was_cut_short() -> None:
    async def main() -> None:
        host = SimNetwork().host("8.8.8.8")
        node = make_node(host, bootstrap=["9.9.9.9:1"])
        await node.start()
        waiting = asyncio.create_task(node.bootstrapped.wait())
        await asyncio.sleep(0.1)
        ending = asyncio.create_task(node.destroy())
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.wait([ending])
        assert ending.cancelled() and not host.sockets
        await asyncio.wait_for(waiting, 1)

    run(main(), check_timers=True)


@pytest.mark.parametrize("action", ["destroy", "suspend"])
def test_no_name_is_looked_up_behind_the_end(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query that waited for the name asks for fallbacks when the lookup is given up."""

    async def main() -> None:
        host = SimNetwork().host("8.8.8.8")
        asked: list[str] = []

        async def resolve(name: str) -> str:
            asked.append(name)
            await asyncio.Event().wait()
            return ""

        monkeypatch.setattr(host, "resolve", resolve)
        node = make_node(host, bootstrap=["slow.name:1"])
        await node.start()
        await asyncio.sleep(0.1)
        assert asked == ["slow.name"]
        await getattr(node, action)()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await node.destroy()

    run(main(), check_timers=True)


def test_a_listener_that_fails_does_not_stop_the_node(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        node = make_node(SimNetwork().host("8.8.8.8"), ephemeral=False, firewalled=False, host="8.8.8.8")
        called: list[Address] = []

        def fail() -> None:
            raise RuntimeError("a bug")

        node.events.persistent += [fail, lambda: called.append(("8.8.8.8", 1))]
        node._watch_interfaces = fail  # type: ignore[method-assign]
        await node.start()
        await asyncio.sleep(12)
        assert called and node._ticker.is_running and "a tick failed" in caplog.text
        await node.destroy()

    loop = SimLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
