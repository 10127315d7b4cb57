"""The seven methods in the shapes of the wire contract, and every parameter that is not what it should be."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.sessions import Place, prepare, read_results, run

from p2pclaude import __version__
from p2pclaude.daemon.methods import MethodError, Methods
from p2pclaude.errors import Unavailable
from p2pclaude.sessions.table import SessionTable

Call = Callable[..., Awaitable[Any]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place whose fake claudes write to its log."""
    return prepare(tmp_path, monkeypatch)


def on_methods(place: Place, work: Callable[[Call, SessionTable], Awaitable[None]], **changes: Any) -> None:
    """Run a test's coroutine with a way to call methods and the table below."""

    async def main() -> None:
        async with place.table(**changes) as table:
            methods = Methods(table)

            async def call(method: str, **params: Any) -> Any:
                return json.loads(await methods.call(method, params))

            await work(call, table)

    run(main())


def test_what_the_typescript_client_does(place: Place) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        spawned = await call("spawn-session", directory=str(place.root), sessionId="s", permissionMode="acceptEdits")
        assert spawned == {"type": "success", "sessionId": "s", "pid": spawned["pid"]}
        assert isinstance(spawned["pid"], int)
        assert await call("send-message", sessionId="s", text="hello") == {"success": True, "seq": 1}
        await read_results(table, "s")
        output = await call("get-output", sessionId="s", clear=True)
        assert [set(m) for m in output["messages"]] == [{"type", "data", "timestamp", "seq"}] * 2
        assert {m["type"] for m in output["messages"]} == {"session-output"}
        assert (output["next"], output["state"]) == (4, "idle")
        assert (await call("get-output", sessionId="s", clear=True))["messages"] == []
        (listed,) = await call("list-sessions")
        assert {"sessionId", "pid", "createdAt"} <= set(listed)
        assert await call("stop-session", sessionId="s") == {"success": True}
        assert await call("list-sessions") == []
        assert [s["state"] for s in await call("list-sessions", all=True)] == ["ended"]

    on_methods(place, work)


def test_a_spawn_may_carry_the_first_message(place: Place) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        first = await call("spawn-session", text="hello", messageId="m", sessionId="s")
        assert (first["type"], first["accepted"], first["seq"]) == ("success", True, 1)
        assert await call("spawn-session", text="hello", messageId="m", sessionId="s") == first
        assert await call("send-message", sessionId="s", text="hello", messageId="m") == {"success": True, "seq": 1}
        assert place.messages() in ([], ["hello"])

    on_methods(place, work)


def test_unknown_things(place: Place) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        answer = {"success": False, "error": "Session not found"}
        assert await call("send-message", sessionId="none", text="x") == answer
        assert await call("stop-session", sessionId="none") == {"success": False}
        assert await call("get-output", sessionId="none") == {"messages": [], "next": 0, "state": None}
        assert await call("get-session-state") is None
        with pytest.raises(MethodError, match=r"^Unknown method: fly-to-moon$"):
            await call("fly-to-moon")

    on_methods(place, work)


def test_session_state_once_there_was_a_session(place: Place) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        spawned = await call("spawn-session", sessionId="s", text="x")
        state = await call("get-session-state")
        assert state["sessions"][0]["pid"] == spawned["pid"]
        assert isinstance(state["updatedAt"], int)

    on_methods(place, work)


