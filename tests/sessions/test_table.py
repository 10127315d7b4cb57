"""Sessions against a child that behaves like claude: spawning, refusing, queueing, reading, stopping, coming back."""

import asyncio
import json
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit.sessions import Place, outputs, prepare, read_all, read_results, read_until, run, wait_for_state

from p2pclaude.errors import DataError, NoSession, P2PClaudeError, Refused, TryAgain, Unavailable
from p2pclaude.sessions import session as session_module
from p2pclaude.sessions import table as table_module
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State
from p2pclaude.sessions.session import Session
from p2pclaude.sessions.table import SessionTable


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


def spawn(**fields: Any) -> Spawn:
    return Spawn(**{"session_id": "s"} | fields)


def test_a_message_makes_a_turn(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, seq = await table.spawn(spawn(text="hällo", message_id="m1", model="opus"))
            envelopes = await read_results(table, "s")
            assert seq == 1
            assert [e["seq"] for e in envelopes] == [1, 2, 3, 4]
            assert [e["type"] for e in envelopes] == ["message", "turn", "session-output", "session-output"]
            assert envelopes[0]["messageId"] == "m1"
            assert envelopes[1]["message"] == 1
            assert envelopes[3]["data"]["result"] == "echo: hällo"
            await wait_for_state(table, "s", State.IDLE)
            (listed,) = table.listing()
            assert listed["pid"] == session.pid == place.told()[0]["pid"]
            assert (listed["directory"], listed["model"], listed["lastSeq"]) == (str(place.root), "opus", 4)

    run(main())


def test_what_claude_is_started_with(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            of_ours = str(uuid.uuid4())
            await table.spawn(Spawn(session_id=of_ours, text="x"))
            await table.spawn(Spawn(session_id="not-a-uuid", text="x", permission_mode="plan", model="--help"))
            await read_results(table, of_ours)
            await read_results(table, "not-a-uuid")

    run(main())
    starts = [entry for entry in place.told() if "argv" in entry]
    first, second = sorted(starts, key=lambda entry: "plan" in entry["argv"])
    assert first["argv"][:4] == ["--output-format", "stream-json", "--input-format", "stream-json"]
    assert first["argv"][4:7] == ["--verbose", "--permission-mode", "acceptEdits"]
    assert first["argv"][7].startswith("--session-id=")
    assert "--model=--help" in second["argv"]
    uuid.UUID(second["argv"][7].removeprefix("--session-id="))
    assert first["cwd"] == str(place.root)
    assert first["env"]["CLAUDE_CODE_ENTRYPOINT"] == "p2p-daemon"
    assert "CLAUDECODE" not in first["env"]


def test_a_child_that_dies_at_once_is_an_error_and_no_session(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CLAUDE", "die")
    monkeypatch.setattr(session_module, "SETTLE_SECONDS", 20.0)  # it is over as soon as the child is dead

    async def main() -> None:
        async with place.table() as table:
            for text in (None, "hello"):
                with pytest.raises(Unavailable, match="something is wrong\nand more of it"):
                    await table.spawn(spawn(text=text))
            assert table.listing(everything=True) == []
            assert list(place.sessions.iterdir()) == []
            monkeypatch.delenv("FAKE_CLAUDE")
            await table.spawn(spawn(text="now it works"))
            await read_results(table, "s")

    run(main())


@pytest.mark.parametrize("text", [None, "a message"])
def test_what_is_stopped_or_told_while_its_start_fails_is_no_session(
    place: Place, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setenv("FAKE_CLAUDE", "die")
    monkeypatch.setattr(session_module, "SETTLE_SECONDS", 10.0)

    async def main() -> None:
        async with place.table() as table:
            spawning = asyncio.create_task(table.spawn(spawn()))
            wanted = State.FAILED if text else State.STARTING  # as long as it starts it takes messages
            while "s" not in table._sessions or table.find("s").state is not wanted:
                await asyncio.sleep(0)
            if text is None:
                assert await table.stop("s") is False
            else:
                with pytest.raises(NoSession):
                    await table.send("s", text)
            with pytest.raises(Unavailable):
                await spawning
        assert list(place.sessions.iterdir()) == []
        assert place.log.events("warning") == []

    run(main())


def test_no_claude_is_an_error_and_no_session(place: Place) -> None:
    def missing() -> Path:
        raise Unavailable("claude was not found", hint="install it")

    async def main() -> None:
        async with place.table(find_claude=missing) as table:
            with pytest.raises(Unavailable, match="not found"):
                await table.spawn(spawn())
        async with place.table(find_claude=lambda: place.path / "gone") as table:
            with pytest.raises(Unavailable, match="could not be started"):
                await table.spawn(spawn())
            assert table.listing(everything=True) == []
        assert list(place.sessions.iterdir()) == []

    run(main())


@pytest.mark.parametrize("session_id", ["", "..", "../x", "a/b", ".hidden", "-x", "a b", "x" * 129, "a\n", "ü"])
def test_a_session_id_is_no_path(place: Place, session_id: str) -> None:
    async def main() -> None:
        async with place.table() as table:
            with pytest.raises(DataError, match="sessionId"):
                await table.spawn(Spawn(session_id=session_id))
            assert table.listing(everything=True) == []

    run(main())


def test_a_session_id_is_taken_once(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            both = await asyncio.gather(
                table.spawn(spawn(text="one")), table.spawn(spawn(text="two")), return_exceptions=True
            )
            assert [type(one) for one in both].count(Refused) == 1
            await table.stop("s")
            with pytest.raises(Refused, match="taken"):
                await table.spawn(spawn())
        for name in ("left", "empty"):
            (place.sessions / name).mkdir()
        (place.sessions / "left" / "session.json").write_text("damaged")
        async with place.table() as table:
            with pytest.raises(Refused, match="taken"):
                await table.spawn(Spawn(session_id="left"))
            await table.spawn(Spawn(session_id="empty"))  # as a crash leaves it, and the retry comes

    run(main())


def test_a_repeated_spawn_gives_the_first_ones_session(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            wanted = spawn(text="once", message_id="m")
            both = await asyncio.gather(table.spawn(wanted), table.spawn(wanted))
            assert both[0] == both[1]
            await read_results(table, "s")
            assert await table.spawn(wanted) == both[0]
        assert place.messages() == ["once"]

    run(main())


def test_directories_are_checked_on_real_paths(place: Place) -> None:
    inside = place.root / "proj"
    evil = place.path / "root-evil"
    for directory in (inside, evil):
        directory.mkdir()
    (place.root / "out").symlink_to(evil)
    (place.root / "in").symlink_to(inside)
    (place.root / "loop").symlink_to("loop")
    (place.root / "file").touch()

    async def attempt(table: SessionTable, directory: str) -> str:
        session, _ = await table.spawn(Spawn(directory=directory))
        return session.info.directory

    async def main() -> None:
        async with place.table(root_dir=place.root) as table:
            for good in ("proj", str(inside), "in", "proj/../proj"):
                assert await attempt(table, good) == str(inside)
            assert (await table.spawn(Spawn()))[0].info.directory == str(place.root)
            for bad in (str(evil), "../root-evil", "out", "/", "..", str(place.path / "nowhere")):
                with pytest.raises(Refused, match="outside"):
                    await attempt(table, bad)
            for none in ("proj/none", "loop", "loop/../out", "loop/../in"):  # a loop has no inside, and no parent
                with pytest.raises(DataError, match="does not exist"):
                    await attempt(table, none)
            with pytest.raises(DataError, match="Not a directory"):
                await attempt(table, "file")

    run(main())


def test_bad_permission_mode_and_too_many_sessions(place: Place) -> None:
    async def main() -> None:
        async with place.table(max_sessions=1) as table:
            with pytest.raises(DataError, match="permissionMode"):
                await table.spawn(spawn(permission_mode="yolo"))
            await table.spawn(Spawn(session_id="a", text=f"HOLD:{place.path / 'never'}"))
            with pytest.raises(TryAgain, match="1 sessions run"):
                await table.spawn(Spawn(session_id="b"))
            await table.stop("a")
            await table.spawn(Spawn(session_id="b", text="x"))
            assert [s["sessionId"] for s in table.listing()] == ["b"]

    run(main())


def test_messages_queue_and_answers_pair_with_them(place: Place) -> None:
    gate = place.path / "gate"

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text=f"HOLD:{gate}"))
            seqs = [await table.send("s", f"number {n}", f"m{n}") for n in range(5)]
            assert await table.send("s", "again", "m3") == seqs[3]
            assert place.messages() in ([], [f"HOLD:{gate}"])
            gate.touch()
            envelopes = await read_results(table, "s", 6)
        turns = [e["message"] for e in envelopes if e["type"] == "turn"]
        assert turns == [1, *seqs]
        order = [e["type"] if e["type"] == "turn" else "result" for e in envelopes if is_turn_or_result(e)]
        assert order == ["turn", "result"] * 6
        assert place.messages()[1:] == [f"number {n}" for n in range(5)]

    run(main())


def is_turn_or_result(envelope: dict[str, Any]) -> bool:
    return bool(envelope["type"] == "turn" or envelope.get("data", {}).get("type") == "result")


def test_too_long_a_queue_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_QUEUED", 2)

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text=f"HOLD:{place.path / 'never'}"))
            await wait_for_state(table, "s", State.RUNNING)
            for _ in range(2):
                await table.send("s", "x")
            with pytest.raises(TryAgain, match="wait already"):
                await table.send("s", "x")

    run(main())


def test_three_readers_see_everything_and_wait_for_nobody(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
            readers = [asyncio.create_task(read_results(table, "s", 3)) for _ in range(3)]
            for _ in range(2):
                await table.send("s", "MANY:50")
            first, *others = await asyncio.gather(*readers)
            assert all(other == first for other in others)
            assert [e["seq"] for e in first] == list(range(1, len(first) + 1))
            assert len(outputs(first, "assistant")) == 100

    run(main())


def test_long_lines_and_garbage_come_through(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text=f"BIG:{16 * 1024 * 1024}"))
            await table.send("s", "GARBAGE")
            envelopes = await read_results(table, "s", 2)
        assert len(outputs(envelopes, "assistant")[0]["text"]) == 16 * 1024 * 1024
        assert [o["text"] for o in outputs(envelopes, "unparsed")] == ["not json", "\ufffd\ufffd", "[1]"]

    run(main())


def test_an_object_with_an_odd_type_keeps_neither_session_nor_daemon(place: Place) -> None:
    odd = {"type": ["assistant"]}

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text=f"SAY:{json.dumps(odd)}"))
            await read_until(table, "s", lambda e: e.get("data") == odd)
            await table.send("s", "next", priority="now")
            envelopes = await read_results(table, "s")
        async with place.table() as table:
            assert (await read_all(table, "s"))[: len(envelopes)] == envelopes

    run(main())


