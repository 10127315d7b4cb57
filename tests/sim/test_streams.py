"""Encrypted connections (secret stream over UDX) on bad networks: every byte kept, ends told right, faults survived.

P2PCLAUDE_SEEDS=200 runs so many seeds of each case instead of the few that every run affords.
"""

import asyncio
import itertools
from random import Random

import pytest
from kit.sim_peers import End, connect_ends, receive_all, seeds, send_random

from p2pclaude.hyperdht.constants import PacketType
from p2pclaude.hyperdht.errors import ConnectionClosed
from sim import Link, Packet, SimNetwork, run

SIZE = 150_000


async def _exchange(left: End, right: End, rng: Random, size: int = SIZE) -> None:
    """Send `size` bytes both ways at once and compare their hashes."""
    sent_left, sent_right, got_right, got_left = await asyncio.gather(
        send_random(left.connection, size, Random(rng.random())),
        send_random(right.connection, size, Random(rng.random())),
        receive_all(right.connection, size),
        receive_all(left.connection, size),
    )
    assert (got_right, got_left) == (sent_left, sent_right)


async def _end(*ends: End) -> None:
    """End both sides; each must see the other's end, and no error."""
    for end in ends:
        await end.connection.write_eof()
    for end in ends:
        assert await end.connection.read() == b""
        await end.connection.wait_closed()
        assert await end.connection.read() == b""  # raises when the connection broke instead of ending


def _close(*ends: End) -> None:
    for end in ends:
        end.endpoint.close()


def _is_udx(packet: Packet, kind: PacketType) -> bool:
    return packet.data[:2] == b"\xff\x01" and bool(packet.data[2] & kind)


# Every byte


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.05, 0.2, 0.3])
@pytest.mark.parametrize("seed", seeds(20))
def test_every_byte_arrives_whatever_is_lost_doubled_or_reordered(seed: int, loss: float) -> None:
    async def main() -> None:
        net = SimNetwork(seed, Link(latency=(0.01, 0.04), loss=loss, duplicate=0.02))
        left, right = await connect_ends(net)
        async with asyncio.timeout(600):
            await _exchange(left, right, net.random("data"))
            await _end(left, right)
        _close(left, right)

    run(main(), seed=seed)


def test_closing_does_not_wait_for_what_nobody_reads() -> None:
    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.01), hops=8))
        left, right = await connect_ends(net)

        async def flood() -> None:
            with pytest.raises(ConnectionClosed):
                while True:
                    await left.connection.write(bytes(100_000))
                    await asyncio.sleep(0.001)

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(2)  # the reader's buffers and the window are full
        closing = asyncio.create_task(right.connection.close())
        await asyncio.sleep(0.5)
        left.connection._end()
        flooding.cancel()
        started = asyncio.get_running_loop().time()
        await closing
        assert asyncio.get_running_loop().time() - started < 0.5
        assert right.connection._reason is None
        _close(left, right)

    run(main(), seed=1)


def test_one_side_may_go_on_writing_after_the_other_has_ended() -> None:
    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.04), loss=0.05))
        left, right = await connect_ends(net)
        await left.connection.write(b"question")
        await left.connection.write_eof()
        assert await right.connection.read() == b"question"
        assert await right.connection.read() == b""
        await asyncio.sleep(30)
        sent, got = await asyncio.gather(
            send_random(right.connection, SIZE, net.random("data")), receive_all(left.connection, SIZE)
        )
        assert sent == got
        await _end(right, left)
        _close(left, right)

    run(main(), seed=1)


def test_a_reader_that_sleeps_stops_the_writer_and_then_gets_everything() -> None:
    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.02), loss=0.02))
        left, right = await connect_ends(net)
        data = net.random("data").randbytes(16 << 20)
        written = 0

        async def write() -> None:
            nonlocal written
            for start in range(0, len(data), 65536):
                await left.connection.write(data[start : start + 65536])
                written = start + 65536

        writer = asyncio.create_task(write())
        await asyncio.sleep(60)
        waiting = written
        assert waiting < 8 << 20  # the receiver's window, and what each side keeps in its buffers
        await asyncio.sleep(60)
        assert written == waiting
        received = bytearray()
        while len(received) < len(data):
            received += await right.connection.read()
        assert received == data
        await writer
        await _end(left, right)
        _close(left, right)

    run(main(), seed=1)


