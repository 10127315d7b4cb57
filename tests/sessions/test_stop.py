"""Stop stops: whatever claude and its tools do, after a stop and after the daemon's end nothing of it is left."""

import asyncio
import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from kit.bad_disk import BadDisk
from kit.daemons import client_of, daemon, marked, timed
from kit.real_claude import needs_claude, real_place
from kit.sessions import (
    PATIENT_STEPS,
    Place,
    are_at_rest,
    eventually,
    outputs,
    prepare,
    read_all,
    read_until,
    run,
    wait_for_state,
)
from kit.stub_api import StubApi, stub_api

from p2pclaude.daemon.daemon import SHUTDOWN_SECONDS
from p2pclaude.errors import Refused
from p2pclaude.host import processes as module
from p2pclaude.host.processes import Mark, descendants, processes
from p2pclaude.sessions import claude as claude_module
from p2pclaude.sessions.claude import ClaudeProcess, Launch
from p2pclaude.sessions.journal import Journal
from p2pclaude.sessions.journalfile import DiskFull
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State
from p2pclaude.sessions.session import Session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc, which only Linux has")

AT_ONCE = 25.0  # seconds: what a stop must not wait for lasts a thousand; it is a stop's own steps that take four

# What hides in a session of its own, without the mark, and from the signals that may be ignored.
LEAVES = "setsid -f sleep 1000; env -i sleep 1000 & setsid -f sh -c 'trap \"\" INT TERM HUP; while :; do sleep 1; done'"
# Answers once, ignores all that can be ignored, and so do its two helpers, one of them in a session of its own.
DEAF = """#!/bin/sh
trap '' INT TERM HUP
echo '{"type":"system","subtype":"deaf"}'
(while :; do sleep 1000; done) &
setsid -f sh -c 'while :; do sleep 1000; done'
while :; do sleep 1000; done
"""
DEAF_COUNT = 6  # of its processes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place with a fake claude, whose leftovers the test's own process has all the time to end."""
    monkeypatch.setattr(module, "END_SECONDS", 20.0)
    return prepare(tmp_path, monkeypatch)


def deafen(place: Place) -> None:
    """Let the place's claude ignore everything."""
    place.claude.write_text(DEAF)


def marked_in(place: Place) -> list[int]:
    """Give what carries the mark of a session of the place's own table."""
    return [process.pid for process in module.marked(Mark.of_sessions(place.sessions))]


def below(pid: int) -> set[int]:
    """Give what runs below a process."""
    return {process.pid for process in descendants(processes(), [pid])}


def settled(find: Callable[[], Iterable[int]], count: int) -> set[int]:
    """Wait until so many processes are found and each runs what it is meant to; give them."""
    found: set[int] = set()

    def have_settled() -> bool:
        nonlocal found
        found = set(find())
        return len(found) >= count and are_at_rest(found)

    eventually(have_settled)
    return found


def settled_family(session: Session, place: Place, count: int) -> set[int]:
    """Wait until a session's claude has started all that it starts; give both."""
    assert session.pid is not None
    pid = session.pid
    return settled(lambda: below(pid) | set(marked_in(place)), count)


def running(pids: set[int]) -> set[int]:
    """Give those of some processes that still run."""
    table = processes()
    return {pid for pid in pids if pid in table and not table[pid].is_zombie}


def test_nothing_that_the_tools_left_survives_a_stop(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="s", text=f"LEAVE:{LEAVES}"))
            await wait_for_state(table, "s", State.IDLE)
            family = settled_family(session, place, 4)
            with timed(AT_ONCE):
                assert await table.stop("s")
            assert not running(family)
            assert session.state is State.ENDED

    run(main())


