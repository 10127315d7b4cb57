"""Who is served next: one in some turns of the loop and so many a second, rare hosts first; the room stays bounded."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

from sim.loop import SimLoop

from p2pclaude.hyperdht.peer.turns import BETWEEN, BURST_SECONDS, MAX_WAITING, Turns

RATE = 100.0


def in_virtual_time(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a clock that jumps."""
    with asyncio.Runner(loop_factory=SimLoop) as runner:
        runner.run(body())


def test_the_loop_turns_between_two_of_them() -> None:
    async def main() -> None:
        turns = Turns(RATE, Counter())
        served: list[int] = []

        async def come(number: int) -> None:
            assert await turns.wait(f"10.0.0.{number}")
            served.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(come(number))
            counts = []
            for _ in range(6 * BETWEEN):
                await asyncio.sleep(0)
                counts.append(len(served))
        assert counts[-1] == 5 and max(b - a for a, b in pairwise(counts)) == 1
        assert counts.count(1) == counts.count(4) == BETWEEN
        assert served == [0, 1, 2, 3, 4]

    in_virtual_time(main)


def test_only_so_many_in_a_second() -> None:
    async def main() -> None:
        turns, loop = Turns(RATE, Counter()), asyncio.get_running_loop()
        for already in (0.0, 10.0):  # after a pause as well
            await asyncio.sleep(already)
            began = loop.time()
            await asyncio.gather(*(turns.wait(f"10.0.0.{number}") for number in range(100)))
            assert 0.98 * (1 - BURST_SECONDS) < loop.time() - began < 1.02 * (1 - BURST_SECONDS)

    in_virtual_time(main)


async def share_loop(handshake_ms: int, turn_ms: int) -> int:
    """Have a hundred handshakes in a loop that is busy; return the milliseconds spent on other work meanwhile."""
    turns, loop = Turns(RATE, Counter()), asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)

    async def shake_hands(number: int) -> None:
        assert await turns.wait(f"10.0.0.{number}")
        loop.jump(handshake_ms / 1000)

    handshakes = [asyncio.create_task(shake_hands(number)) for number in range(100)]
    others = 0
    while not all(handshake.done() for handshake in handshakes):
        loop.jump(turn_ms / 1000)
        others += turn_ms
        await asyncio.sleep(0)
    return others


def test_on_a_slow_processor_other_work_keeps_its_share() -> None:
    async def main() -> None:
        assert await share_loop(10, 10) > 0.95 * BETWEEN * 1000

    in_virtual_time(main)


def test_where_turns_are_long_nobody_waits_for_eight_of_them() -> None:
    """With hundreds of streams to serve in each, newcomers at a few a second would wait for ever longer."""

    async def main() -> None:
        assert await share_loop(1, 50) <= 205 * 50
        assert await share_loop(10, 50) > 0.95 * BETWEEN * 1000

    in_virtual_time(main)


def test_hosts_with_little_go_first() -> None:
    async def main() -> None:
        turns = Turns(RATE, Counter({"greedy": 3, "modest": 1}))
        served: list[str] = []

        async def come(host: str) -> None:
            assert await turns.wait(host)
            served.append(host)

        await asyncio.gather(*map(come, ["greedy", "modest", "new"]))
        assert served == ["new", "modest", "greedy"]

    in_virtual_time(main)


def test_a_full_room_sends_the_busiest_away() -> None:
    async def main() -> None:
        turns, loop = Turns(RATE, Counter()), asyncio.get_running_loop()
        flood = [asyncio.create_task(turns.wait("flood")) for _ in range(3 * MAX_WAITING)]
        await asyncio.sleep(0.01)
        first = MAX_WAITING - len(turns)
        assert RATE * BURST_SECONDS <= first <= RATE * BURST_SECONDS + 2
        flood += [asyncio.create_task(turns.wait("flood")) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        assert len(turns) == MAX_WAITING
        assert turns.has_room("rare") and not turns.has_room("flood")
        began = loop.time()
        assert await turns.wait("rare")
        assert loop.time() - began < 2 / RATE
        served = sum(await asyncio.gather(*flood))
        assert first - 1 <= served - MAX_WAITING <= first
        assert len(turns) == 0

    in_virtual_time(main)


def test_who_gives_up_costs_no_turn() -> None:
    async def main() -> None:
        turns, loop = Turns(1.0, Counter()), asyncio.get_running_loop()
        tasks = [asyncio.create_task(turns.wait(f"10.0.0.{number}")) for number in range(10)]
        await asyncio.sleep(0)
        for task in tasks[:9]:
            task.cancel()
        began = loop.time()
        assert await tasks[9]
        assert loop.time() - began < 2
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(turns) == 0

    in_virtual_time(main)