def test_clear_moves_a_mark_and_deletes_nothing(place: Place) -> None:
    async def read(table: SessionTable, *, clear: bool, limit: int | None = None) -> list[str]:
        output = await table.read("s", after=None, limit=limit, clear=clear, wait_ms=0)
        envelopes = [json.loads(line) for line in output.page.lines]
        assert all(e["type"] == "session-output" for e in envelopes)
        return [e["data"]["type"] for e in envelopes]

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            assert await read(table, clear=False) == ["system", "result"]
            assert await read(table, clear=False, limit=1) == ["result"]
            assert await read(table, clear=True, limit=1) == ["system"]
            assert await read(table, clear=False) == ["result"]
            assert await read(table, clear=True) == ["result"]
            assert await read(table, clear=True) == []
            assert len(await read_all(table, "s")) == 4
        async with place.table() as table:
            assert await read(table, clear=False) == []

    run(main())


def test_pages_are_bounded_and_the_newest_can_be_asked_for(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="MANY:30"))
            await read_results(table, "s")
            output = await table.read("s", after=2, limit=7, clear=False, wait_ms=0)
            assert [json.loads(line)["seq"] for line in output.page.lines] == list(range(3, 10))
            assert output.page.next == 9
            last = await table.read("s", after=-3, limit=None, clear=False, wait_ms=0)
            assert [json.loads(line)["seq"] for line in last.page.lines] == [32, 33, 34]
            beyond = await table.read("s", after=2**53 - 1, limit=0, clear=False, wait_ms=0)
            assert (beyond.page.lines, beyond.page.next) == ([], 34)

    run(main())


