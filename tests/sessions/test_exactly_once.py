"""A message runs once, whatever dies; what cannot go on says so; two claudes never serve one session."""

import asyncio
import errno
import fcntl
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kit.bad_disk import BadDisk
from kit.sessions import Place, outputs, prepare, read_all, read_results, read_until, run, wait_for_state

from p2pclaude.client.remote_sessions import AnswerFinder
from p2pclaude.errors import DataError, TryAgain, Unavailable
from p2pclaude.protocol.wire import dump_json
from p2pclaude.sessions import directory
from p2pclaude.sessions import session as session_module
from p2pclaude.sessions import table as table_module
from p2pclaude.sessions.journalfile import DiskFull, JournalFile
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    monkeypatch.setattr(directory, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(table_module, "REVIVE_SECONDS", 0.05)
    return prepare(tmp_path, monkeypatch)


def spawn(**fields: Any) -> Spawn:
    return Spawn(**{"session_id": "s"} | fields)


def crashed(place: Place, *envelopes: dict[str, Any], state: str = "running") -> None:
    """Leave a session as a crash does: after whole turns, these envelopes stand at the journal's end."""
    path = place.sessions / "s"
    info = json.loads((path / "session.json").read_text())
    (path / "session.json").write_text(json.dumps(info | {"state": state, "queued": 1}))
    lines = (path / "journal.jsonl").read_bytes().splitlines()
    with (path / "journal.jsonl").open("ab") as journal:
        for seq, envelope in enumerate(envelopes, len(lines) + 1):
            journal.write(dump_json({"type": envelope["type"], "seq": seq, "timestamp": 1} | envelope) + b"\n")


def message(text: str, uuid: str) -> dict[str, Any]:
    data = {"type": "user", "message": {"role": "user", "content": text}, "uuid": uuid}
    return {"type": "message", "messageId": uuid, "data": data}


def transcript(place: Place, claude_id: str, *uuids: str) -> None:
    """Write what claude remembers of a conversation."""
    project = place.path / "home" / ".claude" / "projects" / "work"
    project.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"type": "user", "uuid": uuid}) for uuid in uuids]
    (project / f"{claude_id}.jsonl").write_text("\n".join(lines) + "\n")


async def one_turn(place: Place) -> str:
    """Let a session have one whole turn, of four envelopes; give claude's id for it."""
    async with place.table() as table:
        session, _ = await table.spawn(spawn(text="first", message_id="m1"))
        await read_results(table, "s")
        await wait_for_state(table, "s", State.IDLE)
        return session.info.claude_id


TURN = {"type": "turn", "message": 5}
WORK = {"type": "session-output", "data": {"type": "assistant"}}
INIT = {"type": "session-output", "data": {"type": "system", "subtype": "init"}}


@pytest.mark.parametrize(
    ("left", "known", "again"),
    [
        ((TURN,), False, True),
        ((TURN, INIT), False, True),
        ((TURN,), True, False),  # the transcript has it
        ((TURN, INIT, WORK), False, False),  # claude had begun, whatever the transcript says
    ],
)
def test_a_message_that_was_handed(place: Place, left: tuple[dict[str, Any], ...], known: bool, again: bool) -> None:
    async def main() -> None:
        claude_id = await one_turn(place)
        transcript(place, claude_id, "m1", *(["u5"] if known else []))
        crashed(place, message("second", "u5"), *left)
        async with place.table() as table:
            envelopes = await read_until(table, "s", lambda e: bool(e["type"] == "turn-cut"), after=4)
            assert (envelopes[-1]["message"], envelopes[-1]["again"]) == (5, again)
            if again:
                assert outputs(await read_results(table, "s", after=5 + len(left)), "result") != []
            else:
                await wait_for_state(table, "s", State.IDLE, State.DORMANT)
            # A retry of the message is answered with its seq, and does not run it.
            assert await table.send("s", "second", "u5") == 5
            await table.send("s", "third")
            await read_until(table, "s", lambda e: e.get("data", {}).get("result") == "echo: third")
        assert place.messages() == ["first", *(["second"] if again else []), "third"]

    run(main())