def test_ping(place: Place) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        pong = await call("ping")
        assert pong == {"pong": True, "timestamp": pong["timestamp"], "version": __version__}
        assert isinstance(pong["timestamp"], int)

    on_methods(place, work)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"directory": 7}, "directory must be text"),
        ({"directory": "a\0b"}, "directory must be at most"),
        ({"directory": "none"}, "does not exist"),
        ({"directory": "x" * 5000}, "directory must be at most"),
        ({"directory": "x" * 4000}, "does not exist"),
        ({"directory": "\ud800"}, "valid Unicode"),
        ({"directory": "/"}, "outside"),
        ({"sessionId": []}, "sessionId must be text"),
        ({"sessionId": "../s"}, "sessionId is"),
        ({"permissionMode": "yolo"}, "permissionMode is none of"),
        ({"permissionMode": 1}, "permissionMode must be text"),
        ({"model": {}}, "model must be text"),
        ({"model": "a\0"}, "model must be"),
        ({"text": 5}, "text must be text"),
        ({"text": " \n"}, "text is missing or empty"),
        ({"messageId": 5}, "messageId must be text"),
    ],
)
def test_bad_spawns_are_errors_and_leave_nothing(place: Place, params: dict[str, Any], said: str) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        answer = await call("spawn-session", **params)
        assert answer["type"] == "error"
        assert said in answer["errorMessage"]
        assert table.listing(everything=True) == []
        assert list(place.sessions.iterdir()) == []

    on_methods(place, work, root_dir=place.root)


def test_no_claude_is_said_with_the_hint(place: Place) -> None:
    def missing() -> Path:
        raise Unavailable("claude was not found", hint="install it")

    async def work(call: Call, table: SessionTable) -> None:
        answer = await call("spawn-session")
        assert answer == {"type": "error", "errorMessage": "claude was not found (install it)"}

    on_methods(place, work, find_claude=missing)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"text": "x"}, "sessionId is missing"),
        ({"sessionId": "s"}, "text is missing"),
        ({"sessionId": "s", "text": None}, "text is missing"),
        ({"sessionId": 1, "text": "x"}, "sessionId must be text"),
        ({"sessionId": "s", "text": ["x"]}, "text must be text"),
        ({"sessionId": "s", "text": "x", "messageId": {}}, "messageId must be text"),
    ],
)
def test_bad_messages(place: Place, params: dict[str, Any], said: str) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        answer = await call("send-message", **params)
        assert answer == {"success": False, "error": answer["error"]}
        assert said in answer["error"]

    on_methods(place, work)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "sessionId is missing"),
        ({"sessionId": 1}, "sessionId must be text"),
        ({"sessionId": "s", "after": "x"}, "after must be a whole number"),
        ({"sessionId": "s", "after": 1.5}, "after must be a whole number"),
        ({"sessionId": "s", "after": True}, "after must be a whole number"),
        ({"sessionId": "s", "after": 2**60}, "after must be a whole number"),
        ({"sessionId": "s", "limit": -1}, "limit must be a whole number that is not negative"),
        ({"sessionId": "s", "waitMs": -1}, "waitMs must be a whole number that is not negative"),
        ({"sessionId": "s", "clear": "yes"}, "clear must be true or false"),
    ],
)
def test_bad_reads(place: Place, params: dict[str, Any], said: str) -> None:
    async def work(call: Call, table: SessionTable) -> None:
        with pytest.raises(MethodError, match=said):
            await call("get-output", **params)

    on_methods(place, work)


@pytest.mark.parametrize("params", [[], "text", 7, True])
def test_params_that_are_no_object(place: Place, params: object) -> None:
    async def main() -> None:
        async with place.table() as table:
            with pytest.raises(MethodError, match="object"):
                await Methods(table).call("ping", params)
            assert await Methods(table).call("list-sessions", None) == b"[]"
            assert await Methods(table).call("stop-session", {"sessionId": 7}) == b'{"success":false}'
            with pytest.raises(MethodError, match="all must be"):
                await Methods(table).call("list-sessions", {"all": "yes"})

    run(main())


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
names = ["sessionId", "text", "directory", "permissionMode", "model", "messageId", "clear", "after", "limit", "all"]
some_params = st.dictionaries(st.sampled_from(names), values)


@given(st.sampled_from(["send-message", "get-output", "stop-session", "list-sessions", "ping"]), some_params)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_params_are_answered(place: Place, method: str, params: dict[str, Any]) -> None:
    async def main() -> None:
        table = SessionTable(place.sessions, place.settings(), place.log)
        try:
            json.loads(await Methods(table).call(method, params))
        except MethodError:
            pass

    run(main())
