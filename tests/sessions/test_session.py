"""One session's life: stopped, dying, coming back, crashed, damaged, out of room; against a child like claude."""

import asyncio
import errno
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from kit.bad_disk import BadDisk
from kit.sessions import Place, outputs, prepare, read_all, read_results, read_until, run, wait_for_state

from p2pclaude.client.remote_sessions import AnswerFinder
from p2pclaude.errors import Refused, Unavailable
from p2pclaude.host import processes
from p2pclaude.protocol.wire import dump_json
from p2pclaude.sessions import claude as claude_module
from p2pclaude.sessions import directory as directory_module
from p2pclaude.sessions import journal as journal_module
from p2pclaude.sessions import session as session_module
from p2pclaude.sessions.claude import ClaudeProcess
from p2pclaude.sessions.directory import Info
from p2pclaude.sessions.journalfile import DiskFull, JournalFile
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


def spawn(**fields: Any) -> Spawn:
    return Spawn(**{"session_id": "s"} | fields)


def test_stop_ends_a_turn_and_the_session(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(spawn(text=f"HOLD:{place.path / 'never'}"))
            await wait_for_state(table, "s", State.RUNNING)
            await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
            pid = session.pid
            assert pid is not None
            assert await table.stop("s")
            assert_gone(pid)
            assert outputs(await read_all(table, "s"), "result")[0]["result"] == "interrupted"
            assert table.listing() == []
            assert table.listing(everything=True)[0]["state"] == "ended"
            assert await table.stop("s")
            with pytest.raises(Refused, match="ended"):
                await table.send("s", "more")

    run(main())


def test_stop_ends_a_child_that_ignores_everything(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CLAUDE", "deaf")
    steps = tuple((number, 0.1 if number != 9 else 5.0) for number, _ in claude_module.STOP_STEPS)
    monkeypatch.setattr(claude_module, "STOP_STEPS", steps)

    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            pid = session.pid
            assert pid is not None
            assert await table.stop("s")
            assert_gone(pid)
            assert session.info.exit_status == -9

    run(main())


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_that_dies_in_a_turn_fails_the_session_and_comes_back(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn())  # or its death may come before its start is over, and is the start's failure
            await table.send("s", "EXIT:7")
            await wait_for_state(table, "s", State.FAILED)
            output = await table.read("s", after=0, limit=None, clear=False, wait_ms=20_000)
            assert (output.state, output.error) == (State.FAILED, "last words")
            half = {"type": "unparsed", "text": '{"type":"assistant","half'}
            assert json.loads(output.page.lines[-2])["data"] == half
            cut = json.loads(output.page.lines[-1])
            assert (cut["type"], cut["message"], cut["again"]) == ("turn-cut", 1, False)
            assert (place.sessions / "s" / "stderr.txt").read_text() == "last words\n"
            assert (place.sessions / "s" / "stderr.txt").stat().st_mode & 0o777 == 0o600
            seq = await table.send("s", "are you there")
            envelopes = await read_results(table, "s", after=seq)
            assert outputs(envelopes, "result")[0]["result"] == "echo: are you there"
        assert [entry["argv"][7].split("=")[0] for entry in place.told() if "argv" in entry] == [
            "--session-id",
            "--resume",
        ]

    run(main())


@pytest.mark.parametrize("how", ["dies", "is stopped"])
def test_a_claude_that_ends_when_no_file_can_be_opened(place: Place, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What it left cannot be looked for then; its session stayed as it was for ever, and took messages for nobody."""

    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            await wait_for_state(table, "s", State.IDLE)
            with monkeypatch.context() as patch:
                patch.setattr(processes, "_look", fail)
                if how == "is stopped":
                    await table.stop("s")
                    assert session.state is State.ENDED
                    return
                assert session.pid is not None
                os.kill(session.pid, signal.SIGKILL)
                await wait_for_state(table, "s", State.FAILED)
            await table.send("s", "y")
            await read_results(table, "s", 2)

    run(main())


def test_sessions_outlive_the_daemon(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="CLEAR:", permission_mode="bypassPermissions", directory=str(place.root)))
            await read_results(table, "s")
            before = await read_all(table, "s")
            await table.spawn(Spawn(session_id="stopped", text="x"))
            await table.stop("stopped")
        async with place.table() as table:
            assert table.listing() == []
            listed = {s["sessionId"]: (s["state"], s["lastSeq"]) for s in table.listing(everything=True)}
            assert listed["s"] == ("dormant", 4)
            assert listed["stopped"][0] == "ended"
            assert await read_all(table, "s") == before
            assert await table.send("s", "still there?") == 5
            await read_results(table, "s", after=5)
            assert table.listing()[0]["state"] in ("running", "idle")
        last = [entry["argv"] for entry in place.told() if "argv" in entry][-1]
        assert last[7] == "--resume=cleared"  # `/clear` was followed
        assert last[6] == "default"  # and nobody asked for bypassPermissions again

    run(main())


def test_a_crash_loses_no_accepted_message(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="first", message_id="m1"))
            await read_results(table, "s")
        path = place.sessions / "s"
        info = json.loads((path / "session.json").read_text())
        (path / "session.json").write_text(json.dumps(info | {"state": "running"}))  # as a crash leaves it
        with (path / "journal.jsonl").open("ab") as journal:
            data = {"type": "user", "message": {"role": "user", "content": "second"}, "uuid": str(uuid.uuid4())}
            journal.write(dump_json({"type": "message", "seq": 5, "messageId": "m2", "data": data}))
            journal.write(b'\n{"type":"session-output","seq":6,"da')
        async with place.table() as table:
            # Nobody has to send anything: an accepted message runs by itself.
            assert [session["sessionId"] for session in table.listing()] == ["s"]
            note = next(e for e in await read_results(table, "s", after=4) if e["type"] == "note")
            assert (note["seq"], note["event"], note["bytes"]) == (6, "cut", 36)
            await table.send("s", "third", "m3")
            assert await table.send("s", "second", "m2") == 5
            await read_results(table, "s", 2, after=5)
        assert place.messages() == ["first", "second", "third"]
        assert place.log.events("journal-cut")[0]["bytes"] == 36

    run(main())


def test_damaged_sessions_are_left_out_and_said(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
        for name, content in (("a", b"{"), ("b", b"[]"), ("c", b'{"session_id": "c"}')):
            (place.sessions / name).mkdir()
            (place.sessions / name / "session.json").write_bytes(content)
        async with place.table() as table:
            assert [s["sessionId"] for s in table.listing(everything=True)] == ["s"]
        assert {line["session"] for line in place.log.events("warning")} == {"a", "b", "c"}

    run(main())


def test_resuming_keeps_to_the_root_directory(place: Place) -> None:
    async def main() -> None:
        elsewhere = place.path / "elsewhere"
        elsewhere.mkdir()
        async with place.table() as table:
            await table.spawn(spawn(text="x", directory=str(elsewhere)))
            await read_results(table, "s")
        async with place.table(root_dir=place.root) as table:
            with pytest.raises(Refused, match="outside"):
                await table.send("s", "x")
            assert table.listing(everything=True)[0]["state"] == "dormant"

    run(main())


def test_a_full_disk_pauses_the_session_and_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = BadDisk(monkeypatch)
    gate = place.path / "gate"

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            await table.send("s", f"HOLD:{gate}")
            await read_until(table, "s", lambda e: bool(e["seq"] == 7))
            disk.is_full = True
            gate.touch()
            await wait_for_state(table, "s", State.PAUSED)
            with pytest.raises(DiskFull):
                await table.send("s", "no room for this", "m")
            output = await table.read("s", after=7, limit=None, clear=False, wait_ms=0)
            assert (output.page.lines, output.state, output.error) == ([], State.PAUSED, "No space left on device")
            disk.mend()
            await read_results(table, "s", after=7)
            await table.send("s", "now there is", "m")
            envelopes = await read_results(table, "s", 3)
            assert [e["seq"] for e in envelopes] == list(range(1, len(envelopes) + 1))
        assert place.log.events("session-paused")
        assert place.log.events("session-continued")

    run(main())


def test_a_full_disk_pauses_no_session_without_a_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note on a torn journal waits for room; a message that comes meanwhile has claude started, and runs."""
    monkeypatch.setattr(journal_module, "RETRY_SECONDS", 0.01)
    sync, full, whole = os.fdatasync, True, 0

    def fdatasync(descriptor: int) -> None:
        if full and os.fstat(descriptor).st_size > whole:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    async def main() -> None:
        nonlocal full, whole
        async with place.table() as table:
            await table.spawn(spawn(text="first"))
            await read_results(table, "s")
        with (place.sessions / "s" / "journal.jsonl").open("ab") as journal:
            whole = journal.tell()
            journal.write(b"torn")
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        async with place.table() as table:
            await read_all(table, "s")
            while not place.log.events("session-paused"):
                await asyncio.sleep(0.01)
            sending = asyncio.create_task(table.send("s", "second"))
            await wait_for_state(table, "s", State.PAUSED)
            full = False
            await read_results(table, "s", after=await sending)
        assert place.messages() == ["first", "second"]

    run(main())


def test_a_result_that_waited_for_room_is_known_before_the_next_turn_is_marked(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the disk syncs it: a message that came during that turn steers it no more."""
    monkeypatch.setattr(session_module, "RETRY_SECONDS", 0.01)
    write, sync, refused, held = JournalFile._write, os.fdatasync, set[bytes](), set[bytes]()

    def write_if_room(file: JournalFile, data: bytes, start: int) -> None:
        if words := {word for word in refused if word in data}:
            held.update(words)
            raise DiskFull("no space")
        write(file, data, start)
        if b'"result"' in data:
            refused.clear()

    def sync_slowly(descriptor: int) -> None:
        time.sleep(0.1)
        sync(descriptor)

    async def main() -> None:
        async with place.table() as table:
            gate = place.path / "gate"
            await table.spawn(spawn(text=f"HOLD:{gate}"))
            await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
            refused.update((b'"type":"turn"', b'"result"'))
            seq = await table.send("s", "steer", priority="now")
            await wait_for_state(table, "s", State.PAUSED)
            gate.touch()
            while b'"result"' not in held:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(os, "fdatasync", sync_slowly)
            refused.remove(b'"result"')
            finder = AnswerFinder(seq)
            envelopes = await read_results(table, "s", 2)
            answers = [answer for e in envelopes if (answer := finder.feed(e)) is not None]
            assert [one["result"] for one in answers] == ["echo: steer"]

    monkeypatch.setattr(JournalFile, "_write", write_if_room)
    run(main())


def test_a_message_that_was_never_marked_as_handed_survives_claude_and_daemon(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = JournalFile._write, True

    def write_but_turns(file: JournalFile, data: bytes, start: int) -> None:
        if full and b'"type":"turn"' in data:
            raise DiskFull("no space")
        write(file, data, start)

    async def main() -> None:
        nonlocal full
        async with place.table() as table:
            session, _ = await table.spawn(spawn(text="first"))
            await wait_for_state(table, "s", State.IDLE)
            monkeypatch.setattr(JournalFile, "_write", write_but_turns)
            seq = await table.send("s", "second")
            await wait_for_state(table, "s", State.PAUSED)
            session.kill()
            await read_until(table, "s", lambda e: bool(e["type"] == "turn-cut"), after=seq)
        full = False
        async with place.table() as table:
            await read_results(table, "s", after=seq)
        assert place.messages() == ["first", "second"]

    run(main())


@pytest.mark.parametrize("seconds", [0.05, 1000.0])
def test_a_session_that_was_stopped_on_a_full_disk_does_not_come_back(
    place: Place, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Its end is written when there is room, at the latest when the daemon ends: it would run what waited in it."""
    monkeypatch.setattr(directory_module, "SAVE_AGAIN_SECONDS", seconds)

    def fail(info: Info, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text=f"HOLD:{place.path / 'never'}"))
            await wait_for_state(table, "s", State.RUNNING)
            await table.send("s", "waits")
            with monkeypatch.context() as patch:
                patch.setattr(Info, "save", fail)
                assert await table.stop("s")
            if seconds < 1:
                while Info.load(place.sessions / "s").state != State.ENDED:
                    await asyncio.sleep(0.01)
        async with place.table() as table:
            assert [one["state"] for one in table.listing(everything=True)] == ["ended"]
        assert "waits" not in place.messages()

    run(main())


def test_a_spawn_on_a_full_disk_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    BadDisk(monkeypatch).is_full = True

    async def main() -> None:
        async with place.table() as table:
            with pytest.raises(DiskFull):
                await table.spawn(spawn(text="x"))
            assert table.listing(everything=True) == []
            assert list(place.sessions.iterdir()) == []

    run(main())


def fail_slowly(
    starting: asyncio.Event, release: asyncio.Event, reason: str
) -> Callable[..., Awaitable[ClaudeProcess]]:
    """Give a start of claude that says when it has begun and, when it is released, fails for a reason."""

    async def start(*_: Any, **__: Any) -> ClaudeProcess:
        starting.set()
        await release.wait()
        raise Unavailable(reason)

    return start


def test_a_message_accepted_while_a_start_fails_is_not_forgotten(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    start, starting, sent = ClaudeProcess.start, asyncio.Event(), asyncio.Event()
    reason = "claude could not be started: no such file or directory"

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="first"))
            await read_results(table, "s")
        async with place.table() as table:
            monkeypatch.setattr(ClaudeProcess, "start", fail_slowly(starting, sent, reason))
            first = asyncio.create_task(table.send("s", "refused"))
            await starting.wait()
            seq = await table.send("s", "accepted")
            sent.set()
            with pytest.raises(Unavailable):
                await first
            output = await table.read("s", after=seq, limit=None, clear=False, wait_ms=0)
            assert (output.state, output.error) == (State.FAILED, reason)
        monkeypatch.setattr(ClaudeProcess, "start", start)
        async with place.table() as table:
            await read_results(table, "s", after=seq)
        assert place.messages() == ["first", "accepted"]

    run(main())


def test_a_message_accepted_while_claude_is_started_survives_a_crash(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, starting, crashed = ClaudeProcess.start, asyncio.Event(), asyncio.Event()

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="first"))
            await read_results(table, "s")
        async with place.table() as table:
            monkeypatch.setattr(ClaudeProcess, "start", fail_slowly(starting, crashed, "it is too late"))
            first = asyncio.create_task(table.send("s", "never accepted"))
            await starting.wait()
            seq = await table.send("s", "accepted")
            shutil.copytree(place.sessions, place.path / "crashed")
            crashed.set()
            await asyncio.gather(first, return_exceptions=True)
        monkeypatch.setattr(ClaudeProcess, "start", start)
        place.sessions = place.path / "crashed"
        async with place.table() as table:
            await read_results(table, "s", after=seq)
        assert place.messages() == ["first", "accepted"]

    run(main())


def test_a_directory_that_may_not_be_entered_is_left_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, stat = place.sessions / "theirs", Path.stat
    theirs.mkdir()

    def refuse(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.parent == theirs:  # as one that root has made
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", refuse)

    async def main() -> None:
        async with place.table() as table:
            assert table.listing(everything=True) == []
        assert [line["session"] for line in place.log.events("warning")] == ["theirs"]

    run(main())
