"""Sessions that make room for others: who is put to sleep, how it is shown then, and what comes to it meanwhile."""

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from kit.real_claude import needs_claude, real_place
from kit.sessions import (
    Place,
    are_at_rest,
    eventually,
    outputs,
    prepare,
    read_results,
    read_until,
    run,
    wait_for_state,
)
from kit.stub_api import stub_api

from p2pclaude.errors import TryAgain
from p2pclaude.host.processes import Mark, marked
from p2pclaude.sessions import claude as claude_module
from p2pclaude.sessions import session as session_module
from p2pclaude.sessions import table as table_module
from p2pclaude.sessions.claude import ClaudeProcess
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import State


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


def test_who_is_idle_the_longest_makes_room(place: Place) -> None:
    async def main() -> None:
        async with place.table(max_sessions=2) as table:
            for name in ("a", "b"):
                await table.spawn(Spawn(session_id=name, text=f"in {name}"))
                await read_results(table, name)
            await table.send("a", "a again")
            await read_results(table, "a", 2)
            await table.spawn(Spawn(session_id="c", text="in c"))
            assert {s["sessionId"]: s["state"] for s in table.listing(everything=True)}["b"] == State.DORMANT
            await read_results(table, "c")
            # It is back with the next message, and that makes room in turn.
            await table.send("b", "b again")
            await read_results(table, "b", 2)
            assert sorted(s["sessionId"] for s in table.listing()) == ["b", "c"]
        assert place.messages() == ["in a", "in b", "a again", "in c", "b again"]

    run(main())


def test_a_session_with_something_in_the_background_is_left_alone(place: Place) -> None:
    async def main() -> None:
        async with place.table(max_sessions=1) as table:
            session, _ = await table.spawn(Spawn(session_id="a", text="LEAVE:bash -c 'set -m; sleep 60 &'"))
            await read_results(table, "a")
            mark = Mark.of_session(session.path)
            eventually(lambda: len(found := marked(mark)) == 2 and are_at_rest(one.pid for one in found))
            with pytest.raises(TryAgain, match="1 sessions run"):
                await table.spawn(Spawn(session_id="b", text="x"))
            assert [s["sessionId"] for s in table.listing()] == ["a"]

    run(main())


def test_helpers_of_claude_itself_keep_nobody_from_making_room(place: Place) -> None:
    async def main() -> None:
        async with place.table(max_sessions=1) as table:
            await table.spawn(Spawn(session_id="a", text="LEAVE:sleep 60 &"))  # in claude's own process group
            await read_results(table, "a")
            await table.spawn(Spawn(session_id="b", text="x"))
            assert [s["sessionId"] for s in table.listing()] == ["b"]

    run(main())


MCP_SERVER = """
import json, sys

for line in sys.stdin:
    request = json.loads(line)
    version = request.get("params", {}).get("protocolVersion")
    info = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"}}
    result = {"initialize": info, "tools/list": {"tools": []}}.get(request["method"], {})
    if "id" in request:
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
"""


@needs_claude
def test_real_claude_with_an_mcp_server_makes_room_unless_a_tool_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(place: Place) -> None:
        async with place.table(permission_mode="bypassPermissions") as table:
            session, _ = await table.spawn(Spawn(session_id="a", text="hello"))
            envelopes = await read_results(table, "a")
            [first] = [one for one in outputs(envelopes, "system") if one.get("subtype") == "init"]
            assert first["mcp_servers"] == [{"name": "x", "status": "connected"}]
            await table.send("a", "BACKGROUND: sleep 60")
            await read_results(table, "a", 2)
            await wait_for_state(table, "a", State.IDLE)
            assert not await session.sleep()
            await table.stop("a")
            session, _ = await table.spawn(Spawn(session_id="b", text="hello"))
            await read_results(table, "b")
            await wait_for_state(table, "b", State.IDLE)
            assert await session.sleep()

    with stub_api() as api:
        place = real_place(tmp_path, monkeypatch, api)
        (tmp_path / "server.py").write_text(MCP_SERVER)
        server = {"command": sys.executable, "args": [str(tmp_path / "server.py")]}
        (tmp_path / "home" / ".claude.json").write_text(json.dumps({"mcpServers": {"x": server}}))
        run(main(place))


