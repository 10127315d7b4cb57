"""The simulator itself: virtual time, the guards of `run`, hosts, links, replay. NATs are in `test_nat.py`."""

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from itertools import product
from typing import TypeAlias

import pytest

from sim import Dependence, Host, Link, PortChoice, SimLoop, SimNetwork, SimulationError, run
from sim.inbox import Inbox

Address: TypeAlias = tuple[str, int]


# Time


def test_hours_pass_in_milliseconds_and_in_order() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        ticks: list[float] = []
        for _ in range(48):
            await asyncio.sleep(1800)
            ticks.append(loop.time())
        return ticks

    assert run(main(), time_limit=100_000, cpu_limit=5.0) == [1800.0 * i for i in range(1, 49)]


def test_asyncio_timeouts_run_on_virtual_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        assert loop.time() == 30
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(100), 12.5)
        assert loop.time() == 42.5
        fired = loop.create_future()
        loop.call_at(100, fired.set_result, None)
        await fired
        assert loop.time() == 100

    run(main(), check_timers=True)


def test_timers_and_packets_interleave_in_time_order() -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        seen: list[str] = []
        loop.post(2.0, seen.append, "post 2")
        loop.call_later(1.0, seen.append, "timer 1")
        loop.post(0.5, seen.append, "post 0.5")
        loop.call_later(3.0, seen.append, "timer 3")
        await asyncio.sleep(4)
        return seen

    assert run(main()) == ["post 0.5", "timer 1", "post 2", "timer 3"]


def test_a_clock_jump_fires_everything_due_late() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        fired: list[float] = []
        for delay in (1.0, 2.0, 50.0):
            loop.call_later(delay, lambda: fired.append(loop.time()))
        loop.jump(10)
        await asyncio.sleep(0.5)
        assert fired == [10, 10]

    run(main())


# The guards of run


def test_deadlock_names_the_tasks_and_what_they_await() -> None:
    async def waits_for_nothing() -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimulationError, match=r"deadlock at 5\.000 s.*\n.*waits_for_nothing:\d+ > Event.wait:\d+"):
        run(_after(5, waits_for_nothing))


async def _after(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(seconds)
    await action()


def test_a_simulation_that_never_ends_is_stopped_by_virtual_and_by_real_time() -> None:
    async def idles() -> None:
        while True:
            await asyncio.sleep(1)

    async def spins() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(SimulationError, match="still running after 100 s"):
        run(idles(), time_limit=100)
    with pytest.raises(SimulationError, match="out of processor time"):
        run(spins(), cpu_limit=0.05)


def test_a_leaked_task_fails_and_a_finishing_one_does_not() -> None:
    async def leak(seconds: float) -> None:
        task = asyncio.create_task(asyncio.sleep(seconds), name="the leak")
        await asyncio.sleep(1)
        if seconds < 2:
            task.cancel()

    run(leak(0.5))
    with pytest.raises(SimulationError, match="still running at the end:\n  the leak"):
        run(leak(5))


def test_a_leaked_timer_fails_on_demand() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(10, print)

    run(main())
    with pytest.raises(SimulationError, match="timers still scheduled"):
        run(main(), check_timers=True)


def test_swallowed_exceptions_fail() -> None:
    def broken(_packets: object) -> None:
        raise ValueError("in a callback")

    async def in_callback() -> None:
        asyncio.get_running_loop().call_soon(broken, None)
        await asyncio.sleep(1)

    async def in_socket() -> None:
        host = SimNetwork().host("10.0.0.1")
        socket = await host.bind("0.0.0.0", 5000, broken)
        socket.send([b"x"], ("10.0.0.1", 5000))
        await asyncio.sleep(1)

    async def fails() -> None:
        raise ValueError("in a task")

    async def in_task() -> None:
        task = asyncio.create_task(fails())
        await asyncio.sleep(1)
        del task

    async def in_log() -> None:
        try:
            raise ValueError("caught")
        except ValueError:
            logging.getLogger("p2pclaude.test").exception("a handler failed")

    for main in (in_callback, in_socket, in_task, in_log):
        with pytest.raises(SimulationError, match="swallowed") as caught:
            run(main())
        assert isinstance(caught.value.__cause__, ValueError)


def test_threads_and_real_sockets_are_refused() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(SimulationError, match="thread"):
            await asyncio.to_thread(print)
        with pytest.raises(SimulationError, match="getaddrinfo"):
            await loop.getaddrinfo("localhost", 80)
        with pytest.raises(SimulationError, match="socket"):
            await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
        with pytest.raises(SimulationError, match="threads"):
            loop.call_soon_threadsafe(print)

    run(main())


def test_a_failure_prints_its_seed_and_cancels_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    cancelled: list[bool] = []

    async def other() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        task = asyncio.create_task(other())
        await asyncio.sleep(1)
        raise KeyError(task.get_name())

    with pytest.raises(KeyError) as caught:
        run(main(), seed=4711)
    assert cancelled == [True]
    assert "seed 4711 at 1.000000 s" in capsys.readouterr().out
    assert any("4711" in note for note in caught.value.__notes__)


# Hosts and sockets


def test_addresses_ports_and_errors_of_bind() -> None:
    async def main() -> None:
        net = SimNetwork(1)
        host = net.host("10.0.0.1", "10.0.0.2")
        assert net.host("10.0.0.2") is host
        assert host.interfaces() == ["127.0.0.1", "10.0.0.1", "10.0.0.2"]
        first = await Inbox.bind(host, 5000, "10.0.0.1")
        await Inbox.bind(host, 5000, "10.0.0.2")
        for address in ("0.0.0.0", "10.0.0.1"):
            with pytest.raises(OSError) as taken:
                await Inbox.bind(host, 5000, address)
            assert taken.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError) as elsewhere:
            await Inbox.bind(host, 0, "10.0.0.3")
        assert elsewhere.value.errno == errno.EADDRNOTAVAIL
        first.socket.close()
        first.socket.close()
        await Inbox.bind(host, 5000, "10.0.0.1")
        ports = {(await Inbox.bind(host)).port for _ in range(100)}
        assert len(ports) == 100

    run(main())


