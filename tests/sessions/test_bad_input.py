"""Clocks that jump, and files of another daemon: each has a clear state, and nothing is lost."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.asking import LS, Caller, on_table
from kit.sessions import Place, outputs, prepare, read_all, read_results, read_until, run, wait_for_state

from p2pclaude.errors import DataError, Refused
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State

YEAR = 365 * 86_400.0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give a way to set the system's clock, by so many seconds from now."""
    read, ahead = time.time, 0.0

    def set_by(seconds: float) -> None:
        nonlocal ahead
        ahead = seconds

    monkeypatch.setattr(time, "time", lambda: read() + ahead)
    monkeypatch.setattr(time, "time_ns", lambda: int((read() + ahead) * 1e9))
    return set_by


@pytest.mark.parametrize("jump", [-60 * YEAR, 60 * YEAR])
def test_a_journal_goes_by_numbers_and_not_by_the_clock(
    place: Place, set_clock: Callable[[float], None], jump: float
) -> None:
    """Before 1970 or far ahead: the stamps say what the clock said, and the order is that of the numbers."""

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s", text="one", message_id="m"))
            await read_results(table, "s")
            set_clock(jump)
            await table.send("s", "two")
            await read_results(table, "s", after=4)
            await table.spawn(Spawn(session_id="t", text="one"))
            await read_results(table, "t")
        set_clock(0)
        async with place.table() as table:
            assert [s["state"] for s in table.listing(everything=True)] == ["dormant"] * 2
            assert await table.send("s", "one", "m") == 1  # known by its id, whenever it was
            await table.send("s", "three")
            await read_results(table, "s", after=8)
            envelopes = await read_all(table, "s")
            await table.spawn(Spawn(session_id="a", text="one"))
            assert [s["sessionId"] for s in table.listing(everything=True)] == ["s", "t", "a"]
        assert [e["seq"] for e in envelopes] == list(range(1, 13))
        assert [data["result"] for data in outputs(envelopes, "result")] == ["echo: one", "echo: two", "echo: three"]
        now = time.time() * 1000
        assert all(abs(e["timestamp"] - now) < 60_000 for e in envelopes[:4] + envelopes[8:])
        assert all(abs(e["timestamp"] - now - jump * 1000) < 60_000 for e in envelopes[4:8])

    run(main())


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
def test_waiting_takes_its_time_whatever_the_clock_says(
    place: Place, set_clock: Callable[[float], None], jump: float
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with place.table() as table:
            call = Caller(table)
            await table.spawn(Spawn(session_id="s", text="x"))
            last = (await read_results(table, "s"))[-1]["seq"]
            await wait_for_state(table, "s", State.IDLE)
            version = (await call("list-permissions"))["version"]
            began = loop.time()
            loop.call_later(0.2, set_clock, jump)
            output, permissions = await asyncio.gather(
                table.read("s", after=last, limit=None, clear=False, wait_ms=600),
                call("list-permissions", version=version, waitMs=600),
            )
            assert (output.page.lines, permissions["version"]) == ([], version)
            assert 0.55 < loop.time() - began < 40

    run(main())


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
def test_a_request_waits_for_its_answer_whatever_the_clock_says(
    place: Place, set_clock: Callable[[float], None], jump: float
) -> None:
    async def work(call: Caller) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await call.spawn(LS)
        await read_until(call.table, "s", lambda e: bool(e["type"] == "permission-request"))
        set_clock(jump)
        envelopes = await read_results(call.table, "s")
        assert [e["by"] for e in envelopes if e["type"] == "permission-answer"] == ["timeout"]
        assert 0.5 < loop.time() - began < 40

    on_table(place, work, ask_timeout=0.5)


def leave_a_session(place: Place, name: str = "s", **changes: Any) -> Path:
    """Let a daemon have had a session with one turn, of four envelopes, and change what its session.json says."""

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id=name, text="first", message_id="m1"))
            await read_results(table, name)

    run(main())
    path = place.sessions / name
    info = json.loads((path / "session.json").read_text())
    (path / "session.json").write_text(json.dumps(info | changes))
    return path


