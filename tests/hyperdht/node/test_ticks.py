"""Ticks every five seconds, and what they tell of a host that slept."""

import asyncio

import pytest
from sim import SimLoop, run

from p2pclaude.hyperdht.node.ticks import SLEEP_SECONDS, TICK_SECONDS, Ticker


def test_ticks_come_every_five_seconds_until_they_are_stopped() -> None:
    async def main() -> None:
        times: list[float] = []
        loop = asyncio.get_running_loop()
        ticker = Ticker(lambda slept: times.append(loop.time()), lambda: 0.0)
        assert not ticker.is_running
        began = loop.time()
        ticker.start()
        assert ticker.is_running
        await asyncio.sleep(3 * TICK_SECONDS + 1)
        ticker.stop()
        assert not ticker.is_running
        await asyncio.sleep(20)
        assert [time - began for time in times] == pytest.approx([5.0, 10.0, 15.0])
        ticker.start()
        await asyncio.sleep(6)
        assert len(times) == 4
        ticker.stop()

    run(main())


@pytest.mark.parametrize(("sleep", "slept"), [(0.0, False), (9.9, False), (10.1, True)])
def test_a_gap_of_fifteen_seconds_is_sleep(sleep: float, slept: bool) -> None:
    async def main() -> None:
        seen: list[bool] = []
        total = 100.0
        ticker = Ticker(seen.append, lambda: total)
        ticker.start()
        await asyncio.sleep(6)
        total += sleep
        await asyncio.sleep(10)
        ticker.stop()
        assert seen == [False, slept, False]

    assert SLEEP_SECONDS == 15.0
    run(main())


def test_a_tick_that_fails_is_followed_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    ticks = 0

    def fail(slept: bool) -> None:
        nonlocal ticks
        ticks += 1
        raise RuntimeError("a bug")

    async def main() -> None:
        ticker = Ticker(fail, lambda: 0.0)
        ticker.start()
        await asyncio.sleep(11)
        ticker.stop()

    loop = SimLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert ticks == 2 and "a tick failed" in caplog.text