def test_names_resolve_and_unknown_ones_raise() -> None:
    async def main() -> None:
        net = SimNetwork()
        net.names["node1.example"] = "10.0.0.9"
        host = net.host("10.0.0.1")
        assert await host.resolve("node1.example") == "10.0.0.9"
        assert await host.resolve("10.0.0.8") == "10.0.0.8"
        with pytest.raises(OSError):
            await host.resolve("node2.example")

    run(main())


def test_source_address_and_delivery_of_a_host_with_two_addresses() -> None:
    async def main() -> None:
        net = SimNetwork()
        host, near, far = net.host("10.0.0.1", "172.16.0.1"), net.host("10.0.0.7"), net.host("172.16.9.9")
        inbox, at_near, at_far = await Inbox.bind(host, 7000), await Inbox.bind(near, 1), await Inbox.bind(far, 1)
        bound = await Inbox.bind(host, 7001, "172.16.0.1")
        inbox.socket.send([b"a"], ("10.0.0.7", 1))
        inbox.socket.send([b"b"], ("172.16.9.9", 1))
        bound.socket.send([b"c"], ("10.0.0.7", 1))
        at_near.socket.send([b"d"], ("172.16.0.1", 7000))
        at_near.socket.send([b"e"], ("10.0.0.1", 7001))
        await asyncio.sleep(1)
        assert at_near.sources == [("10.0.0.1", 7000), ("172.16.0.1", 7001)]
        assert at_far.sources == [("172.16.0.1", 7000)]
        assert inbox.data == [b"d"]
        assert bound.data == []
        assert net.stats["unbound"] == 1

    run(main())


def test_loopback_stays_in_the_host() -> None:
    async def main() -> None:
        net = SimNetwork(link=Link(loss=1.0))
        host, other = net.host("10.0.0.1"), net.host("10.0.0.2")
        local, everywhere, outside = (
            await Inbox.bind(host, 1, "127.0.0.1"),
            await Inbox.bind(host, 2),
            await Inbox.bind(other, 1),
        )
        host.up = False
        everywhere.socket.send([b"x"], ("127.0.0.1", 1))
        local.socket.send([b"y"], ("127.0.0.1", 2))
        everywhere.socket.send([b"z"], ("10.0.0.1", 2))
        local.socket.send([b"w"], ("10.0.0.2", 1))
        await asyncio.sleep(1)
        assert local.sources == [("127.0.0.1", 2)]
        assert everywhere.sources == [("127.0.0.1", 1), ("10.0.0.1", 2)]
        assert outside.data == []

    run(main())