@pytest.mark.parametrize("before", [None, "first"])
def test_a_message_to_a_session_that_makes_room_runs(
    place: Place, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    stop, going = ClaudeProcess.stop, asyncio.Event()

    async def stop_and_tell(process: ClaudeProcess, *, in_turn: bool = False) -> int | None:
        stopping = asyncio.create_task(stop(process, in_turn=in_turn))
        while (stdin := process._stdin()) is not None and not stdin.is_closing():
            await asyncio.sleep(0)
        going.set()
        return await stopping

    monkeypatch.setattr(ClaudeProcess, "stop", stop_and_tell)
    monkeypatch.setattr(table_module, "REVIVE_SECONDS", 0.05)

    async def main() -> None:
        async with place.table(max_sessions=1) as table:
            await table.spawn(Spawn(session_id="a", text=before))
            await wait_for_state(table, "a", State.IDLE)
            other = asyncio.create_task(table.spawn(Spawn(session_id="b", text="in b")))
            await going.wait()
            await table.send("a", "second")
            await other
            await read_results(table, "b")
            results = outputs(await read_results(table, "a", 1 if before is None else 2), "result")
            assert results[-1]["result"] == "echo: second"
        assert sorted(place.messages()) == [*filter(None, [before]), "in b", "second"]

    run(main())


def test_a_message_that_comes_before_stdin_is_closed_is_not_cut_short(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, look, looking, sent = place.path / "gate", ClaudeProcess._look_around, asyncio.Event(), asyncio.Event()

    async def look_slowly(process: ClaudeProcess) -> None:
        looking.set()
        await sent.wait()
        await look(process)

    monkeypatch.setattr(ClaudeProcess, "_look_around", look_slowly)
    monkeypatch.setattr(claude_module, "STOP_STEPS", ((None, 0.2), *claude_module.STOP_STEPS[1:]))

    async def main() -> None:
        async with place.table(max_sessions=1) as table:
            session, _ = await table.spawn(Spawn(session_id="a", text="first"))
            await wait_for_state(table, "a", State.IDLE)
            sleeping = asyncio.create_task(session.sleep())
            await looking.wait()
            await table.send("a", f"HOLD:{gate}")
            await asyncio.sleep(0.1)
            sent.set()
            await sleeping
            gate.touch()
            assert outputs(await read_results(table, "a", 2), "result")[-1]["result"] == f"echo: HOLD:{gate}"

    run(main())


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Give what lets the disk sync; it is set."""
    sync, ready = os.fdatasync, threading.Event()
    ready.set()

    def fdatasync(descriptor: int) -> None:
        ready.wait()
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return ready


def test_who_is_being_handed_a_message_is_not_at_rest(place: Place, disk: threading.Event) -> None:
    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="a", text="first"))
            await wait_for_state(table, "a", State.IDLE)
            disk.clear()
            sending = asyncio.create_task(table.send("a", "second"))
            try:
                while not session.inbox.handed:
                    await asyncio.sleep(0.01)
                assert not session.is_at_rest
            finally:
                disk.set()
            await sending
            await read_results(table, "a", 2)

    run(main())


def test_a_disk_that_takes_its_time_keeps_nobody_from_sleeping(place: Place, disk: threading.Event) -> None:
    gate = place.path / "gate"

    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="a", text=f"HOLD:{gate}"))
            await read_until(table, "a", lambda e: bool(e["type"] == "session-output"))  # it has its message
            disk.clear()
            gate.touch()
            try:
                await wait_for_state(table, "a", State.IDLE)
                assert await session.sleep()
            finally:
                disk.set()
            assert session.state is State.DORMANT
            await table.send("a", "second")
            assert outputs(await read_results(table, "a", 2), "result")[-1]["result"] == "echo: second"

    run(main())


def test_who_sleeps_after_an_error_is_dormant_as_well(place: Place) -> None:
    async def main() -> None:
        async with place.table(max_sessions=1) as table:
            await table.spawn(Spawn(session_id="a", text="ERR"))
            await wait_for_state(table, "a", State.IDLE)
            await table.spawn(Spawn(session_id="b", text="x"))
            output = await table.read("a", after=0, limit=None, clear=False, wait_ms=0)
            assert (output.state, output.error) == (State.DORMANT, None)

    run(main())


def test_a_disk_that_takes_its_time_over_the_last_words_leaves_no_session_without_claude(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "save_last_words", lambda *_: time.sleep(2.5))

    async def main() -> None:
        async with place.table() as table:
            session, _ = await table.spawn(Spawn(session_id="a", text="first"))
            await read_results(table, "a")
            await wait_for_state(table, "a", State.IDLE)
            assert await session.sleep()
            assert session.state == State.DORMANT
            await table.send("a", "second")
            async with asyncio.timeout(20):
                await read_results(table, "a", 2)

    run(main())
