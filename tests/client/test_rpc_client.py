"""The client: calls in flight, what failures mean, reconnecting. On virtual time, against a daemon in memory."""

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import pytest
from kit.fake_daemon import DATA_KEY, FakeDaemon, MemoryDialer, MemoryStream
from sim import run

from p2pclaude.client import remote_sessions
from p2pclaude.client.rpc_client import RECONNECT_DELAYS, Client, explain
from p2pclaude.errors import DataError, P2PClaudeError, ProtocolError, Refused, TryAgain, Unavailable
from p2pclaude.hyperdht import (
    ConnectionClosed,
    DecodeError,
    HandshakeFailed,
    HolepunchError,
    HyperDHTError,
    PeerConnectionFailed,
    PeerNotFound,
    Timeout,
    TooFewNodes,
)
from p2pclaude.protocol.wire import MAX_FIRST_LINE, Response, encode_response, seal

T = TypeVar("T")


def with_client(
    daemon: FakeDaemon,
    work: Callable[[Client], Awaitable[T]],
    *,
    dialer: MemoryDialer | None = None,
    key: bytes = DATA_KEY,
    timeout: float = 30.0,
    notes: list[str] | None = None,
) -> T:
    """Run `work` with a client of the daemon, on virtual time, and see that everything is closed at the end."""

    async def main() -> T:
        dial = dialer or MemoryDialer(daemon)
        client = Client(dial, key, timeout=timeout, note=None if notes is None else notes.append)
        try:
            return await work(client)
        finally:
            await client.close()
            assert dial.destroyed

    return run(main())


def call(daemon: FakeDaemon, **options: Any) -> object:
    """Make one ping."""
    return with_client(daemon, lambda client: client.call("ping"), **options)


def test_a_call_comes_back_with_the_result() -> None:
    daemon = FakeDaemon()
    assert call(daemon) == {"pong": True, "timestamp": 1, "version": "0.1.0"}
    assert daemon.requests == [("ping", {})]


def test_answers_may_come_out_of_order_and_calls_share_one_connection() -> None:
    daemon, release = FakeDaemon(), asyncio.Event()

    async def hold(method: str, params: dict[str, Any]) -> None:
        if method == "list-sessions":
            await release.wait()

    async def work(client: Client) -> list[str]:
        ended: list[str] = []

        async def one(method: str) -> None:
            await client.call(method)
            ended.append(method)
            release.set()

        await asyncio.gather(one("list-sessions"), one("ping"))
        return ended

    daemon.before_answer = hold
    dialer = MemoryDialer(daemon)
    assert with_client(daemon, work, dialer=dialer) == ["ping", "list-sessions"]
    assert len(dialer.dials) == 1


def test_an_ok_without_result_is_an_empty_object() -> None:
    daemon = FakeDaemon()
    daemon.raw_answer = encode_response(Response("1", True))
    assert call(daemon) == {}


@pytest.mark.parametrize(
    ("failure", "kind", "status"),
    [
        (PeerNotFound("x"), Unavailable, 69),
        (TooFewNodes("x"), Unavailable, 69),
        (DecodeError("x"), DataError, 65),
        (PeerConnectionFailed("x"), Unavailable, 69),
        (HolepunchError("x"), Unavailable, 69),
        (HandshakeFailed("x"), Unavailable, 69),
        (HyperDHTError("x"), Unavailable, 69),
        (OSError("no network"), Unavailable, 69),
        (Timeout("x"), TryAgain, 75),
        (ConnectionClosed("x"), TryAgain, 75),
    ],
)
def test_what_a_failed_connection_means(failure: Exception, kind: type[P2PClaudeError], status: int) -> None:
    daemon = FakeDaemon()
    with pytest.raises(kind) as caught:
        call(daemon, dialer=MemoryDialer(daemon, failure))
    assert caught.value.exit_status == status
    assert type(caught.value) is kind


def test_a_dial_that_never_ends_times_out() -> None:
    daemon = FakeDaemon()

    class Hanging(MemoryDialer):
        async def dial(self, timeout: float, early_data: bytes = b"") -> Any:
            await asyncio.Event().wait()

    with pytest.raises(TryAgain):
        call(daemon, dialer=Hanging(daemon), timeout=3.0)