def test_down_hosts_blocks_and_partitions() -> None:
    async def main() -> None:
        net = SimNetwork()
        a, b, c = net.host("10.0.0.1"), net.host("10.0.0.2"), net.host("10.0.0.3")
        inboxes = {host: await Inbox.bind(host, 9) for host in (a, b, c)}

        async def reached() -> str:
            for sender, inbox in inboxes.items():
                for receiver in inboxes:
                    if receiver is not sender:
                        inbox.socket.send([b"x"], (receiver.addresses[0], 9))
            taken = await asyncio.gather(*(inbox.take() for inbox in inboxes.values()))
            pairs = [(source[0][-1], i + 1) for i, got in enumerate(taken) for _, _, source in got]
            return " ".join(sorted(f"{source}{to}" for source, to in pairs))

        assert await reached() == "12 13 21 23 31 32"
        b.up = False
        assert await reached() == "13 31"
        b.up = True
        net.block(a, b)
        assert await reached() == "13 21 23 31 32"
        net.unblock(a, b)
        net.partition([a, b], [c])
        assert await reached() == "12 21"
        net.heal()
        assert await reached() == "12 13 21 23 31 32"
        net.intercept = lambda packet: packet.destination[0] == "10.0.0.3"
        assert await reached() == "12 21 31 32"

    run(main())


def test_a_partition_also_stops_what_is_under_way() -> None:
    async def main() -> None:
        net = SimNetwork(link=Link(latency=(0.1, 0.1)))
        a, b = net.host("10.0.0.1"), net.host("10.0.0.2")
        sender, receiver = await Inbox.bind(a), await Inbox.bind(b, 9)
        sender.socket.send([b"x"], ("10.0.0.2", 9))
        await asyncio.sleep(0.05)
        net.partition([a], [b])
        assert await receiver.take() == []
        assert net.stats["blocked"] == 1

    run(main())


def test_a_host_changes_its_address_and_its_network() -> None:
    async def main() -> None:
        net = SimNetwork()
        laptop, peer = net.host("10.0.0.1"), net.host("10.0.0.2")
        inbox, other = await Inbox.bind(laptop, 9), await Inbox.bind(peer, 9)
        laptop.set_addresses("10.0.0.5")
        other.socket.send([b"old"], ("10.0.0.1", 9))
        other.socket.send([b"new"], ("10.0.0.5", 9))
        inbox.socket.send([b"x"], ("10.0.0.2", 9))
        assert [data for _, data, _ in await inbox.take()] == [b"new"]
        assert other.sources == [("10.0.0.5", 9)]
        laptop.move(net.nat("203.0.113.1").lan, "192.168.1.2")
        inbox.socket.send([b"x"], ("10.0.0.2", 9))
        await asyncio.sleep(1)
        assert other.sources[1] == ("203.0.113.1", 9)
        assert laptop.interfaces() == ["127.0.0.1", "192.168.1.2"]

    run(main())


# Links


async def _pair(link: Link, seed: int = 1) -> tuple[SimNetwork, Inbox, Inbox]:
    net = SimNetwork(seed, link)
    return net, await Inbox.bind(net.host("10.0.0.1"), 1), await Inbox.bind(net.host("10.0.0.2"), 2)


def test_latency_is_kept_and_bursts_arrive_as_one_batch_in_order() -> None:
    async def main() -> None:
        _, sender, receiver = await _pair(Link(latency=(0.05, 0.05)))
        sent = [bytes([i]) for i in range(10)]
        sender.socket.send(sent, ("10.0.0.2", 2))
        await asyncio.sleep(1)
        assert receiver.data == sent
        assert receiver.batches == [10]
        assert {when for when, _, _ in receiver.packets} == {0.05}

    run(main())


