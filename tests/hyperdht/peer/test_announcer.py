"""A server stays findable: after moves of its mapping and address, failed announcements, dead relays, for hours."""

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from bench.reachability import live
from kit.sim_dht import BOOTSTRAP, Swarm, ask, echo, eventually, serve, swarm
from kit.sim_peers import seeds
from sim import Host, Nat, run

from p2pclaude.hyperdht.constants import Command
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import Destroyed, HyperDHTError, Suspended
from p2pclaude.hyperdht.peer import announcer
from p2pclaude.hyperdht.peer.announcer import Announcer
from p2pclaude.hyperdht.peer.server import Server


async def behind_nat(network: Swarm, number: int) -> tuple[Nat, Host, HyperDHT]:
    """Start a node behind a cone NAT."""
    nat = network.net.nat(f"5.8.0.{number}")
    host = nat.host(f"192.168.{number}.2")
    node = await network.join(host)
    await asyncio.sleep(5)
    return nat, host, node


def announcer_of(server: Server) -> Announcer:
    assert server._announcer is not None
    return server._announcer


async def opens(client: HyperDHT, key: bytes, timeout: float = 3.0) -> bool:
    """Tell whether a connection comes about and carries bytes."""
    try:
        async with await client.connect(key, timeout=timeout) as connection:
            return await ask(connection, b"ping") == b"ping"
    except HyperDHTError:
        return False


async def seconds_until(check: Callable[[], bool], limit: float) -> float:
    """Return how long it takes until `check()` is true."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not check():
        assert loop.time() - started < limit, f"not within {limit} s"
        await asyncio.sleep(0.05)
    return loop.time() - started


def holders(network: Swarm, server: Server) -> int:
    """Return how many nodes have stored the announcement."""
    now, target = asyncio.get_running_loop().time(), blake2b(server.public_key)
    return sum(other.router.get(target, now) is not None for other in network.nodes)


def forget(network: Swarm, server: Server) -> None:
    """Let all nodes forget the announcement, as time does."""
    for other in network.nodes:
        other.router.remove(blake2b(server.public_key))


@pytest.mark.parametrize("delay", [0, 0.05, 0.12, 0.13, 0.15])
def test_a_server_closed_while_it_begins_to_listen_is_announced_no_more(delay: float) -> None:
    """In the end the nodes near its key have stored it, and their answers are under way."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            _, _, node = await behind_nat(network, 1)
            server = node.create_server(echo)
            listening = asyncio.create_task(server.listen(node.key_pair))
            await asyncio.sleep(delay)
            assert not listening.done()
            await server.close()
            await listening
            await asyncio.sleep(60)
            assert announcer_of(server).relays == ()
            assert holders(network, server) == 0

    run(main(), seed=1)


def test_nobody_listens_on_a_node_that_is_not_there() -> None:
    """Or two tasks would announce after `resume`, of which `close` ends one; and one for ever after `destroy`."""

    async def main() -> None:
        async with swarm(1, 4) as network:
            _, _, node = await behind_nat(network, 1)
            server = node.create_server(echo)
            await node.suspend()
            with pytest.raises(Suspended):
                await server.listen()
            await node.resume()
            await server.listen()  # nothing stayed of the first try
            await server.close()
            with pytest.raises(RuntimeError, match="closed"):
                await server.listen()
            other = node.create_server(echo)
            await node.destroy()
            with pytest.raises(Destroyed):
                await other.listen()

    run(main(), seed=1)


@pytest.mark.parametrize("end", ["suspend", "destroy"])
def test_who_is_cancelled_while_the_node_ends_leaves_no_task_that_announces(end: str) -> None:
    """So early that no server has heard of it yet."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            _, _, node = await behind_nat(network, 1)
            server = await serve(node, node.key_pair)
            ending = asyncio.create_task(node.suspend() if end == "suspend" else node.destroy())
            await asyncio.sleep(0)
            ending.cancel()
            await asyncio.wait([ending])
            if end == "suspend":
                await node.resume()
                await server.close()
            await asyncio.sleep(announcer.CYCLE_TIMEOUT)
            assert not [task for task in asyncio.all_tasks() if "Announcer" in repr(task.get_coro())]
            await node.destroy()

    run(main(), seed=1)


def test_a_resume_that_is_cancelled_has_announced_all_the_same() -> None:
    """The node is awake, and another `resume` does nothing."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            _, _, node = await behind_nat(network, 1)
            server = await serve(node, node.key_pair)
            await node.suspend()
            assert holders(network, server) == 0
            resuming = asyncio.create_task(node.resume())
            await asyncio.sleep(0)
            resuming.cancel()
            await asyncio.wait([resuming])
            await node.resume()
            await asyncio.sleep(5)
            assert holders(network, server) == 3

    run(main(), seed=1)


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("address", [None, "5.8.0.77"])
def test_a_moved_mapping_costs_ten_seconds_at_most(seed: int, address: str | None) -> None:
    async def main() -> float:
        async with swarm(seed, 12) as network:
            nat, _, node = await behind_nat(network, 1)
            _, _, client = await behind_nat(network, 2)
            server = await serve(node, node.key_pair)
            assert await opens(client, server.public_key)
            await asyncio.sleep(network.net.rng.uniform(0, 20))
            loop = asyncio.get_running_loop()
            nat.rebind(address)
            moved = loop.time()
            assert await eventually(lambda: opens(client, server.public_key), 10, 0.1)
            return loop.time() - moved

    assert run(main(), seed=seed) <= 10