@pytest.mark.parametrize("mtu", [1228, 1280, 1380, 1500])
def test_paths_of_any_mtu_carry_bulk_data(mtu: int) -> None:
    """The path swallows what is too large, so probing beyond it must not cost data."""

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.01), loss=0.01, mtu=mtu))
        left, right = await connect_ends(net)
        async with asyncio.timeout(20):
            await _exchange(left, right, net.random("data"), 500_000)
        _close(left, right)

    run(main(), seed=1)


# Speed


@pytest.mark.parametrize("mtu", [1300, 1000])
def test_a_path_that_becomes_narrow_for_good_carries_what_had_left_before(mtu: int) -> None:
    """As when a VPN is switched on: packets with a number cannot be cut anew, so routers may fragment them."""

    async def main() -> None:
        link = Link(latency=(0.01, 0.01), bandwidth=2e6)
        net = SimNetwork(1, link)
        left, right = await connect_ends(net)
        async with asyncio.timeout(60):
            await _exchange(left, right, net.random("before"), 500_000)
            exchanging = asyncio.create_task(_exchange(left, right, net.random("data"), 2_000_000))
            await asyncio.sleep(0.3)
            assert left.stream.core.mtu == right.stream.core.mtu == 1500
            link.mtu = mtu
            await exchanging
            assert left.stream.core.mtu <= mtu
            assert right.stream.core.mtu <= mtu
            await _end(left, right)
        _close(left, right)

    run(main(), seed=1)


def test_a_narrow_link_with_a_short_queue_is_used_well() -> None:
    async def main() -> float:
        net = SimNetwork(1)
        net.internet.link = Link(latency=(0.02, 0.02), bandwidth=1_000_000, queue_bytes=60_000)
        left, right = await connect_ends(net)
        loop = asyncio.get_running_loop()
        started = loop.time()
        sent, got = await asyncio.gather(
            send_random(left.connection, 8_000_000, net.random("data")), receive_all(right.connection, 8_000_000)
        )
        assert sent == got
        _close(left, right)
        return 8_000_000 / (loop.time() - started)

    assert run(main(), seed=1) > 700_000


def test_a_three_megabyte_line_passes_a_lossy_path_in_seconds() -> None:
    async def main() -> float:
        net = SimNetwork(1, Link(latency=(0.02, 0.03), loss=0.02))
        left, right = await connect_ends(net)
        loop = asyncio.get_running_loop()
        started = loop.time()
        sent, got = await asyncio.gather(
            send_random(left.connection, 3_000_000, net.random("data")), receive_all(right.connection, 3_000_000)
        )
        assert sent == got
        _close(left, right)
        return loop.time() - started

    assert run(main(), seed=1) < 10


# Ends


def test_closing_delivers_what_was_written_however_slow_the_path_is() -> None:
    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.02, 0.02), bandwidth=50_000, queue_bytes=20_000))
        left, right = await connect_ends(net)
        data = net.random("data").randbytes(900_000)
        received = bytearray()

        async def write_and_close() -> None:
            await left.connection.write(data)
            await left.connection.close()

        async def read() -> None:
            while part := await right.connection.read():
                received.extend(part)
            await right.connection.close()

        await asyncio.gather(write_and_close(), read())
        assert received == data
        _close(left, right)

    run(main(), seed=1)