def test_a_range_of_latencies_reorders_and_stays_in_the_range() -> None:
    async def main() -> None:
        _, sender, receiver = await _pair(Link(latency=(0.01, 0.05)))
        sent = [bytes([i]) for i in range(200)]
        sender.socket.send(sent, ("10.0.0.2", 2))
        await asyncio.sleep(1)
        assert sorted(receiver.data) == sent != receiver.data
        assert all(0.01 <= when <= 0.0501 for when, _, _ in receiver.packets)

    run(main())


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.3, 1.0])
def test_loss_and_duplication_have_their_rates(probability: float) -> None:
    async def main() -> None:
        count = 10_000
        losing, doubling = Link(loss=probability), Link(duplicate=probability)
        for link, expected in ((losing, 1 - probability), (doubling, 1 + probability)):
            _, sender, receiver = await _pair(link)
            sender.socket.send([b"x"] * count, ("10.0.0.2", 2))
            assert len(await receiver.take()) / count == pytest.approx(expected, abs=0.02)

    run(main())


def test_bandwidth_spaces_packets_and_its_queue_overflows() -> None:
    async def main() -> None:
        link = Link(latency=(0.0, 0.0), bandwidth=100_000, queue_bytes=50_000)
        net, sender, receiver = await _pair(link)
        sender.socket.send([bytes(972)] * 100, ("10.0.0.2", 2))  # 1000 bytes each on the wire
        taken = await receiver.take()
        assert len(taken) == 50
        assert net.stats["queue_full"] == 50
        assert [when for when, _, _ in taken] == pytest.approx([0.01 * i for i in range(1, 51)])
        sender.socket.send([bytes(972)], ("10.0.0.2", 2))
        assert len(await receiver.take()) == 1

    run(main())


def test_the_mtu_counts_headers() -> None:
    async def main() -> None:
        net, sender, receiver = await _pair(Link(mtu=1280))
        sender.socket.send([bytes(1252), bytes(1253)], ("10.0.0.2", 2))
        assert [len(data) for _, data, _ in await receiver.take()] == [1252]
        assert net.stats["too_big"] == 1

    run(main())


def test_paths_are_asymmetric_and_access_lines_add_up() -> None:
    async def main() -> None:
        net, a, b = await _pair(Link(latency=(0.02, 0.02)))
        first, second = net.host("10.0.0.1"), net.host("10.0.0.2")
        net.set_path(first, second, Link(latency=(0.2, 0.2)))
        first.uplink, first.downlink = Link(latency=(0.03, 0.03)), Link(latency=(0.01, 0.01))
        a.socket.send([b"x"], ("10.0.0.2", 2))
        b.socket.send([b"x"], ("10.0.0.1", 1))
        await asyncio.sleep(1)
        assert [when for when, _, _ in b.packets] == pytest.approx([0.23])
        assert [when for when, _, _ in a.packets] == pytest.approx([0.03])

    run(main())


# Replay and speed


async def _gossip(seed: int, hosts: int, rounds: int, link: Link) -> tuple[str, int]:
    """Let hosts, some behind NATs, answer packets so many times; return the trace's hash and the packets sent."""
    net = SimNetwork(seed, link, trace=True)
    kinds = list(product(Dependence, PortChoice))
    nats = [net.nat(f"203.0.113.{i + 1}", mapping=m, ports=p) for i, (m, p) in enumerate(kinds)]
    members = net.hosts(hosts) + [nat.host("192.168.1.2") for nat in nats]
    rng = net.random("gossip")
    targets = [(host.addresses[0], 1) for host in members[:hosts]]

    async def join(host: Host) -> None:
        def receive(batch: list[tuple[list[bytes], Address]]) -> None:
            for data, source in ((data, source) for datagrams, source in batch for data in datagrams):
                if data[0]:
                    socket.send([bytes([data[0] - 1]) + rng.randbytes(20)], rng.choice([source, rng.choice(targets)]))

        socket = await host.bind("0.0.0.0", 1, receive)
        socket.send([bytes([rounds])] * 3, rng.choice(targets))

    for host in members:
        await join(host)
    await asyncio.sleep(rounds)
    return net.trace_digest(), net.stats["sent"]


def test_a_seed_replays_exactly_and_another_does_not() -> None:
    def bad() -> Link:
        return Link(latency=(0.01, 0.08), loss=0.1, duplicate=0.05)

    first, second, other = (run(_gossip(seed, 20, 10, bad()), seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    assert first[1] > 500


def test_two_hundred_hosts_send_a_hundred_thousand_packets_in_seconds() -> None:
    started = time.process_time()
    _, sent = run(_gossip(1, 200, 180, Link(latency=(0.01, 0.08))), seed=1)
    assert sent > 100_000
    assert time.process_time() - started < 20