@pytest.fixture
def other(tmp_path: Path) -> Place:
    """Give another daemon's place."""
    path = tmp_path / "other"
    path.mkdir()
    return Place(path)


def test_a_session_of_another_daemon_goes_on_here(place: Place, other: Place) -> None:
    """Also one that ran there, with all that lies in its directory."""
    directory = leave_a_session(other, state="running", directory=str(place.root))
    shutil.copytree(directory, place.sessions / "s")

    async def main() -> None:
        async with place.table(root_dir=place.root) as table:
            assert table.listing(everything=True)[0]["state"] == "dormant"
            assert len(await read_all(table, "s")) == 4
            assert await table.send("s", "first", "m1") == 1
            await table.send("s", "second")
            assert len(outputs(await read_results(table, "s", 2), "result")) == 2

    run(main())
    assert place.messages() == ["first", "second"]


def test_a_session_of_another_daemon_does_not_leave_the_root_directory(place: Place, other: Place) -> None:
    shutil.copytree(leave_a_session(other), place.sessions / "s")

    async def main() -> None:
        async with place.table(root_dir=place.root) as table:
            with pytest.raises(Refused, match="outside the root directory"):
                await table.send("s", "second")
            assert table.listing(everything=True)[0]["state"] == "dormant"
            assert len(await read_all(table, "s")) == 4

    run(main())


def test_a_session_under_the_name_of_another_can_be_read_alone(place: Place) -> None:
    shutil.copytree(leave_a_session(place), place.sessions / "copy")
    before = (place.sessions / "copy" / "session.json").read_bytes()

    async def main() -> None:
        async with place.table() as table:
            states = {s["sessionId"]: s["state"] for s in table.listing(everything=True)}
            assert states == {"s": "dormant", "copy": "failed"}
            assert len(await read_all(table, "copy")) == 4
            with pytest.raises(DataError, match="belongs to another session"):
                await table.send("copy", "second")
            with pytest.raises(Refused, match="taken"):
                await table.spawn(Spawn(session_id="copy", text="x"))
            await table.send("s", "second")
            await read_results(table, "s", 2)
            await table.stop("copy")

    run(main())
    assert (place.sessions / "copy" / "session.json").read_bytes() == before
    assert [line["session"] for line in place.log.events("warning")] == ["copy"]


def test_a_journal_and_an_index_of_two_sessions(place: Place) -> None:
    """An index says nothing that the journal does not bear out."""

    async def main() -> None:
        async with place.table() as table:
            for name, texts in (("s", ["one"]), ("t", ["a longer one", "another"])):
                await table.spawn(Spawn(session_id=name))
                for count, text in enumerate(texts, 1):
                    await table.send(name, text)
                    await read_results(table, name, count)
        shutil.copy(place.sessions / "t" / "journal.index", place.sessions / "s" / "journal.index")
        async with place.table() as table:
            envelopes = await read_all(table, "s")
            assert [e["seq"] for e in envelopes] == [1, 2, 3, 4]
            assert outputs(envelopes, "result")[0]["result"] == "echo: one"

    run(main())


def test_what_is_no_session_is_left_alone(place: Place) -> None:
    """Files and directories of anybody else; those that look like a session are named in the log."""
    leave_a_session(place)
    for name in ("notes", ".git", "-x", "a b", "empty"):
        (place.sessions / name).mkdir()
    (place.sessions / "notes" / "README").write_text("not ours")
    (place.sessions / "file").write_text("not ours")
    (place.sessions / "loop").symlink_to(place.sessions / "loop")
    (place.sessions / "odd").mkdir()
    (place.sessions / "odd" / "session.json").mkdir()
    before = sorted(place.sessions.rglob("*"))

    async def main() -> None:
        async with place.table() as table:
            assert [s["sessionId"] for s in table.listing(everything=True)] == ["s"]
            with pytest.raises(Refused, match="taken"):
                await table.spawn(Spawn(session_id="odd", text="x"))

    run(main())
    assert sorted(place.sessions.rglob("*")) == before
    assert {line["session"] for line in place.log.events("warning")} == {"empty", "notes", "odd"}