@pytest.mark.parametrize("seed", seeds(3))
def test_a_second_move_right_after_the_first_costs_no_more(seed: int) -> None:
    async def main() -> None:
        async with swarm(seed, 12) as network:
            nat, _, node = await behind_nat(network, 1)
            _, _, client = await behind_nat(network, 2)
            server = await serve(node, node.key_pair)
            for _ in range(announcer.MAX_DRIFTS):
                nat.rebind()
                assert await eventually(lambda: opens(client, server.public_key), 10, 0.1)

    run(main(), seed=seed)


@pytest.mark.parametrize("seed", seeds(3))
def test_a_changed_address_is_announced_within_five_seconds(seed: int) -> None:
    """The laptop changes networks; what counts is that the relays forward to the new place."""

    async def main() -> float:
        async with swarm(seed, 12) as network:
            _, host, node = await behind_nat(network, 1)
            server = await serve(node, node.key_pair)
            new = network.net.nat("5.8.0.99")
            await asyncio.sleep(network.net.rng.uniform(0, 10))
            host.move(new.lan, "192.168.9.2")

            def is_announced() -> bool:
                relays = announcer_of(server).relays
                return len(relays) >= 2 and all(path.peer_address[0] == "5.8.0.99" for path in relays)

            return await seconds_until(is_announced, 30)

    assert run(main(), seed=seed) <= 5


def test_failed_announcements_are_tried_again_with_growing_pauses() -> None:
    async def main() -> None:
        async with swarm(1, 12) as network:
            nat, host, node = await behind_nat(network, 1)
            del nat
            cycles: list[float] = []
            cycle = Announcer._cycle

            async def count(self: Announcer) -> bool:
                cycles.append(asyncio.get_running_loop().time())
                return await cycle(self)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Announcer, "_cycle", count)
                host.up = False
                server = await serve(node, node.key_pair)
                await asyncio.sleep(300)
                assert server.relay_addresses == ()
                pauses = [after - before for before, after in pairwise(cycles)]
                assert 6 <= len(cycles) <= 40, pauses
                assert pauses[0] < 15 and max(pauses) <= announcer.LAST_RETRY + announcer.CYCLE_TIMEOUT
                host.up = True
                back = asyncio.get_running_loop().time()
                await seconds_until(lambda: len(server.relay_addresses) > 0, announcer.LAST_RETRY + 5)
                assert asyncio.get_running_loop().time() - back <= announcer.LAST_RETRY + 5

    run(main(), seed=1)


@pytest.mark.parametrize("offline", ["from the start", "later"])
def test_an_open_server_is_announced_soon_after_its_network_is_back(offline: str) -> None:
    """That it needs no relay does not mean that anybody finds it."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            host, address = network.net.host("5.7.7.7"), ("5.7.7.7", 49737)
            node = HyperDHT(
                bootstrap=[BOOTSTRAP], public_address=address, network=host, rng=network.net.random("open node")
            )
            network.joined.append(node)
            host.up = offline == "later"
            await node.start()
            server = await serve(node, node.key_pair)
            assert holders(network, server) == (3 if host.up else 0)
            host.up = False
            await asyncio.sleep(announcer.FORGOTTEN_AFTER + 50)
            forget(network, server)
            host.up = True
            await seconds_until(lambda: holders(network, server) == 3, announcer.LAST_RETRY + 5)

    run(main(), seed=1)


def test_after_a_sleep_the_announcement_is_made_anew() -> None:
    """The nodes that stored it are there and see us where we were, but it has grown too old meanwhile."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            _, _, node = await behind_nat(network, 1)
            slept = 0.0
            node.node._ticker.slept = lambda: slept
            server = await serve(node, node.key_pair)
            await asyncio.sleep(10)
            forget(network, server)
            slept = 3600.0
            await seconds_until(lambda: holders(network, server) == 3, 10)

    run(main(), seed=1)


