"""The child process: finding it, its command line, its pipes, its end; then the contract with the real CLI."""

import asyncio
import json
import os
import shlex
import shutil
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.real_claude import needs_claude, real_place
from kit.sessions import PATIENT_STEPS, Place, outputs, read_all, read_results, read_until, run
from kit.stub_api import StubApi, stub_api

from p2pclaude.client.remote_sessions import AnswerFinder
from p2pclaude.errors import Unavailable
from p2pclaude.protocol.wire import REPLAY, dump_json, load_json
from p2pclaude.sessions import claude as claude_module
from p2pclaude.sessions.claude import (
    ClaudeGone,
    ClaudeProcess,
    Launch,
    child_environment,
    decode_line,
    find_claude,
    has_conversation,
    user_message,
)
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State
from p2pclaude.sessions.table import SessionTable

# Finding it


def program(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


def test_claude_is_found_where_it_is(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environ = {"PATH": str(tmp_path / "bin"), "HOME": str(home)}
    for place in ("node_modules/.bin", ".npm-global/bin"):
        usual = program(home / place / "claude")
        assert find_claude(None, environ) == usual
    on_path = program(tmp_path / "bin" / "claude")
    assert find_claude(None, environ) == on_path
    other = program(tmp_path / "bin" / "claude-beta")
    assert find_claude("claude-beta", environ) == other
    assert find_claude(str(other), environ) == other


def test_no_claude_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_module, "_USUAL_PLACES", ("~/.claude/local",))
    program(tmp_path / ".claude" / "local" / "claude", mode=0o644)
    environ = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    with pytest.raises(Unavailable, match="not found") as caught:
        find_claude(None, environ)
    assert caught.value.hint is not None
    assert "npm install" in caught.value.hint
    with pytest.raises(Unavailable, match="not found"):
        find_claude(None, {"PATH": ""})
    with pytest.raises(Unavailable, match="not a program") as caught:
        find_claude(str(tmp_path / "none"), environ)
    assert caught.value.hint == "check --claude"


# Its words


def test_the_command_line() -> None:
    launch = Launch(Path("/c"), Path("/d"), "plan", "ID", model="m")
    words = "/c --output-format stream-json --input-format stream-json --verbose --permission-mode plan"
    assert launch.command() == [*words.split(), "--session-id=ID", "--replay-user-messages", "--model=m"]
    assert Launch(Path("/c"), Path("/d"), "plan", "ID", resume=True).command()[-2] == "--resume=ID"


def test_the_environment() -> None:
    child = child_environment({"CLAUDECODE": "1", "A": "b", "CLAUDE_CODE_ENTRYPOINT": "cli"})
    assert child == {"A": "b", "CLAUDE_CODE_ENTRYPOINT": "p2p-daemon"}


def test_a_message_id_always_gives_the_same_uuid() -> None:
    known = str(uuid.uuid4())
    assert user_message("x", known)["uuid"] == known
    assert user_message("x", "m1")["uuid"] == user_message("y", "m1")["uuid"] != user_message("x", "m2")["uuid"]
    uuid.UUID(user_message("x", "\ud800 any text")["uuid"])
    # Claude ignores a uuid that comes again, but this is another message.
    assert user_message("x", known.upper())["uuid"] != known
    assert user_message("hé", known)["message"] == {"role": "user", "content": "hé"}


def test_a_conversation_is_known_by_its_transcript(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert has_conversation("ID", environ) is None
    project = tmp_path / ".claude" / "projects" / "-work"
    project.mkdir(parents=True)
    assert has_conversation("ID", environ) is False
    (project / "ID.jsonl").touch()
    assert has_conversation("ID", environ) is True
    assert has_conversation("*", environ) is False
    elsewhere = {"HOME": "/nowhere", "CLAUDE_CONFIG_DIR": str(tmp_path / ".claude")}
    assert has_conversation("ID", elsewhere) is True


def test_a_home_that_may_not_be_entered_holds_no_claude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> os.stat_result:
        raise PermissionError(13, "Permission denied")  # as under systemd's ProtectHome

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(claude_module, "_USUAL_PLACES", ("~/.local/bin",))
    with pytest.raises(Unavailable, match="not found"):
        find_claude(None, {"PATH": "", "HOME": str(tmp_path / "home")})


def test_objects_stay_as_they_are_and_anything_else_is_kept() -> None:
    line = b' {"a": 1.0, "b":"\\u00e9"}\r'
    assert decode_line(line) == (line.strip(), {"a": 1.0, "b": "é"})
    for bad in (b"text", b"[1]", b'{"half', b"\xff", b'{"a":NaN}', b'{"a":1e400}', b"[" * 100_000):
        data, value = decode_line(bad)
        assert value == {"type": "unparsed", "text": bad.decode("utf-8", "replace")}
        assert json.loads(data) == value


def test_every_line_that_is_kept_can_be_read_again_inside_of_a_page() -> None:
    kinds = set()
    for depth in (*range(100, 900, 100), *range(900, 1000)):
        kept, value = decode_line(b'{"type":"deep","a":' + b"[" * depth + b"]" * depth + b"}")
        kinds.add(value["type"])
        page = load_json(b'{"messages":[{"data":' + b"[" * 100 + kept + b"]" * 100 + b"}]}")
        dump_json(page)
    assert kinds == {"deep", "unparsed"}
    wide = b'{"a":[' + b"{}," * 5000 + b"{}]}"
    assert decode_line(wide)[0] == wide


# Its pipes


def test_what_json_makes_longer_than_a_line_may_be_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_module, "MAX_LINE", 10_000)
    for bad in (b"\x01", b"\xff", b'"'):
        data, value = decode_line(bad * 10_000)
        assert load_json(data) == value
        assert len(data) < 10_000 + 100
        assert len(value["text"]) > 1000
    assert decode_line(b"x" * 9_000)[1]["text"] == "x" * 9_000


async def start(tmp_path: Path, script: str) -> ClaudeProcess:
    """Start a Python script in claude's stead."""
    (tmp_path / "script.py").write_text(script)
    path = tmp_path / "child"
    command = shlex.join([sys.executable, "-S", "-E", str(tmp_path / "script.py")])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return await ClaudeProcess.start(Launch(path, tmp_path, "plan", "ID"))


async def lines_of(process: ClaudeProcess) -> list[bytes]:
    return [line async for line in process]


def test_lines_and_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        script = "import sys; print('one'); print(); sys.stdout.write('half'); sys.stderr.write('x' * 9999 + 'end')"
        process = await start(tmp_path, script + "; sys.exit(4)")
        assert await lines_of(process) == [b"one", b"half"]
        assert await process.finish() == 4
        assert process.last_words() == "x" * 4093 + "end"
        with pytest.raises(ClaudeGone):
            process.write({})
        process.kill()
        assert await process.stop() == 4

    run(main())


def test_a_reader_that_waits_holds_the_child_up_and_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        script = "for n in range(3000):\n print('%05d' % n + 'x' * 10_000, flush=True)"
        process = await start(tmp_path, script)
        while not process._pipes._paused:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # in which it would go on
        assert process._pipes._queued < 4 * 1024 * 1024
        lines = await lines_of(process)
        assert [int(line[:5]) for line in lines] == list(range(3000))
        assert await process.finish() == 0

    run(main())


def test_nothing_is_kept_of_what_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a session that was stopped on a full disk, which is kept for as long as the daemon runs."""
    monkeypatch.setattr(claude_module, "_LINGER_SECONDS", 0.05)
    looks, abandon = 0, claude_module._Pipes._abandon

    def count(pipes: claude_module._Pipes) -> None:
        nonlocal looks
        looks += 1
        abandon(pipes)

    monkeypatch.setattr(claude_module._Pipes, "_abandon", count)

    async def main() -> None:
        process = await start(tmp_path, "while True:\n print('x' * 100_000, flush=True)")
        while not process._pipes._paused:
            await asyncio.sleep(0.01)
        process.kill()
        assert await process.finish() == -signal.SIGKILL
        await asyncio.sleep(0.1)
        before = looks
        await asyncio.sleep(0.3)
        assert looks == before
        assert not process._pipes._lines

    run(main())


def test_a_grandchild_that_holds_the_pipes_holds_up_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        script = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
        process = await start(tmp_path, script)
        (line,) = await lines_of(process)
        os.kill(int(line), signal.SIGKILL)
        assert await process.finish() == 0

    run(main())


def test_a_line_without_end_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_module, "MAX_LINE", 100_000)

    async def main() -> None:
        script = "import sys\nprint('first')\nwhile True: sys.stdout.write('x' * 10_000)"
        process = await start(tmp_path, script)
        assert await lines_of(process) == [b"first"]
        assert await process.finish() == -signal.SIGKILL
        assert "longer than 100000 bytes" in process.last_words()

    run(main())


def test_what_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        broken = program(tmp_path / "broken")
        broken.write_text("#!/nowhere/at/all\n")
        for launch in (
            Launch(tmp_path / "none", tmp_path, "plan", "ID"),
            Launch(broken, tmp_path, "plan", "ID"),
            Launch(Path("/bin/true"), tmp_path / "none", "plan", "ID"),
            Launch(Path("/bin/true"), tmp_path, "plan", "ID", model="a\0b"),
        ):
            with pytest.raises(Unavailable, match="could not be started"):
                await ClaudeProcess.start(launch)

    run(main())


# The contract with the real CLI, against a stub of the Messages API


@pytest.fixture(scope="module")
def api() -> Iterator[StubApi]:
    """Serve the stub of the Messages API."""
    with stub_api() as server:
        yield server


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: StubApi) -> Place:
    """Give a place where sessions run the real claude."""
    return real_place(tmp_path, monkeypatch, api)


def with_real(place: Place, work: Callable[[SessionTable], Awaitable[None]]) -> None:
    """Run a test's coroutine with a table over the real claude."""

    async def main() -> None:
        async with place.table(permission_mode="bypassPermissions") as table:
            await work(table)

    run(main(), 90)


def results(envelopes: list[dict[str, Any]]) -> list[str]:
    return [one["result"].strip() for one in outputs(envelopes, "result")]


@needs_claude
def test_real_turns_and_three_readers(real: Place) -> None:
    async def work(table: SessionTable) -> None:
        session_id = str(uuid.uuid4())
        await table.spawn(Spawn(session_id=session_id, text="hello"))
        readers = [asyncio.create_task(read_results(table, session_id, 3)) for _ in range(3)]
        for text in (f"WRITE:{real.root / 'file'}", "again"):
            await table.send(session_id, text)
        first, *others = await asyncio.gather(*readers)
        assert all(other == first for other in others)
        assert [e["seq"] for e in first] == list(range(1, len(first) + 1))
        said = results(first)
        assert (said[0], said[2]) == ("echo: hello", "echo: again")
        assert said[1].startswith("tool said:")
        assert (real.root / "file").read_text() == "hello\n"
        init = next(one for one in outputs(first, "system") if one["subtype"] == "init")
        assert (init["session_id"], init["cwd"]) == (session_id, str(real.root))

    with_real(real, work)


@needs_claude
def test_real_long_line_and_two_sessions_at_once(real: Place) -> None:
    async def work(table: SessionTable) -> None:
        size = 3_000_000
        (one, _), (two, _) = await asyncio.gather(
            table.spawn(Spawn(session_id="not-a-uuid", text=f"BIG:{size}")), table.spawn(Spawn(text="meanwhile"))
        )
        big, small = await asyncio.gather(
            read_results(table, one.info.session_id), read_results(table, two.info.session_id)
        )
        text = outputs(big, "assistant")[0]["message"]["content"][0]["text"]
        assert text.strip() == "z" * size
        assert results(small) == ["echo: meanwhile"]
        assert one.pid != two.pid

    with_real(real, work)


@needs_claude
def test_real_stop_in_a_turn_then_an_error_and_resume(
    real: Place, api: StubApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claude_module, "STOP_STEPS", PATIENT_STEPS)

    async def work(table: SessionTable) -> None:
        await table.spawn(Spawn(session_id="slow", text="SLOW:99"))
        session, _ = await table.spawn(Spawn(session_id="s", text="remember me"))
        while not any("SLOW:99" in json.dumps(request) for request in api.requests):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # its answer has begun, and takes 50 s
        await table.stop("slow")
        assert [s["sessionId"] for s in table.listing()] == ["s"]
        assert outputs(await read_all(table, "slow"), "result")
        await table.send("s", "ERR:400")
        failed = outputs(await read_results(table, "s", 2), "result")[1]
        assert failed["is_error"] is True
        await session.put_away()  # as when the daemon ends
        seq = await table.send("s", "and now?")
        await read_results(table, "s", after=seq)
        init = outputs(await read_all(table, "s"), "system")[-1]
        assert session.info.claude_id == init["session_id"]
        assert session.info.permission_mode == init["permissionMode"] == "default"

    with_real(real, work)


async def spawn_to_a_turn_of_its_own(table: SessionTable) -> None:
    """Start a session `s`, and wait until Claude has begun a turn because a task in the background has ended."""
    session, _ = await table.spawn(Spawn(session_id="s", text="BACKGROUND:sleep 0.5"))
    await read_results(table, "s")
    await read_until(table, "s", lambda e: e.get("data", {}).get("subtype") == "task_notification")
    while session.state is not State.RUNNING:
        await asyncio.sleep(0.01)


@needs_claude
def test_real_turn_that_claude_begins_by_itself(real: Place) -> None:
    async def work(table: SessionTable) -> None:
        await spawn_to_a_turn_of_its_own(table)
        seq = await table.send("s", "mine")
        envelopes = await read_results(table, "s", 2, after=seq)
        own, mine = outputs(envelopes, "result")
        assert own["origin"]["kind"] == "task-notification" and own["result"].startswith("the task has ended")
        assert mine["result"].strip() == "echo: mine" and "origin" not in mine
        replays = [one["data"]["uuid"] for one in envelopes if one["type"] == REPLAY]
        assert replays == [e["data"]["uuid"] for e in await read_all(table, "s") if e["seq"] == seq]
        theirs = await table.read("s", after=None, limit=None, clear=False, wait_ms=0)
        assert theirs.page.lines and not any(b"isReplay" in line for line in theirs.page.lines)

    with_real(real, work)


@needs_claude
def test_real_urgent_message_that_ends_a_turn_of_claudes_own_before_one_that_waits(real: Place) -> None:
    async def work(table: SessionTable) -> None:
        await spawn_to_a_turn_of_its_own(table)
        seqs = [await table.send("s", "waits"), await table.send("s", "urgent", priority="now")]
        envelopes = await read_results(table, "s", 3, after=seqs[0])
        said = [one.get("result", "").strip() for one in outputs(envelopes, "result")]  # none if it was cut at once
        assert said[1:] == ["echo: urgent", "echo: waits"]
        assert [entry.get("seq") for entry in real.log.events("turn-ended")] == [1, None, *reversed(seqs)]
        for seq, answer in zip(seqs, ("echo: waits", "echo: urgent"), strict=True):
            finder = AnswerFinder(seq)
            found = [one for e in envelopes if e["seq"] > seq and (one := finder.feed(e)) is not None]
            assert found[0]["result"].strip() == answer

    with_real(real, work)


@needs_claude
def test_real_commands_of_claudes_own_are_answered(real: Place) -> None:
    async def work(table: SessionTable) -> None:
        await table.spawn(Spawn(session_id="s", text="hello"))
        await read_results(table, "s")
        for text in ("enough to compact", "/compact", "/context"):
            seq = await table.send("s", text)
            finder = AnswerFinder(seq)
            found = [one for e in await read_results(table, "s", after=seq) if (one := finder.feed(e)) is not None]
            assert [one["is_error"] for one in found] == [False], text

    with_real(real, work)


@needs_claude
def test_real_resume_of_a_session_whose_first_turn_was_cut_short(real: Place) -> None:
    async def work(table: SessionTable) -> None:
        session, _ = await table.spawn(Spawn(session_id="s", text="SLOW:4"))
        await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
        session.kill()
        await read_until_over(table, "s")
        assert session.state is State.FAILED
        seq = await table.send("s", "still there?")
        envelopes = await read_until(
            table, "s", lambda e: "echo: still there?" in str(e.get("data", {}).get("result")), after=seq
        )
        assert results(envelopes)[-1] == "echo: still there?"

    with_real(real, work)


async def read_until_over(table: SessionTable, session: str) -> None:
    while (await table.read(session, after=2**53 - 1, limit=None, clear=False, wait_ms=20_000)).state != State.FAILED:
        pass


@needs_claude
def test_real_claude_that_refuses_to_start_tells_why(real: Place) -> None:
    async def work(table: SessionTable) -> None:
        session_id = str(uuid.uuid4())
        await table.spawn(Spawn(session_id=session_id, text="x"))
        await read_results(table, session_id)
        await table.stop(session_id)
        shutil.rmtree(real.sessions / session_id)
        del table._sessions[session_id]
        # The id is free here, but not in Claude's own memory: it dies, later than "at once".
        try:
            await table.spawn(Spawn(session_id=session_id, text="y"))
            output = await table.read(session_id, after=2, limit=None, clear=False, wait_ms=20_000)
            (cut,) = map(load_json, output.page.lines)
            assert (cut["type"], cut["again"]) == ("turn-cut", True)
            after = output.page.next
            while output.state is State.RUNNING:  # the journal knows first
                output = await table.read(session_id, after=after, limit=None, clear=False, wait_ms=20_000)
            assert output.state is State.FAILED
            reason = output.error or ""
        except Unavailable as error:
            reason = str(error)
        assert "already in use" in reason

    with_real(real, work)
