"""Old sessions are deleted: only ended ones, only when they are old, and not when the clock jumps."""

import asyncio
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from kit.sessions import Place, outputs, prepare, read_all, read_results, run
from sim.loop import SimLoop

from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.retention import DAY_SECONDS, FIRST_SECONDS, Retention, steady
from p2pclaude.sessions.table import SessionTable

NOW = 1_800_000_000.0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


def ended_at(place: Place, name: str, moment: float) -> None:
    """Let a session have ended at another time."""
    path = place.sessions / name / "session.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended_at": int(moment * 1000)}))


def test_only_ended_sessions_that_are_old_enough_go(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            for name in ("old", "young", "dormant"):
                await table.spawn(Spawn(session_id=name, text="x"))
                await read_results(table, name)
            for name in ("old", "young"):
                await table.stop(name)
        for name, days in (("old", 3.1), ("young", 2.9), ("dormant", 99)):
            ended_at(place, name, NOW - days * DAY_SECONDS)
        async with place.table() as table:
            await Retention(table, 3, place.log, clock=lambda: NOW).remove_old()
            left = {session["sessionId"] for session in table.listing(everything=True)}
            assert left == {path.name for path in place.sessions.iterdir()} == {"young", "dormant"}
            await table.spawn(Spawn(session_id="old", text="x"))  # the id is free again
            await read_results(table, "old")
        assert [line["session"] for line in place.log.events("session-removed")] == ["old"]

    run(main())


def test_what_cannot_be_deleted_is_said_and_stays(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s", text="x"))
            await read_results(table, "s")
            await table.stop("s")
        ended_at(place, "s", NOW - 9 * DAY_SECONDS)
        (place.sessions / "s").rename(place.path / "elsewhere")
        (place.sessions / "s").symlink_to(place.path / "elsewhere")  # which is not followed
        async with place.table() as table:
            await Retention(table, 3, place.log, clock=lambda: NOW).remove_old()
            assert [session["sessionId"] for session in table.listing(everything=True)] == ["s"]
            assert outputs(await read_all(table, "s"), "result")
        assert place.log.events("session-removed") == []
        (warning,) = place.log.events("warning")
        assert warning["message"].startswith("a session cannot be deleted: cannot call rmtree on a symbolic link")

    run(main())


@pytest.mark.parametrize("stays", ["journal.jsonl", "journal.index", "lock", "session.json"])
def test_what_is_deleted_in_part_has_ended_and_is_deleted_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, stays: str
) -> None:
    """As a crash leaves it, too: it came back as a damaged session that nothing deletes."""
    unlink = os.unlink

    def refuse(path: Any, **more: Any) -> None:
        if Path(path).name == stays:
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, **more)

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s", text="x"))
            await read_results(table, "s")
            await table.stop("s")
            with monkeypatch.context() as patch:
                patch.setattr(os, "unlink", refuse)
                with pytest.raises(OSError, match="Input/output"):
                    await table.remove("s")
        async with place.table() as table:
            assert [one["state"] for one in table.listing(everything=True)] == ["ended"]
            assert await table.remove("s")
        assert list(place.sessions.iterdir()) == []

    run(main())


def test_a_session_of_an_older_version_ended_when_its_file_was_written(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s", text="x"))
            await table.stop("s")
        path = place.sessions / "s" / "session.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "ended_at"}))
        async with place.table() as table:
            written = path.stat().st_mtime
            assert table.ended_before(written - 5) == []
            assert table.ended_before(written + 5) == ["s"]

    run(main())


class Table(SessionTable):
    """Counts the looks, has no sessions."""

    def __init__(self) -> None:
        self.looks: list[float] = []

    def ended_before(self, moment: float) -> list[str]:
        """Note what was asked."""
        self.looks.append(moment)
        return []


def in_virtual_time(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=lambda: SimLoop(time_limit=30 * DAY_SECONDS)) as runner:
        runner.run(body())


def retain(place: Place, table: Table, clock: Callable[[], float], steady: Callable[[], float]) -> "asyncio.Task[None]":
    return asyncio.create_task(Retention(table, 10, place.log, clock=clock, steady=steady).run())


def test_it_looks_after_an_hour_and_daily_but_not_after_a_jump(place: Place) -> None:
    async def main() -> None:
        loop, table, jump = asyncio.get_running_loop(), Table(), 0.0
        began = loop.time()
        running = retain(place, table, lambda: NOW + loop.time() + jump, loop.time)
        await asyncio.sleep(FIRST_SECONDS - 1)
        assert table.looks == []
        await asyncio.sleep(2.5 * DAY_SECONDS)
        assert [round((look - NOW - began) / DAY_SECONDS) for look in table.looks] == [-10, -9, -8]
        jump = 400 * DAY_SECONDS  # somebody set the clock
        await asyncio.sleep(DAY_SECONDS)
        assert len(table.looks) == 3
        assert place.log.events("warning")[0]["message"].startswith("the clock jumped")
        await asyncio.sleep(DAY_SECONDS)
        assert len(table.looks) == 4  # it has been that late for a whole day by now
        running.cancel()

    in_virtual_time(main)


def test_a_machine_that_sleeps_every_night_has_no_clock_that_jumps(place: Place) -> None:
    """The event loop's time stands still meanwhile: a laptop would never delete anything."""

    async def main() -> None:
        loop, table, slept = asyncio.get_running_loop(), Table(), 0.0
        began = loop.time()
        running = retain(place, table, lambda: NOW + loop.time() + slept, lambda: loop.time() + slept)
        for _ in range(4):
            await asyncio.sleep(DAY_SECONDS / 3)
            slept += DAY_SECONDS * 2 / 3
        days = [(look - NOW - began) / DAY_SECONDS + 10 for look in table.looks]
        assert [round(day) for day in days] == [0, 1, 2, 3]
        assert place.log.events("warning") == []
        running.cancel()

    in_virtual_time(main)


def test_the_clock_that_cannot_be_set_goes_on_while_the_machine_sleeps() -> None:
    if sys.platform == "linux":
        assert time.clock_gettime(time.CLOCK_BOOTTIME) - steady() < 1
    before = time.monotonic()
    assert steady() >= before - 1


@pytest.mark.parametrize("wrong", [-20_000 * DAY_SECONDS, 20_000 * DAY_SECONDS])
def test_a_machine_that_does_not_know_the_time_at_its_start_deletes_nothing(place: Place, wrong: float) -> None:
    async def main() -> None:
        loop, table = asyncio.get_running_loop(), Table()
        jump = wrong
        running = retain(place, table, lambda: NOW + loop.time() + jump, loop.time)
        await asyncio.sleep(60)
        jump = 0.0  # the network told it
        await asyncio.sleep(DAY_SECONDS)
        assert table.looks == []
        await asyncio.sleep(DAY_SECONDS)
        assert len(table.looks) == 1
        running.cancel()

    in_virtual_time(main)


def test_what_ended_while_the_clock_was_back_is_as_young_as_the_youngest_session(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with place.table() as table:
            for name in ("s", "other"):
                await table.spawn(Spawn(session_id=name, text="x"))
                await read_results(table, name)
            began = table.find("other").info.created_at / 1000
            with monkeypatch.context() as patch:
                patch.setattr(time, "time_ns", lambda: 0)  # 1970, as a machine without a battery has it
                await table.stop("s")
        async with place.table() as table:
            assert table.ended_before(began) == []
            assert table.ended_before(began + 1) == ["s"]

    run(main())
