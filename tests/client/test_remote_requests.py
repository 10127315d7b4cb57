"""Permission requests from afar: listed, followed over lost connections, answered once whatever happens."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from client.test_rpc_client import with_client
from kit.fake_daemon import FakeDaemon, FakeSession, MemoryDialer, MemoryStream

from p2pclaude.client import remote_requests, remote_sessions
from p2pclaude.client.remote_requests import AlreadyAnswered
from p2pclaude.client.rpc_client import Client
from p2pclaude.errors import DataError, NoSession, P2PClaudeError, ProtocolError, Refused, Unavailable
from p2pclaude.hyperdht import ConnectionClosed


def daemon_with(*request_ids: str, old: bool = False) -> FakeDaemon:
    """Make a daemon with a session `s` that asks for these."""
    daemon = FakeDaemon(old=old)
    daemon.sessions["s"] = FakeSession(state="waiting")
    daemon.pending = [{"sessionId": "s", "requestId": name, "toolName": "Bash", "input": {}} for name in request_ids]
    return daemon


def ids(pending: remote_requests.Pending) -> list[str]:
    return [request["requestId"] for request in pending.requests]


def test_listing() -> None:
    daemon = daemon_with("a", "b")
    daemon.pending += [{"requestId": "no session"}, "no object"]  # type: ignore[list-item]

    async def work(client: Client) -> None:
        async def nothing(params: object) -> object:
            return {"requests": daemon.pending, "version": "1", "omitted": 3}

        daemon._list_permissions = nothing  # type: ignore[method-assign]
        found = await remote_requests.list_requests(client, None)
        assert (ids(found), found.omitted, found.over) == (["a", "b"], 3, False)

    with_client(daemon, work)


def test_a_list_is_asked_for_with_the_first_packet() -> None:
    daemon = daemon_with("a")

    class Noting(MemoryDialer):
        early = b""

        async def dial(self, timeout: float, early_data: bytes = b"") -> MemoryStream:
            self.early = early_data
            return await super().dial(timeout, early_data)

    dialer = Noting(daemon)
    with_client(daemon, lambda client: remote_requests.list_requests(client, None), dialer=dialer)
    assert b'"list-permissions"' in dialer.early
    assert [method for method, _ in daemon.requests] == ["list-permissions"]


@pytest.mark.parametrize("answer", [None, [], {}, {"requests": {}}, {"requests": [], "version": 5}])
def test_a_list_that_is_none(answer: object) -> None:
    daemon = FakeDaemon()

    async def reply(params: object) -> object:
        return answer

    daemon._list_permissions = reply  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match="no requests"):
        with_client(daemon, lambda client: remote_requests.list_requests(client, None))


def test_a_daemon_that_does_not_know_of_permissions() -> None:
    class Older(FakeDaemon):
        _list_permissions = _answer_permission = _interrupt_session = None  # type: ignore[assignment]

    calls: list[Callable[[Client], Awaitable[object]]] = [
        lambda client: remote_requests.list_requests(client, None),
        lambda client: remote_requests.answer_request(client, "r", None, {"behavior": "allow"}),
        lambda client: remote_sessions.interrupt(client, "s"),
    ]
    for call in calls:
        with pytest.raises(ProtocolError, match="does not know this request") as caught:
            with_client(Older(), call)
        assert caught.value.exit_status == 76


def test_unknown_sessions() -> None:
    with pytest.raises(NoSession, match="no such session: nope"):
        with_client(daemon_with(), lambda client: remote_requests.list_requests(client, "nope"))
    assert with_client(daemon_with(), lambda client: remote_sessions.interrupt(client, "nope")) is False
    assert with_client(daemon_with(), lambda client: remote_sessions.interrupt(client, "s")) is True


def test_following_shows_each_set_and_ends_with_the_session() -> None:
    daemon = daemon_with("a")

    async def work(client: Client) -> list[list[str]]:
        seen = []
        steps = iter([daemon.ask("b"), daemon.settle("a", behavior="deny"), daemon.end("s")])
        async with aclosing(remote_requests.follow_requests(client, "s")) as sets:
            async for pending in sets:
                seen.append(ids(pending))
                asyncio.get_running_loop().call_later(50, asyncio.ensure_future, next(steps))
        return seen

    assert with_client(daemon, work) == [["a"], ["a", "b"], ["b"]]


def test_following_survives_lost_connections() -> None:
    daemon = daemon_with("a")
    dialer = MemoryDialer(daemon)

    async def work(client: Client) -> None:
        loop = asyncio.get_running_loop()
        async with aclosing(remote_requests.follow_requests(client, None)) as sets:
            assert ids(await anext(sets)) == ["a"]
            loop.call_later(3, daemon.cut)
            loop.call_later(3, dialer.failures.append, ConnectionClosed("gone"))
            loop.call_later(5, asyncio.ensure_future, daemon.ask("b"))
            assert ids(await anext(sets)) == ["a", "b"]
        assert len(dialer.dials) == 3

    with_client(daemon, work, dialer=dialer)


def test_an_answer_that_is_repeated_after_a_lost_connection_is_one() -> None:
    """The daemon has the answer, the client does not know: it asks again with the same id."""
    daemon = daemon_with("a")
    lost = False

    async def lose(method: str, params: dict[str, Any]) -> None:
        nonlocal lost
        if method == "answer-permission" and not lost:
            lost = True
            await daemon._answer_permission(params)
            daemon.cut()

    daemon.before_answer = lose

    async def work(client: Client) -> None:
        await client.call("ping")
        await remote_requests.answer_request(client, "a", "s", {"behavior": "allow"})

    with_client(daemon, work)
    answers = [params for method, params in daemon.requests if method == "answer-permission"]
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert answers[0]["behavior"] == "allow"


def test_who_is_late_is_told() -> None:
    daemon = daemon_with("a")

    async def work(client: Client) -> None:
        await remote_requests.answer_request(client, "a", "s", {"behavior": "deny", "message": "no"})
        await remote_requests.answer_request(client, "a", "s", {"behavior": "allow"})

    with pytest.raises(AlreadyAnswered, match="request a is already answered: deny") as caught:
        with_client(daemon, work)
    assert (caught.value.exit_status, caught.value.behavior) == (1, "deny")
    assert daemon.answers["a"]["message"] == "no"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("Request not found", NoSession),
        ("Session not found", NoSession),
        ("claude has ended", Unavailable),
        ("behavior must be allow or deny", DataError),
        ("several sessions have such a request, sessionId must be given", DataError),
        ("something else", Refused),
        (None, Refused),
    ],
)
def test_why_an_answer_was_not_taken(error: str | None, kind: type[P2PClaudeError]) -> None:
    daemon = daemon_with("a")

    async def refuse(params: object) -> object:
        return {"success": False, "error": error}

    daemon._answer_permission = refuse  # type: ignore[method-assign]
    with pytest.raises(kind):
        with_client(daemon, lambda client: remote_requests.answer_request(client, "a", "s", {"behavior": "allow"}))


def test_a_session_that_asks() -> None:
    daemon = FakeDaemon()
    accepted = with_client(daemon, lambda c: remote_sessions.spawn(c, text="hi", message_id="m", ask=True))
    assert accepted.asks
    assert daemon.requests[0][1]["ask"] is True
    old = FakeDaemon(old=True)
    accepted = with_client(
        old, lambda c: remote_sessions.spawn(c, text="hi", message_id="m", directory="/srv", ask=True)
    )
    assert not accepted.asks


def test_who_waits_for_an_answer_hears_of_requests() -> None:
    daemon = FakeDaemon()
    told: list[None] = []

    async def work(client: Client) -> None:
        accepted = await remote_sessions.spawn(client, text="SILENT", message_id="m", ask=True)
        waiting = asyncio.create_task(remote_sessions.wait_for_answer(client, accepted, lambda: told.append(None)))
        await daemon.print(accepted.session, {"tool_name": "Bash"}, kind="permission-request", requestId="r")
        await asyncio.sleep(1)
        assert len(told) == 1
        await daemon.print(accepted.session, {"type": "result", "subtype": "success", "result": "done"})
        assert (await waiting)["result"] == "done"

    with_client(daemon, work)