def test_a_message_that_waits_here_and_ran_from_another_copy_of_the_journal(place: Place) -> None:
    """A backup that was put back, or a directory copied from another daemon: Claude would ignore it without a word."""

    async def main() -> None:
        claude_id = await one_turn(place)
        transcript(place, claude_id, "m1", "u5")
        crashed(place, message("second", "u5"), message("third", "u6"))
        async with place.table() as table:
            envelopes = await read_until(table, "s", lambda e: e.get("data", {}).get("result") == "echo: third", 4)
            [cut] = [e for e in envelopes if e["type"] == "turn-cut"]
            assert (cut["message"], cut["again"]) == (5, False)
            assert await table.send("s", "second", "u5") == 5
        async with place.table() as table:  # the queue is empty, as the journal says
            assert table.listing(everything=True)[0]["state"] == "dormant"
            await table.send("s", "fourth")
            await read_until(table, "s", lambda e: e.get("data", {}).get("result") == "echo: fourth")
        assert place.messages() == ["first", "third", "fourth"]

    run(main())


def test_a_message_that_ends_every_claude_is_given_up(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            await wait_for_state(table, "s", State.IDLE)
        crashed(place, message("SILENT_EXIT:", "u5"), TURN)
        async with place.table() as table:
            await wait_for_state(table, "s", State.FAILED)
            with pytest.raises(Unavailable):
                for _ in range(5):
                    await table.send("s", "after it")
                    await wait_for_state(table, "s", State.FAILED, State.IDLE)
                    if table.listing(everything=True)[0]["state"] == "idle":
                        raise Unavailable("done")
            cuts = [e["again"] for e in await read_all(table, "s") if e["type"] == "turn-cut"]
            assert cuts[-1] is False and cuts.count(False) == 1 and 2 <= cuts.count(True) <= 3

    run(main())


def test_messages_go_on_after_claude_died_in_a_turn(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            gate = place.path / "gate"
            session, _ = await table.spawn(spawn(text=f"HOLD:{gate}"))
            await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
            seqs = [await table.send("s", text) for text in ("EXIT:3", "next", "last")]
            gate.touch()
            envelopes = await read_until(table, "s", lambda e: e.get("data", {}).get("result") == "echo: last")
            cuts = [(e["message"], e["again"]) for e in envelopes if e["type"] == "turn-cut"]
            assert cuts == [(seqs[0], False)]
            assert session.state in (State.RUNNING, State.IDLE)
        assert place.messages()[1:] == ["EXIT:3", "next", "last"]

    run(main())


def test_what_waits_runs_when_the_daemon_is_back(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text=f"HOLD:{place.path / 'never'}", permission_mode="bypassPermissions"))
            await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
            await table.send("s", "waits")
        async with place.table() as table:
            await read_until(table, "s", lambda e: e.get("data", {}).get("result") == "echo: waits")
        last = [entry["argv"] for entry in place.told() if "argv" in entry][-1]
        assert last[6] == "default"  # bypassPermissions is not revived by itself

    run(main())


@pytest.mark.parametrize("what", ["directory", "claude"])
def test_what_cannot_be_started_again_says_why_and_tries_later(place: Place, what: str) -> None:
    def missing() -> Path:
        raise Unavailable("claude was not found")

    async def main() -> None:
        await one_turn(place)
        crashed(place, message("second", "u5"))
        if what == "directory":
            place.root.rename(place.path / "away")
        changes: dict[str, Any] = {"find_claude": missing} if what == "claude" else {}
        async with place.table(**changes) as table:
            await wait_for_state(table, "s", State.FAILED)
            output = await table.read("s", after=5, limit=None, clear=False, wait_ms=0)
            assert ("does not exist" if what == "directory" else "not found") in str(output.error)
        if what == "directory":
            (place.path / "away").rename(place.root)
        async with place.table() as table:
            await read_until(table, "s", lambda e: e.get("data", {}).get("result") == "echo: second")
        assert place.messages() == ["first", "second"]

    run(main())


def test_more_sessions_than_may_run_take_turns(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            for name in ("a", "b", "c"):
                await table.spawn(Spawn(session_id=name, text=f"HOLD:{place.path / 'never'}"))
                await table.send(name, f"waits in {name}")
        async with place.table(max_sessions=1) as table:
            for _ in range(3):
                while not (here := [s for s in table.listing() if s["pid"] is not None]):
                    await asyncio.sleep(0.01)
                name = here[0]["sessionId"]
                await read_until(table, name, lambda e: "echo: waits" in str(e.get("data", {}).get("result")))
                await table.stop(name)

    run(main())


def test_a_spawn_cut_short_by_a_crash_can_be_tried_again(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn())
        info = json.loads((place.sessions / "s" / "session.json").read_text())
        (place.sessions / "s" / "session.json").write_text(json.dumps(info | {"state": "starting"}))
        async with place.table() as table:
            _, seq = await table.spawn(spawn(text="once", message_id="m"))
            assert seq == 1
            await read_results(table, "s")
            assert (await table.spawn(spawn(text="once", message_id="m")))[1] == 1
        assert place.messages() == ["once"]

    run(main())


def test_a_session_that_another_claude_serves_is_busy(place: Place) -> None:
    async def main() -> None:
        await one_turn(place)
        lock = os.open(place.sessions / "s" / "lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a claude does that outlived its daemon
        async with place.table() as table:
            with pytest.raises(TryAgain, match="earlier claude"):
                await table.send("s", "second")
            os.close(lock)
            await table.send("s", "third")
            await read_results(table, "s", after=5)
        assert place.messages() == ["first", "third"]

    run(main())


def test_claude_holds_the_lock_without_its_daemon(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            await wait_for_state(table, "s", State.IDLE)
            assert is_locked(place)
            pid = session.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await wait_for_state(table, "s", State.FAILED)
            assert not is_locked(place)

    run(main())


def is_locked(place: Place) -> bool:
    lock = os.open(place.sessions / "s" / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def test_steering(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            gate = place.path / "gate"
            await table.spawn(spawn(text=f"HOLD:{gate}"))
            await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
            waiting = await table.send("s", "waits")
            seqs = [await table.send("s", text, priority="now") for text in ("steer", "again")]
            marks = await read_until(table, "s", lambda e: e.get("message") == seqs[0])
            assert marks[-1]["steers"] == 1
            assert not [e for e in await read_all(table, "s") if e.get("message") == seqs[1]]  # one at a time
            gate.touch()
            envelopes = await read_results(table, "s", 4)
            turns = [e["message"] for e in envelopes if e["type"] == "turn"]
            assert turns == [1, *seqs, waiting]
            results = [one["result"] for one in outputs(envelopes, "result")]
            assert results == [f"echo: HOLD:{gate}", "echo: steer", "echo: again", "echo: waits"]
            with pytest.raises(DataError, match="priority"):
                await table.send("s", "x", priority="later")
        assert [e["message"].get("priority") for e in place.told() if "message" in e] == [None, "now", "now", None]

    run(main())


def test_steering_a_turn_that_ends_while_the_disk_is_full_is_a_turn_of_its_own(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "RETRY_SECONDS", 0.01)
    append, full = JournalFile.append, False

    def append_if_room(file: JournalFile, kind: str, fields: Mapping[str, object]) -> int:
        if full and kind == "turn":
            raise DiskFull("no space")
        return append(file, kind, fields)

    monkeypatch.setattr(JournalFile, "append", append_if_room)

    async def main() -> None:
        nonlocal full
        async with place.table() as table:
            gate = place.path / "gate"
            await table.spawn(spawn(text=f"HOLD:{gate}"))
            await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
            full = True
            seq = await table.send("s", "steer", priority="now")
            await wait_for_state(table, "s", State.PAUSED)
            gate.touch()
            await read_results(table, "s")
            full = False
            finder = AnswerFinder(seq)
            envelopes = await read_results(table, "s", 2)
            answers = [answer for e in envelopes if (answer := finder.feed(e)) is not None]
            assert [one["result"] for one in answers] == ["echo: steer"]

    run(main())


def test_a_turn_that_claude_begins_by_itself_answers_no_message(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(spawn(text=f"OWN:{place.path / 'go'}"))
            await read_until(table, "s", lambda e: e.get("data", {}).get("text") == "a task has ended")
            assert session.state is State.RUNNING
            seq = await table.send("s", "mine")
            await read_until(table, "s", lambda e: e["type"] == "turn", after=seq)
            (place.path / "go").touch()
            envelopes = await read_results(table, "s", 2, after=seq)
            assert [one["result"] for one in outputs(envelopes, "result")] == ["own", "echo: mine"]
            finder = AnswerFinder(seq)
            answers = [answer for e in envelopes if (answer := finder.feed(e)) is not None]
            assert [one["result"] for one in answers] == ["echo: mine"]
            ended = [entry.get("seq") for entry in place.log.events("turn-ended")]
            assert ended == [1, None, seq]
            await wait_for_state(table, "s", State.IDLE)

    run(main())


def test_a_state_that_changed_ends_the_waiting(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            gate = place.path / "gate"
            await table.spawn(spawn(text=f"HOLD:{gate}"))
            await wait_for_state(table, "s", State.RUNNING)
            last = (await read_all(table, "s"))[-1]["seq"]

            async def state_after(known: str) -> str | None:
                async with asyncio.timeout(25):
                    output = await table.read(
                        "s", after=last + 9, limit=None, clear=False, wait_ms=30_000, known_state=known
                    )
                return output.state

            assert await state_after("idle") == "running"
            changed = asyncio.create_task(state_after("running"))
            await asyncio.sleep(0.05)
            assert not changed.done()
            await table.stop("s")
            assert await changed != "running"

    run(main())


def test_a_sync_that_finds_the_disk_full_pauses_the_session(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = BadDisk(monkeypatch)

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            disk.sync_error = errno.ENOSPC
            sending = asyncio.create_task(table.send("s", "second", "m2"))
            await wait_for_state(table, "s", State.PAUSED)
            assert not sending.done()
            assert place.messages() == ["x"]  # claude gets nothing that a power cut could make unknown
            disk.mend()
            assert await sending == 5
            await read_results(table, "s", after=5)
            await wait_for_state(table, "s", State.IDLE)
        assert place.messages() == ["x", "second"]

    run(main())


def test_a_broken_disk_fails_the_session_and_acknowledges_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = BadDisk(monkeypatch)

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(spawn(text="x"))
            before = await read_results(table, "s")
            await wait_for_state(table, "s", State.IDLE)
            disk.sync_error = errno.EIO
            with pytest.raises(OSError, match="Input/output"):
                await table.send("s", "second")
            await wait_for_state(table, "s", State.FAILED)
            disk.mend()
            assert await read_all(table, "s") == before
            await table.send("s", "third")  # the disk is well again
            await read_results(table, "s", 2)
        assert place.messages() == ["x", "third"]

    run(main())


def test_a_damaged_session_can_be_read_and_takes_no_messages(place: Place) -> None:
    async def main() -> None:
        await one_turn(place)
        (place.sessions / "s" / "session.json").write_bytes(b'{"session_id": "s", "cla')
        async with place.table() as table:
            assert table.listing(everything=True)[0]["state"] == "failed"
            assert len(await read_all(table, "s")) == 4
            with pytest.raises(DataError, match="cannot go on"):
                await table.send("s", "x")
        assert (place.sessions / "s" / "session.json").read_bytes() == b'{"session_id": "s", "cla'

    run(main())


def test_a_session_whose_file_cannot_be_read_says_so_in_words(place: Place) -> None:
    async def main() -> None:
        await one_turn(place)
        (place.sessions / "s" / "session.json").unlink()
        (place.sessions / "s" / "session.json").mkdir()
        async with place.table() as table:
            with pytest.raises(DataError, match=r"cannot go on: session\.json: is a directory$"):
                await table.send("s", "x")

    run(main())


def test_a_directory_that_vanished_while_it_runs(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(spawn(text="x"))
            await read_results(table, "s")
            moved = place.path / "moved"
            session.path.rename(moved)
            await table.send("s", "second")
            await read_results(table, "s", 2)  # what is open stays readable
            moved.rename(session.path)

    run(main())
