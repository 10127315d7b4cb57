"""Every session's requests in one list: what is in it, waiting for another, whose request is answered."""

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from kit.asking import BOTH, LS, Caller, on_table, replies
from kit.sessions import Place, prepare, read_results, read_until

from p2pclaude.daemon import request_list
from p2pclaude.daemon.methods import MethodError
from p2pclaude.protocol.wire import PERMISSION_REQUEST
from p2pclaude.sessions.life import State


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


def test_a_list_that_is_too_long_is_cut_and_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_list, "MAX_LIST_BYTES", 700)

    async def work(call: Caller) -> None:
        await call.spawn("ASK:" + 'Bash {"n":1}\n' * 9)
        await call.pending(9)
        first = await call("list-permissions")
        shown = [request["requestId"] for request in first["requests"]]
        assert 1 <= len(shown) < 9
        assert first["omitted"] == 9 - len(shown)
        for request in first["requests"]:
            await call.answer(request, behavior="allow")
        second = await call("list-permissions", version=first["version"], waitMs=20_000)
        assert not {request["requestId"] for request in second["requests"]} & set(shown)

    on_table(place, work)


def test_the_oldest_comes_first_whatever_the_clock_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is set back by an hour whenever somebody looks at it."""
    hours = itertools.count(1_000_000, -1)
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * 3_600_000_000_000)

    async def work(call: Caller) -> None:
        await call.spawn("ASK:" + 'Bash {"n":1}\n' * 3)
        said = await read_until(call.table, "s", lambda e: bool(e["seq"] >= 2 + 1 + 3 * 2))
        journaled = [e["requestId"] for e in said if e["type"] == PERMISSION_REQUEST]
        shown = await call.pending(3)  # each is journaled first
        assert [request["requestId"] for request in shown] == journaled
        assert shown[0]["createdAt"] > shown[2]["createdAt"]

    on_table(place, work)


def test_waiting_for_another_set(place: Place) -> None:
    async def work(call: Caller) -> None:
        nothing = await call("list-permissions")
        waiting = asyncio.create_task(call("list-permissions", version=nothing["version"], waitMs=30_000))
        assert (await call("list-permissions", version=nothing["version"], waitMs=50)) == nothing
        assert not waiting.done()
        await call.spawn(LS)
        found = await waiting
        assert len(found["requests"]) == 1
        assert found["version"] != nothing["version"]
        waiting = asyncio.create_task(call("list-permissions", sessionId="s", version=found["version"], waitMs=30_000))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await call.table.stop("s")
        assert (await waiting)["requests"] == []
        over = await call("list-permissions", sessionId="s", version=nothing["version"], waitMs=30_000)
        assert over == {"requests": [], "version": nothing["version"], "state": "ended"}

    on_table(place, work)


def test_what_is_wrong_with_the_parameters(place: Place) -> None:
    async def work(call: Caller) -> None:
        assert await call("list-permissions", sessionId="nope") == {"requests": [], "version": "", "state": None}
        for params in ({"sessionId": 5}, {"version": 5}, {"waitMs": -1}):
            with pytest.raises(MethodError):
                await call("list-permissions", **params)

        async def error(**params: Any) -> str:
            answer = await call("answer-permission", **params)
            assert answer["success"] is False
            return str(answer["error"])

        assert await error() == "behavior must be allow or deny"
        bad: list[Any] = [{}, "", "x" * 257]
        for request_id in bad:
            assert "requestId" in await error(behavior="allow", requestId=request_id)
        assert await error(behavior="allow", requestId="r") == "Request not found"
        assert await error(behavior="allow", requestId="r", sessionId="nope") == "Session not found"
        await call("spawn-session", sessionId="s", text="x")
        assert await error(behavior="allow", requestId="r", sessionId="s") == "Request not found"

    on_table(place, work)


def test_two_sessions_with_the_same_request(place: Place) -> None:
    """Ids are Claude's, and nothing says that they differ from session to session."""
    said = {"type": "control_request", "request_id": "r"}
    said["request"] = {"subtype": "can_use_tool", "tool_name": "Bash", "input": {}}  # type: ignore[assignment]

    async def work(call: Caller) -> None:
        for session in ("a", "b"):
            await call.spawn("SAY:" + json.dumps(said), session)
        await call.pending(2)
        answer = await call("answer-permission", requestId="r", behavior="allow")
        assert "several sessions" in answer["error"]
        for session in ("a", "b"):
            answer = await call("answer-permission", sessionId=session, requestId="r", behavior="allow")
            assert answer == {"success": True}

    on_table(place, work)


def test_several_requests_of_several_sessions(place: Place) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(BOTH, "a")
        await call.spawn(LS, "b")
        requests = await call.pending(3)
        assert [request["sessionId"] for request in requests if request["toolName"] == "Bash"] == ["a", "b"]
        assert len(await call.pending(2, sessionId="a")) == 2
        [mine] = await call.pending(1, sessionId="b")
        await call.answer(mine, behavior="allow")
        assert {request["sessionId"] for request in await call.pending(2)} == {"a"}
        for request in await call.pending(2):
            assert call.table.find("a").state is State.WAITING
            await call.answer(request, behavior="deny", message=request["toolName"])
        assert [told["message"] for told in replies(await read_results(call.table, "a"))] == ["Bash", "Write"]

    on_table(place, work)


def test_interrupting_what_has_no_turn(place: Place) -> None:
    async def work(call: Caller) -> None:
        missing = {"success": False, "error": "Session not found"}
        assert await call("interrupt-session", sessionId="nope") == missing
        assert (await call("interrupt-session"))["error"] == "sessionId is missing"
        await call("spawn-session", sessionId="s", text="x")
        await call("stop-session", sessionId="s")
        assert await call("interrupt-session", sessionId="s") == {"success": True}

    on_table(place, work)


def test_a_question_is_answered(place: Place) -> None:
    async def work(call: Caller) -> None:
        await call.spawn('ASK:AskUserQuestion {"questions":[{"question":"Which colour?"}]}')
        [request] = await call.pending()
        bad = await call.answer(request, behavior="allow", answers={"Which size?": "L"})
        assert "a question that was asked" in bad["error"]
        assert await call.answer(request, behavior="allow", answers={"Which colour?": "red"}) == {"success": True}
        [told] = replies(await read_results(call.table, "s"))
        assert told["updatedInput"]["answers"] == {"Which colour?": "red"}

    on_table(place, work)