def test_no_answer_times_out_after_the_silence() -> None:
    daemon = FakeDaemon()
    daemon.mute = True

    async def work(client: Client) -> float:
        start = asyncio.get_running_loop().time()
        with pytest.raises(TryAgain, match="no answer"):
            await client.call("ping")
        return asyncio.get_running_loop().time() - start

    assert with_client(daemon, work, timeout=5.0) == pytest.approx(5.0)


def test_a_long_answer_may_take_longer_than_the_timeout() -> None:
    daemon = FakeDaemon()

    async def trickle(method: str, params: dict[str, Any]) -> None:
        stream = daemon.streams[0]
        for _ in range(6):
            await asyncio.sleep(3.0)
            await stream.write(b'{"id":"late","ok":true}\n')

    daemon.before_answer = trickle
    assert call(daemon, timeout=5.0) == {"pong": True, "timestamp": 1, "version": "0.1.0"}


@pytest.mark.parametrize("old", [False, True])
def test_a_wrong_key_is_refused(old: bool) -> None:
    daemon = FakeDaemon(old=old)
    with pytest.raises(Refused, match="wrong key") as caught:
        call(daemon, key=bytes(32))
    assert caught.value.exit_status == 77


def test_an_answer_sealed_with_another_key_is_refused() -> None:
    daemon = FakeDaemon()
    daemon.raw_answer = encode_response(Response("1", True, seal(bytes(32), {})))
    with pytest.raises(Refused, match="wrong key"):
        call(daemon)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff\xfe\n",
        b"[]\n",
        b'{"id":"1"}\n',
        b'{"id":"1","ok":true,"result":{}}\n',
        b'{"id":"unknown","ok":false,"error":"not JSON"}\n',
        b'{"id":"1","ok":false,"error":"Unknown method: ping"}\n',
        b'{"id":"1","ok":false}\n',
    ],
)
def test_what_is_no_answer_is_a_protocol_error(answer: bytes) -> None:
    daemon = FakeDaemon()
    daemon.raw_answer = answer
    with pytest.raises(ProtocolError) as caught:
        call(daemon)
    assert caught.value.exit_status == 76
    assert not isinstance(caught.value, TryAgain)


def test_an_endless_line_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pclaude.client.rpc_client.MAX_RESPONSE_LINE", 10_000)
    daemon = FakeDaemon()
    daemon.raw_answer = b"x" * 20_000
    with pytest.raises(ProtocolError):
        call(daemon)


def test_a_request_that_the_daemon_would_not_read_is_not_sent() -> None:
    daemon = FakeDaemon()
    with pytest.raises(DataError, match="longer than 8 MiB"):
        with_client(daemon, lambda client: client.call("ping", {"text": '"' * (4 << 20)}))
    assert daemon.requests == []


def test_a_long_request_is_sent_once_the_key_is_proved() -> None:
    """A `ping` goes before it on a new connection, whether or not it would leave early, and never again after that."""
    daemon = FakeDaemon()

    async def work(client: Client) -> None:
        for early in (True, False):
            await client.call("list-sessions", {"x": "x" * MAX_FIRST_LINE}, early=early)
        daemon.cut()
        await client.persist("list-sessions", {"x": "x" * MAX_FIRST_LINE})
        await client.call("list-sessions")

    with_client(daemon, work)
    methods = [method for method, _ in daemon.requests]
    assert methods == ["ping", "list-sessions", "list-sessions", "ping", "list-sessions", "list-sessions"]


def test_a_long_request_with_a_wrong_key_is_not_sent() -> None:
    daemon = FakeDaemon()
    with pytest.raises(Refused, match="wrong key"):
        with_client(daemon, lambda client: client.call("ping", {"x": "x" * MAX_FIRST_LINE}), key=bytes(32))
    assert sum(len(line) for line in daemon.lines) < 1000


def test_a_lost_connection_fails_every_call_on_it() -> None:
    daemon = FakeDaemon()

    async def cut(method: str, params: dict[str, Any]) -> None:
        if len(daemon.requests) == 2:
            daemon.cut()
        await asyncio.Event().wait()

    async def work(client: Client) -> list[type]:
        results = await asyncio.gather(client.call("ping"), client.call("ping"), return_exceptions=True)
        return [type(result) for result in results]

    daemon.before_answer = cut
    assert with_client(daemon, work) == [TryAgain, TryAgain]