def test_what_dropped_its_mark_and_kept_the_lock_does_not_keep_the_session_busy(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            pid = place.path / "pid"
            hidden = f"env -i PATH={shlex.quote(os.environ['PATH'])} setsid -f sh -c 'echo $$ >{pid}; exec sleep 1000'"
            session, _ = await table.spawn(Spawn(session_id="s", text=f"LEAVE:{hidden} </dev/null >/dev/null 2>&1"))
            await wait_for_state(table, "s", State.IDLE)
            eventually(lambda: pid.exists() and pid.read_text().strip() != "")
            assert session.pid is not None
            os.kill(session.pid, signal.SIGKILL)
            await wait_for_state(table, "s", State.FAILED)
            assert running({int(pid.read_text())})  # nothing tells whose it is, but the lock
            await table.send("s", "second")
            await wait_for_state(table, "s", State.IDLE)
            assert not running({int(pid.read_text())})
        assert place.messages()[1:] == ["second"]

    run(main())


def test_nothing_that_the_tools_left_survives_a_claude_that_dies(place: Place) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="s", text="LEAVE:setsid -f sleep 1000"))
            await wait_for_state(table, "s", State.IDLE)
            settled_family(session, place, 2)
            assert session.pid is not None
            os.kill(session.pid, signal.SIGKILL)
            await wait_for_state(table, "s", State.FAILED)
            assert marked_in(place) == []

    run(main())


def test_an_interrupt_brings_the_result_of_the_turn(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[signal.Signals] = []
    monkeypatch.setattr(ClaudeProcess, "_signal", lambda process, number: signals.append(number))

    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="s", text="HOLD:/never"))
            await read_until(table, "s", lambda e: bool(e["type"] == "session-output"))
            await table.stop("s")
            assert signals == []  # none was needed
            assert session.info.exit_status == 0
            assert outputs(await read_all(table, "s"), "result")[0]["result"] == "interrupted"

    run(main())


def test_a_message_that_comes_while_its_session_is_ended_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would never run, and whoever sent it shall know."""
    stop = ClaudeProcess.stop

    async def main() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def stop_slowly(process: ClaudeProcess, **how: bool) -> int | None:
            begun.set()
            await go_on.wait()
            return await stop(process, **how)

        monkeypatch.setattr(ClaudeProcess, "stop", stop_slowly)
        async with place.table() as table:
            session, seq = await table.spawn(Spawn(session_id="s", text="first", message_id="m"))
            await wait_for_state(table, "s", State.IDLE)
            stopping = asyncio.create_task(table.stop("s"))
            await begun.wait()
            with pytest.raises(Refused, match="Session has ended"):
                await table.send("s", "late")
            assert await table.send("s", "first", "m") == seq  # accepted long ago, and done
            go_on.set()
            assert await stopping
            assert session.state is State.ENDED
            assert place.messages() == ["first"]

    run(main())


def test_a_flood_is_drained_to_the_end_of_the_child(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_module, "STOP_STEPS", ((None, 1.0), *PATIENT_STEPS[1:]))  # it heeds signals alone

    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="s", text="FLOOD"))
            await read_until(table, "s", lambda e: bool(e.get("data", {}).get("type") == "assistant"))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with timed(AT_ONCE):
                await table.stop("s")
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            assert grown < 256, f"{grown:.0f} MiB"
            assert marked_in(place) == []
            # What it said last was heard: nothing between was lost. If it stood in the middle of another line it was no
            # result, and the cut of the turn comes after it.
            last = await read_all(table, "s", after=session.last_seq - 2)
            said = last[0] if last[-1]["type"] == "turn-cut" else last[-1]
            assert "interrupted" in json.dumps(said)

    run(main(), 60)


def test_a_full_disk_holds_up_no_stop(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Journal, data: bytes, kind: str) -> int:
        raise DiskFull("no space left on the disk")

    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="s"))
            monkeypatch.setattr(Journal, "append_output", refuse)
            await table.send("s", f"LEAVE:{LEAVES}")
            await wait_for_state(table, "s", State.PAUSED)
            settled_family(session, place, 4)
            with timed(AT_ONCE):
                await table.stop("s")
            assert marked_in(place) == []
            assert session.state is State.ENDED

    run(main())


def test_the_end_of_a_session_that_was_stopped_on_a_full_disk_is_said_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = BadDisk(monkeypatch)

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s", text=f"HOLD:{place.path / 'hold'}"))
            await wait_for_state(table, "s", State.RUNNING)
            disk.is_full = True
            (place.path / "hold").touch()
            await wait_for_state(table, "s", State.PAUSED)
            assert await table.stop("s")
            disk.mend()
            while not place.log.events("turn-cut"):  # it is written as soon as there is room
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
        assert [event["state"] for event in place.log.events("session-ended")] == ["ended"]

    run(main(), 15)


def test_half_a_line_at_the_end_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_module, "STOP_STEPS", ((None, 0.1), *PATIENT_STEPS[1:]))  # it heeds signals alone
    script = """#!/bin/sh