def test_clean_ends_are_never_taken_for_a_loss() -> None:
    async def one(net: SimNetwork, number: int) -> None:
        left, right = await connect_ends(net, f"{number} ")
        await left.connection.write(b"x" * 2000)
        assert await receive_all(right.connection, 2000)
        await asyncio.gather(_end(left, right), left.connection.close(60), right.connection.close(60))
        await asyncio.sleep(30)  # tombstones answer what still comes
        _close(left, right)

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.05), loss=0.1, duplicate=0.02))
        await asyncio.gather(*(one(net, number) for number in range(len(seeds(150)))))

    run(main(), seed=1)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_broken_off_connection_is_seen_within_two_seconds(lost: int) -> None:
    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.02, 0.02)))
        left, right = await connect_ends(net)
        await _exchange(left, right, net.random("data"), 5000)
        left_to_lose = lost

        def intercept(packet: Packet) -> bool:
            nonlocal left_to_lose
            if _is_udx(packet, PacketType.DESTROY) and left_to_lose:
                left_to_lose -= 1
                return True
            return False

        net.intercept = intercept
        left.connection.abort()
        async with asyncio.timeout(2):
            with pytest.raises(ConnectionClosed, match="broke"):
                await right.connection.read()
        assert left_to_lose == 0
        _close(left, right)

    run(main(), seed=1)


def test_a_vanished_peer_is_noticed_although_nobody_writes() -> None:
    async def main() -> float:
        net = SimNetwork(1)
        left, right = await connect_ends(net)
        await _exchange(left, right, net.random("data"), 5000)
        await asyncio.sleep(60)
        right.host.up = False
        gone = asyncio.get_running_loop().time()
        with pytest.raises(ConnectionClosed, match="answer"):
            await left.connection.read()
        noticed = asyncio.get_running_loop().time() - gone
        _close(left, right)
        return noticed

    assert 10 < run(main(), seed=1) <= 20


# Faults


@pytest.mark.parametrize("writing", [False, True])
@pytest.mark.parametrize("seed", seeds(5))
def test_an_outage_of_ten_seconds_kills_nothing(seed: int, writing: bool) -> None:
    async def main() -> None:
        net = SimNetwork(seed, Link(latency=(0.02, 0.03), loss=0.02))
        left, right = await connect_ends(net)
        await _exchange(left, right, net.random("before"), 5000)
        await asyncio.sleep(net.random("moment").uniform(1, 9))
        exchange = asyncio.create_task(_exchange(left, right, net.random("data"))) if writing else None
        await asyncio.sleep(0.05)
        net.partition([left.host], [right.host])
        await asyncio.sleep(10)
        net.heal()
        async with asyncio.timeout(15):
            await (exchange or _exchange(left, right, net.random("data")))
        await _end(left, right)
        _close(left, right)

    run(main(), seed=seed)


@pytest.mark.parametrize("seed", seeds(8))
def test_a_path_that_changes_all_the_time_costs_no_byte(seed: int) -> None:
    """Loss, latency and bandwidth change every few seconds, with outages of up to three between."""

    async def disturb(net: SimNetwork, rng: Random, left: End, right: End) -> None:
        for _ in range(20):
            shortest = rng.choice([0.005, 0.05, 0.3])
            net.internet.link = Link(
                latency=(shortest, shortest * rng.choice([1, 3])),
                loss=rng.choice([0, 0, 0.05, 0.3]),
                duplicate=rng.choice([0, 0.1]),
                bandwidth=rng.choice([None, 200_000, 2_000_000]),
            )
            await asyncio.sleep(rng.uniform(0.5, 4))
            if rng.random() < 0.3:
                net.partition([left.host], [right.host])
                await asyncio.sleep(rng.uniform(0.1, 3))
                net.heal()
        net.internet.link = Link()

    async def main() -> None:
        net = SimNetwork(seed)
        rng = net.random("changes")
        left, right = await connect_ends(net)
        disturbing = asyncio.create_task(disturb(net, rng, left, right))
        async with asyncio.timeout(300):
            while not disturbing.done():
                await _exchange(left, right, rng, rng.choice([100, 10_000, 1_000_000]))
                await asyncio.sleep(rng.choice([0, 0, 0.5, 7]))
            await _end(left, right)
        _close(left, right)

    run(main(), seed=seed)