def test_the_next_call_opens_a_new_connection() -> None:
    daemon = FakeDaemon()
    dialer = MemoryDialer(daemon)

    async def work(client: Client) -> object:
        await client.call("ping")
        daemon.cut()
        await asyncio.sleep(0.1)
        return await client.call("ping")

    assert with_client(daemon, work, dialer=dialer) == {"pong": True, "timestamp": 1, "version": "0.1.0"}
    assert len(dialer.dials) == 2


def test_persisting_waits_longer_and_longer_and_then_gives_up() -> None:
    daemon, notes = FakeDaemon(), list[str]()
    dialer = MemoryDialer(daemon)

    async def work(client: Client) -> None:
        await client.call("ping")
        daemon.cut()
        dialer.failures = [PeerNotFound("x")] * 20
        with pytest.raises(Unavailable):
            await client.persist("ping", {})

    with_client(daemon, work, dialer=dialer, notes=notes)
    again = dialer.dials[1:]  # the first call after the cut notices the loss, or dials at once
    waits = [later - earlier for earlier, later in pairwise(again)]
    assert waits[-9:] == pytest.approx(RECONNECT_DELAYS[-9:])
    assert len(again) in (10, 11)
    assert RECONNECT_DELAYS[:6] == (1, 2, 4, 8, 16, 30)
    assert "trying again in 30 s" in notes[-1]


def test_an_answer_gives_all_tries_back() -> None:
    daemon = FakeDaemon()
    dialer = MemoryDialer(daemon)

    async def work(client: Client) -> None:
        await client.call("ping")
        for _ in range(3):
            daemon.cut()
            dialer.failures = [PeerNotFound("x")] * 8
            await client.persist("ping", {})

    with_client(daemon, work, dialer=dialer)


def test_a_daemon_that_was_never_reached_is_not_tried_again() -> None:
    daemon = FakeDaemon()
    dialer = MemoryDialer(daemon, PeerNotFound("x"))
    with pytest.raises(Unavailable):
        with_client(daemon, lambda client: client.persist("ping", {}), dialer=dialer)
    assert len(dialer.dials) == 1


def test_no_error_shows_a_key() -> None:
    daemon = FakeDaemon()
    daemon.raw_answer = b'{"id":"1","ok":false,"error":"decrypt"}\n'
    with pytest.raises(P2PClaudeError) as caught:
        call(daemon)
    shown = json.dumps([str(caught.value), repr(caught.value), caught.value.hint])
    assert DATA_KEY.hex() not in shown
    assert repr(DATA_KEY) not in shown


def test_an_early_call_goes_out_with_the_first_packet_and_once() -> None:
    """The dialer is given the request's line; on a connection that stands, the line is written as ever."""
    daemon = FakeDaemon()

    class Noting(MemoryDialer):
        early: ClassVar[list[bytes]] = []

        async def dial(self, timeout: float, early_data: bytes = b"") -> MemoryStream:
            self.early.append(early_data)
            return await super().dial(timeout, early_data)

    dialer = Noting(daemon)

    async def work(client: Client) -> None:
        answers = await asyncio.gather(client.call("ping", early=True), client.call("ping", early=True))
        assert len(answers) == 2
        await client.call("ping", early=True)
        daemon.cut()
        assert (await client.persist("ping", {}, early=True)) == answers[0]

    with_client(daemon, work, dialer=dialer)
    assert len(dialer.early) == 2
    assert all(b'"ping"' in line and line.count(b"\n") == 1 for line in dialer.early)
    assert [method for method, _ in daemon.requests] == ["ping"] * 4


def test_what_is_not_harmless_twice_waits_for_the_connection() -> None:
    """Only what changes nothing leaves early: a message or a stop never does."""
    daemon = FakeDaemon()

    class Noting(MemoryDialer):
        async def dial(self, timeout: float, early_data: bytes = b"") -> MemoryStream:
            assert early_data == b""
            return await super().dial(timeout, early_data)

    works: tuple[Callable[[Client], Awaitable[object]], ...] = (
        lambda client: remote_sessions.spawn(client, text="hello", message_id="1", directory="/w"),
        lambda client: remote_sessions.send(client, "none", text="hello", message_id="2"),
        lambda client: remote_sessions.stop(client, "none"),
        lambda client: remote_sessions.skip_old_output(client, "none"),
    )
    for work in works:
        with contextlib.suppress(P2PClaudeError):
            with_client(daemon, work, dialer=Noting(daemon))


def test_what_the_system_says_is_said_as_everything_else_is() -> None:
    """In lower case, without its number."""
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert str(explain(error)) == "the network failed: too many open files"