printf '\\377\\376 garbage\\n{"type":"assistant","half'
exec sleep 1000
"""
    place.claude.write_text(script)

    async def main() -> None:
        async with place.table() as table:
            await table.spawn(Spawn(session_id="s"))
            await read_until(table, "s", lambda e: bool(e.get("data", {}).get("type") == "unparsed"))
            with timed(AT_ONCE):
                await table.stop("s")
            texts = [one["text"] for one in outputs(await read_all(table, "s"), "unparsed")]
            assert texts == ["\ufffd\ufffd garbage", '{"type":"assistant","half']

    run(main())


def test_a_child_that_cannot_be_ended_holds_up_no_stop(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs in the kernel is left behind and named; what it started is not."""
    deafen(place)
    steps = tuple((None if number == signal.SIGKILL else number, 0.05) for number, _ in claude_module.STOP_STEPS)
    monkeypatch.setattr(claude_module, "STOP_STEPS", steps)
    end_leftovers = ClaudeProcess._end_leftovers

    async def unable(self: ClaudeProcess) -> None:
        pass

    monkeypatch.setattr(ClaudeProcess, "_end_leftovers", unable)

    async def main() -> None:
        process = await ClaudeProcess.start(
            Launch(place.claude, place.root, "plan", "ID"), mark=Mark.of_session(place.sessions / "s")
        )
        settled(lambda: marked_in(place), DEAF_COUNT)
        with timed(AT_ONCE):
            assert await process.stop() is None
        process.kill()
        assert await process.finish() == -signal.SIGKILL
        await end_leftovers(process)
        assert marked_in(place) == []

    run(main())


# The daemon as a process


async def spawn_all(place: Place, count: int, text: str | None = None) -> None:
    """Start sessions through the daemon."""
    async with client_of(place) as client:
        for number in range(count):
            params = {"sessionId": f"s{number}"} | ({} if text is None else {"text": text})
            answer = await client.call("spawn-session", params)
            assert isinstance(answer, dict) and answer["type"] == "success", answer


def settled_deaf(place: Place, sessions: int) -> None:
    """Wait until each of the daemon's sessions has started all that ignores everything."""
    settled(lambda: (one.pid for one in marked(place)), sessions * DEAF_COUNT)


def states(place: Place) -> set[str]:
    """Give the states that stand in session.json."""
    files = (place.path / "data" / "sessions").glob("*/session.json")
    return {json.loads(file.read_text())["state"] for file in files}


def test_the_daemon_ends_64_sessions_that_ignore_everything_in_time(place: Place) -> None:
    deafen(place)
    with daemon(place) as process:
        run(spawn_all(place, 64), 120)
        settled_deaf(place, 64)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        took = time.monotonic() - begin
        eventually(lambda: not marked(place))
        assert took < 3 * SHUTDOWN_SECONDS, took  # on a busy machine; one after the other they would take 200 s
        assert states(place) == {"dormant"}