def test_an_outage_is_not_taken_for_a_long_round_trip() -> None:
    """The probe that fills a hole after the outage acknowledges much that was sent once, long ago."""

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.02, 0.02)))
        left, right = await connect_ends(net)
        await _exchange(left, right, net.random("before"), 500_000)
        await asyncio.sleep(0.5)
        out_of_order = itertools.count()

        def lose(packet: Packet) -> bool:
            if packet.origin is right.host:
                return True  # no acknowledgement comes through
            return _is_udx(packet, PacketType.DATA) and next(out_of_order) == 0

        net.intercept = lose
        await left.connection.write(bytes(60_000))
        await asyncio.sleep(0.1)
        net.partition([left.host], [right.host])
        await asyncio.sleep(4)  # less than a keep-alive, whose answer would give a true sample
        net.heal()
        net.intercept = None
        assert await receive_all(right.connection, 60_000)
        await asyncio.sleep(1)
        assert left.connection.rtt is not None
        assert left.connection.rtt < 0.2
        _close(left, right)

    run(main(), seed=1)


def test_garbage_and_strangers_packets_change_nothing() -> None:
    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.02)))
        left, right = await connect_ends(net)
        rng = net.random("garbage")
        stranger = await net.host("5.1.0.3").bind("0.0.0.0", 0, lambda _batch: None)

        async def flood() -> None:
            for _ in range(2000):
                stream_id = rng.choice([right.stream.id, rng.getrandbits(32)]).to_bytes(4, "little")
                head = b"\xff\x01" + bytes([rng.choice([0, 8, 32, rng.getrandbits(8) & ~17]), rng.getrandbits(8)])
                stranger.send([head + stream_id + rng.randbytes(rng.randrange(40))], right.address)
                stranger.send([rng.randbytes(rng.randrange(60))], right.address)
                await asyncio.sleep(0.001)

        flooding = asyncio.create_task(flood())
        async with asyncio.timeout(60):
            await _exchange(left, right, net.random("data"), 500_000)
            await flooding
        await _end(left, right)
        _close(left, right)

    run(main(), seed=1)


def test_unordered_messages_go_both_ways_and_the_newest_are_kept() -> None:
    """What does not decrypt is none, and costs the stream nothing."""

    async def main() -> None:
        left, right = await connect_ends(SimNetwork(1))
        await asyncio.gather(left.connection.wait_opened(), right.connection.wait_opened())
        for one, other in ((left, right), (right, left)):
            one.connection.send_message(b"hello")
            one.stream.send_message(b"")
            one.stream.send_message(b"not sealed by anybody who knows the key")
            await asyncio.sleep(1)
            assert [other.connection.receive_message() for _ in range(2)] == [b"hello", None]
            for number in range(300):
                one.connection.send_message(b"%d" % number)
                await asyncio.sleep(0.01)
            await asyncio.sleep(1)
            kept = list(iter(other.connection.receive_message, None))
            assert sorted(kept, key=int) == [b"%d" % number for number in range(44, 300)]
        left.connection.abort()
        await asyncio.sleep(1)
        with pytest.raises(ConnectionClosed):
            left.connection.send_message(b"late")

    run(main(), seed=1)


def test_frames_keep_their_borders() -> None:
    async def main() -> None:
        left, right = await connect_ends(SimNetwork(1))
        sizes = [1, 70_000, 3, 1_000_000, 20]
        sending = asyncio.create_task(_write_frames(left, sizes))
        assert [len(await right.connection.read_frame()) for _ in sizes] == sizes
        await sending
        assert await right.connection.read_frame() == b""
        right.connection.abort()

    run(main(), seed=1)


async def _write_frames(end: End, sizes: list[int]) -> None:
    for size in sizes:
        await end.connection.write_frame(bytes(size))
    await end.connection.write_eof()