def test_unknown_sessions(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            with pytest.raises(NoSession, match=r"^Session not found$"):
                await table.send("none", "x")
            assert not await table.stop("none")
            output = await table.read("none", after=5, limit=None, clear=True, wait_ms=60_000)
            assert (output.page.lines, output.page.next, output.state) == ([], 5, None)

    run(main())


def test_a_session_is_removed_once(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s", text="x"))
            await table.stop("s")
            assert sorted(await asyncio.gather(table.remove("s"), table.remove("s"))) == [False, True]
            assert not (place.sessions / "s").exists()

    run(main())


def test_idle_journals_are_closed_but_for_a_few(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "MAX_OPEN_JOURNALS", 2)
    names = [f"s{n}" for n in range(5)]

    async def main() -> None:
        async with place.table() as table:
            for name in names:
                await table.spawn(Spawn(session_id=name, text="x"))
                await read_results(table, name)
        async with place.table() as table:
            for name in names * 2:
                assert len(await read_all(table, name)) == 4
            open_ones = [s for s in all_sessions(table) if s.journal is not None]
            assert len(open_ones) <= 3

    run(main())


def test_journals_that_nobody_reads_are_closed_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of sessions that a crontab starts: each open one costs two descriptors."""
    monkeypatch.setattr(table_module, "MAX_OPEN_JOURNALS", 2)
    names = [f"s{n}" for n in range(5)]

    async def main() -> None:
        async with place.table() as table:
            for name in names:
                await table.spawn(Spawn(session_id=name, text="x"))
                await wait_for_state(table, name, State.IDLE)
                await table.stop(name)
            assert sum(s.journal is not None for s in all_sessions(table)) <= 3

    run(main())


def all_sessions(table: SessionTable) -> list[Session]:
    return list(table._sessions.values())


def test_snapshot_is_nothing_until_something_changes(place: Place) -> None:
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    async def main() -> None:
        async with place.table(on_change=changed) as table:
            assert table.snapshot() is None
            session, _ = await table.spawn(spawn(text="x"))
            snapshot = table.snapshot()
            assert snapshot is not None
            (entry,) = snapshot["sessions"]
            assert set(entry) == {"sessionId", "pid", "createdAt", "directory"}
            assert entry["pid"] == session.pid
            assert isinstance(snapshot["updatedAt"], int)
            await table.stop("s")
            after = table.snapshot()
            assert after is not None
            assert after["sessions"] == []
        assert changes >= 2

    run(main())


def test_nothing_starts_while_the_table_closes(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
            await table.close()
            with pytest.raises(P2PClaudeError, match="stopping"):
                await table.spawn(Spawn(session_id="late"))
            assert [s["sessionId"] for s in table.listing(everything=True)] == ["s"]

    run(main())


def test_a_claude_that_dies_when_its_session_was_just_revived_is_revived_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the task that revived it is forgotten: its waiting messages would wait until the next daemon."""

    async def main() -> None:
        session: Any = SimpleNamespace(info=SimpleNamespace(session_id="s"), lifecycle=asyncio.Lock(), is_orphaned=True)
        resumed: list[str] = []

        def die() -> None:
            session.is_orphaned = True
            table._revive_soon(session)

        async def resume(one: Session) -> None:
            session.is_orphaned = False
            resumed.append(one.info.session_id)
            if len(resumed) == 1:
                asyncio.get_running_loop().call_soon(die)

        async with place.table() as table:
            monkeypatch.setattr(table, "_resume", resume)
            table._revive_soon(session)
            while len(resumed) < 2 or table._reviving:
                await asyncio.sleep(0.001)
            assert resumed == ["s", "s"]

    run(main())