def test_after_resume_it_is_announced_once() -> None:
    async def main() -> None:
        async with swarm(1, 12) as network:
            _, _, node = await behind_nat(network, 1)
            server = await serve(node, node.key_pair)
            await node.suspend()
            cycles, cycle = 0, Announcer._cycle

            async def count(self: Announcer) -> bool:
                nonlocal cycles
                cycles += 1
                return await cycle(self)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Announcer, "_cycle", count)
                await node.resume()
                await asyncio.sleep(announcer.PARTIAL_INTERVAL - 5)
            assert cycles == 1
            assert holders(network, server) == 3

    run(main(), seed=1)


def test_a_cycle_that_hangs_is_ended_by_the_watchdog() -> None:
    async def main() -> None:
        async with swarm(1, 12) as network:
            _, _, node = await behind_nat(network, 1)
            server = await serve(node, node.key_pair)
            hanging = 0

            async def hang(self: Announcer) -> bool:
                nonlocal hanging
                hanging += 1
                await asyncio.Event().wait()
                return True

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Announcer, "_cycle", hang)
                server.refresh()
                await asyncio.sleep(announcer.PING_INTERVAL + 2 * announcer.CYCLE_TIMEOUT + 5)
                assert hanging >= 2
            await asyncio.sleep(announcer.CYCLE_TIMEOUT + announcer.LAST_RETRY)
            cycle_relays = announcer_of(server).relays
            assert cycle_relays

    run(main(), seed=1)


def test_relays_survive_a_cycle_whose_answers_are_lost() -> None:
    """Nodes that did not answer the new announcement still hold the last one: clients may go on through them."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            _, host, node = await behind_nat(network, 1)
            _, _, client = await behind_nat(network, 2)
            server = await serve(node, node.key_pair)
            before = server.relay_addresses
            host.up = False
            server.refresh()
            await asyncio.sleep(30)
            host.up = True
            assert set(server.relay_addresses) <= set(before) and server.relay_addresses
            assert await opens(client, server.public_key)

    run(main(), seed=1)


def test_a_node_that_takes_no_announcement_holds_up_no_client_of_the_others() -> None:
    """They lead clients to the server from the first moment, which must be able to say where to punch a hole."""

    async def main() -> float:
        async with swarm(1, 12) as network:
            _, _, node = await behind_nat(network, 1)
            _, _, client = await behind_nat(network, 2)
            second = node.node.table.closest(blake2b(node.key_pair.public_key))[1].address
            silent = next(other for other in network.nodes if other.remote_address == second)
            handle = silent.node.on_request
            silent.node.on_request = lambda request: request.command == Command.ANNOUNCE or handle(request)
            server = node.create_server(echo)
            listening = asyncio.create_task(server.listen())
            await asyncio.sleep(0.5)
            assert not listening.done() and holders(network, server) == 2
            loop = asyncio.get_running_loop()
            started = loop.time()
            assert await opens(client, server.public_key, 20)
            taken = loop.time() - started
            await listening
            return taken

    assert run(main(), seed=1) < 2


@pytest.mark.parametrize("how", ["stop", "crash"])
def test_dead_relays_are_replaced(how: str) -> None:
    async def main() -> None:
        async with swarm(1, 20) as network:
            _, _, node = await behind_nat(network, 1)
            _, _, client = await behind_nat(network, 2)
            server = await serve(node, node.key_pair)
            before = set(server.relay_addresses)
            for relay in [n for n in network.nodes if n.remote_address in before][:2]:
                if how == "stop":
                    await relay.destroy()
                else:
                    network.net.host((relay.remote_address or ("", 0))[0]).up = False
            await seconds_until(
                lambda: len(set(server.relay_addresses) - before) >= 1 and len(server.relay_addresses) == 3, 40
            )
            assert await opens(client, server.public_key)

    run(main(), seed=1)


def test_a_daemon_is_reachable_for_hours_behind_a_nat_that_moves_every_hour() -> None:
    """`tests/bench/reachability.py --days 7` is the whole week."""
    life = run(live(2.2, 1), seed=1)
    assert life.share >= 0.999, life
    assert max(life.seconds) <= 15, life
