"""Two operations at once on one session: retries of a spawn, a message or a reader beside a claude that ends."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.sessions import Place, prepare, read_results, run, wait_for_state

from p2pclaude.errors import NoSession, Unavailable
from p2pclaude.sessions import session as session_module
from p2pclaude.sessions.claude import ClaudeProcess
from p2pclaude.sessions.directory import InfoFile, delete_directory
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State
from p2pclaude.sessions.session import Session
from p2pclaude.sessions.table import SessionTable


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


async def spawn_thrice(table: SessionTable) -> list[Any]:
    """Spawn as a client does whose connection is lost twice while the first attempt is under way."""
    spawn = Spawn(session_id="s", text="once", message_id="m")
    return await asyncio.gather(*(table.spawn(spawn) for _ in range(3)), return_exceptions=True)


def test_retries_at_once_of_a_spawn_cut_short_by_a_crash_give_one_session(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s"))
        async with place.table() as table:
            found = await spawn_thrice(table)
            assert found == [(table.find("s"), 1)] * 3
            async with asyncio.timeout(20):
                await read_results(table, "s")
        assert place.messages() == ["once"]

    run(main())


def test_retries_at_once_of_a_spawn_whose_first_attempt_fails_give_one_session(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, attempts = ClaudeProcess.start, iter(range(9))

    async def fail_first(*args: Any, **options: Any) -> ClaudeProcess:
        if next(attempts) == 0:
            await asyncio.sleep(0.1)  # the others come
            raise Unavailable("no")
        return await start(*args, **options)

    monkeypatch.setattr(ClaudeProcess, "start", fail_first)

    async def main() -> None:
        async with place.table() as table:
            failed, *found = await spawn_thrice(table)
            assert isinstance(failed, Unavailable)
            assert found == [(table.find("s"), 1)] * 2
            async with asyncio.timeout(20):
                await read_results(table, "s")
        assert place.messages() == ["once"]

    run(main())


def test_a_message_beside_a_claude_that_ends_as_soon_as_it_is_resumed_is_not_left_in_a_dormant_session(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = InfoFile.save
    live: list[Session] = []

    async def end_in_between(file: InfoFile) -> None:
        session = next((session for session in live if session.file is file), None)
        if session is not None and session.state == State.IDLE and session._child is not None and next(endings, False):
            stdin = session._child.process._stdin()
            assert stdin is not None
            stdin.close()  # it ends with status 0
            while session.pid is not None:
                await asyncio.sleep(0.01)
        await save(file)

    endings: Iterator[bool] = iter(())
    monkeypatch.setattr(InfoFile, "save", end_in_between)

    async def main() -> None:
        nonlocal endings
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s", text="first"))
            await read_results(table, "s")
        async with place.table() as table:
            endings = iter([True] * 3)
            session = table.find("s")
            live.append(session)
            seq = await table.send("s", "second")
            async with asyncio.timeout(20):  # it runs, or the session says that it has failed
                while session.state is not State.FAILED and not session.inbox.is_done(seq):
                    await asyncio.sleep(0.01)

    run(main())


def test_a_session_with_an_accepted_message_is_not_idle(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, ready = os.fdatasync, threading.Event()

    def sync_slowly(descriptor: int) -> None:
        if place.log.events("message-accepted"):
            ready.wait(20)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync_slowly)

    async def main() -> None:
        changes: list[str] = []

        def note() -> None:
            changes.extend(session.state for session in found)

        found: list[Session] = []
        async with place.table(on_change=note) as table:
            session, _ = await table.spawn(Spawn(session_id="s"))
            found.append(session)
            sending = asyncio.create_task(table.send("s", "first"))
            try:
                while not session.inbox.handed:
                    await asyncio.sleep(0.01)
                assert session.state == State.RUNNING
                assert changes == [State.RUNNING] * len(changes) != []  # whoever waits for it hears of it
            finally:
                ready.set()
            await sending
            await read_results(table, "s")
            await wait_for_state(table, "s", State.IDLE)

    run(main())


def test_who_reads_a_session_whose_start_fails_does_not_bring_it_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete, deleting, reads = delete_directory, threading.Event(), threading.Event()

    def delete_slowly(path: Path, *, ignore_errors: bool = False) -> None:
        deleting.set()
        reads.wait(20)
        delete(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(session_module, "delete_directory", delete_slowly)
    monkeypatch.setattr(session_module, "SETTLE_SECONDS", 10.0)  # it is over as soon as the child is dead
    monkeypatch.setenv("FAKE_CLAUDE", "die")

    async def main() -> None:
        async with place.table() as table:
            spawning = asyncio.create_task(table.spawn(Spawn(session_id="s")))
            assert await asyncio.to_thread(deleting.wait, 20)
            session = table.find("s")
            reading = asyncio.create_task(table.read("s", after=0, limit=None, clear=False, wait_ms=0))
            await asyncio.sleep(0)
            reads.set()
            output = await reading
            with pytest.raises(Unavailable):
                await spawning
            assert (output.page.lines, output.state) == ([], None)
            assert session.journal is None  # and no file is left open
            assert list(place.sessions.iterdir()) == []

    run(main())


def test_no_message_is_accepted_by_a_session_whose_start_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SETTLE_SECONDS", 10.0)
    monkeypatch.setenv("FAKE_CLAUDE", "die")

    async def main() -> None:
        async with place.table() as table:
            spawning = asyncio.create_task(table.spawn(Spawn(session_id="s")))
            while "s" not in table._sessions or table.find("s").journal is None:
                await asyncio.sleep(0)
            with pytest.raises(NoSession):
                await table.send("s", "x")
            with pytest.raises(Unavailable):
                await spawning

    run(main())