def test_a_second_signal_leaves_nothing_running_either(place: Place) -> None:
    deafen(place)
    with daemon(place) as process:
        run(spawn_all(place, 2))
        settled_deaf(place, 2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        while '"daemon-stopping"' not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        eventually(lambda: not marked(place))  # they were killed, and nobody is left who waits for their end


def test_the_next_daemon_ends_what_a_killed_one_left(place: Place) -> None:
    deafen(place)
    with daemon(place) as process:
        run(spawn_all(place, 3))
        process.kill()
        process.wait()
        settled_deaf(place, 3)
        with daemon(place) as other:
            eventually(lambda: not marked(place))  # at once, but that it has no more than a second for it
            other.send_signal(signal.SIGTERM)
            _, err = other.communicate(timeout=30)
            assert err == ""
        assert states(place) == {"dormant"}


def test_orphans_do_not_pile_up_below_the_daemon(place: Place) -> None:
    pids = place.path / "pids"
    orphan = f"setsid -f sh -c 'echo $$ >>{shlex.quote(str(pids))}; exec sleep 0.2'"
    lasting = place.path / "lasting"
    stays = f"setsid -f sh -c 'echo $$ >>{shlex.quote(str(lasting))}; exec sleep 1000'"

    def children() -> set[int]:
        return {one.pid for one in processes().values() if one.parent == process.pid}

    with daemon(place) as process:
        run(spawn_all(place, 3, f"LEAVE:for i in 1 2 3; do {orphan}; done; {stays}"))
        eventually(lambda: pids.exists() and len(pids.read_text().split()) == 9)
        eventually(lambda: not {int(pid) for pid in pids.read_text().split()} & set(processes()))  # no zombie either
        # They came to the daemon, and it reaped them, as those show that last.
        eventually(lambda: lasting.exists() and len(set(map(int, lasting.read_text().split())) & children()) == 3)


# The real claude, with a tool in the foreground and others behind it


@pytest.fixture
def api() -> Iterator[StubApi]:
    """Serve the stub of the Messages API."""
    with stub_api() as server:
        yield server


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: StubApi) -> Place:
    """Give a place whose daemon runs the real claude."""
    return real_place(tmp_path, monkeypatch, api)


def tool(place: Place, name: str) -> str:
    """Give a message that makes claude run a tool which leaves two processes and goes on, and shows that it runs."""
    runs = shlex.quote(str(place.path / name))
    return f"TOOL:{LEAVES}; nohup sleep 1000 >/dev/null 2>&1 & touch {runs}; sleep 1000"


async def begin_tool(place: Place) -> None:
    """Start a session whose turn runs the tool."""
    async with client_of(place) as client:
        params = {"sessionId": "s", "text": tool(place, "runs"), "permissionMode": "bypassPermissions"}
        answer = await client.call("spawn-session", params)
        assert isinstance(answer, dict) and answer["type"] == "success", answer
        while not (place.path / "runs").exists():
            await asyncio.sleep(0.05)


@needs_claude
@pytest.mark.parametrize("how", ["stop", "terminate", "kill"])
def test_real_claude_leaves_no_tool_behind(real: Place, how: str) -> None:
    with daemon(real, permission_mode="bypassPermissions") as process:
        run(begin_tool(real), 60)
        family = below(process.pid) | {one.pid for one in marked(real)}
        assert len(family) >= 6  # claude, its shell, and four sleepers
        if how == "stop":
            run(stop_session(real), 30)
            assert states(real) == {"ended"}
        elif how == "terminate":
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert states(real) == {"dormant"}
        else:
            process.kill()
            process.wait()
            assert running(family)
            with daemon(real) as other:
                # Its turn was begun, and so it goes on: with a claude of the new daemon, and nothing of the old one.
                eventually(lambda: {one.pid for one in marked(real)} <= below(other.pid))
                # Without a parent that watched, only what kept the mark is known.
                eventually(lambda: all(map(is_bare, running(family))))
                for pid in running(family):
                    with contextlib.suppress(ProcessLookupError):  # one that was about to end looks bare, too
                        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not running(family))
        shutil.rmtree(real.path / "home", ignore_errors=True)


def is_bare(pid: int) -> bool:
    """Tell whether a process was started with an empty environment; of one that has just ended nobody knows."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() == b""
    except OSError:
        return False


async def stop_session(place: Place) -> None:
    """Stop the session."""
    async with client_of(place) as client:
        assert await client.call("stop-session", {"sessionId": "s"}) == {"success": True}
