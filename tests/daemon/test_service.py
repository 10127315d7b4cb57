"""The service: who gets an answer, what a stranger may cost, requests in flight. On virtual time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from kit.fake_dht import WINDOW, Caller, FakeConnection
from kit.sessions import KeptLog
from sim import run

from p2pclaude.client.rpc_client import Client
from p2pclaude.daemon import service as service_module
from p2pclaude.daemon.methods import MethodError
from p2pclaude.daemon.presence import encode_record
from p2pclaude.daemon.service import (
    MAX_IN_FLIGHT,
    MAX_UNPROVEN,
    MAX_UNPROVEN_ERRORS,
    PROVE_SECONDS,
    Service,
)
from p2pclaude.protocol.wire import (
    MAX_FIRST_LINE,
    MAX_REQUEST_LINE,
    WRONG_KEY,
    Request,
    Response,
    dump_json,
    encode_request,
    seal,
)

KEY = bytes(range(32))


class Methods:
    """Methods to call: `echo` gives its params, `wait` waits for `gate`, `spawn` too but may not be interrupted."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.running = 0
        self.most = 0
        self.finished = 0

    async def call(self, method: str, params: object) -> bytes:
        """Run one."""
        if method in ("echo", "ping"):
            return dump_json(params)
        if method == "fail":
            raise MethodError("it failed")
        if method == "crash":
            raise ZeroDivisionError("secret text")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            self.finished += 1
        finally:
            self.running -= 1
        return b"{}"


class Bench:
    """A service with its methods and log, and connections to it."""

    def __init__(self) -> None:
        self.methods = Methods()
        self.log = KeptLog()
        self.service = Service(KEY, self.methods.call, self.log)
        self.tasks: set[asyncio.Task[None]] = set()

    def connect(self) -> FakeConnection:
        """Open a connection and give the client's end."""
        ours, theirs = FakeConnection.pair()
        task = asyncio.create_task(self.service.serve(theirs))
        self.tasks.add(task)
        return ours

    def caller(self, key: bytes = KEY) -> Caller:
        """Open a connection with a client on it."""
        return Caller(self.connect(), key)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    one = Bench()
    yield one
    one.methods.gate.set()
    await one.service.close()
    await asyncio.gather(*one.tasks)


def on_bench(work: Callable[[Bench], Awaitable[None]]) -> None:
    """Run a test's coroutine with a bench, on virtual time."""

    async def main() -> None:
        async with bench() as one:
            await work(one)

    run(main())


def request(number: str, method: str, params: Any = None, key: bytes = KEY) -> bytes:
    return encode_request(Request(number, method, seal(key, params)))


def test_requests_are_answered() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        assert await caller.call("echo", {"a": "ü"}) == {"a": "ü"}
        assert await caller.ask("fail", {}) == Response("2", False, error="it failed")
        caller.close()

    on_bench(work)


def test_a_defect_is_an_answer_and_a_log_line_without_its_text() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        assert await caller.ask("crash", {}) == Response("1", False, error="internal error in the daemon")
        assert await caller.call("echo", 1) == 1
        assert one.log.events("internal-error")[0]["error"] == "ZeroDivisionError"
        assert "secret" not in one.log.stream.getvalue()

    on_bench(work)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b"no json\n", Response("unknown", False, error="not valid JSON")),
        (b"\xff\xff\n", Response("unknown", False, error="not valid JSON")),
        (b'{"id":"1","params":"x"}\n', Response("1", False, error="the request names no method")),
        (b'{"id":"1","method":"echo"}\n', Response("1", False, error=WRONG_KEY)),
        (b'{"id":"1","method":"echo","params":"!"}\n', Response("1", False, error=WRONG_KEY)),
        pytest.param(request("1", "echo", {}, key=bytes(32)), Response("1", False, error=WRONG_KEY), id="wrong key"),
    ],
)
def test_bad_lines_are_answered_and_harm_nobody(line: bytes, answer: Response) -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        assert await caller.raw(line, answer.id) == answer
        assert await caller.call("echo", 1) == 1
        assert await caller.raw(line, answer.id) == answer

    on_bench(work)


def test_blank_lines_are_nothing() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        await caller.connection.write(b"\n  \r\n\n")
        assert await caller.call("echo", 1) == 1
        assert caller.order == ["1"]

    on_bench(work)


def test_lines_may_come_byte_by_byte() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        answer = asyncio.create_task(caller.raw(b"", "ü"))
        for byte in request("ü", "echo", {"text": "é"}):
            await caller.connection.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await answer).ok

    on_bench(work)


def test_a_line_over_the_cap_ends_the_connection() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        assert await caller.call("echo", 1) == 1
        answer = asyncio.create_task(caller.raw(b"x" * (MAX_REQUEST_LINE + 1), "unknown"))
        assert "longer than" in str((await answer).error)
        await caller.ended()

    on_bench(work)


def test_a_request_just_under_the_cap_is_read() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        text = "x" * 6_000_000  # 8 MB sealed
        assert await caller.call("echo", text) == text

    on_bench(work)


def test_answers_come_as_they_are_done() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        slow = asyncio.create_task(caller.call("wait"))
        await asyncio.sleep(0)
        assert await caller.call("echo", 1) == 1
        one.methods.gate.set()
        await slow
        assert caller.order == ["2", "1"]

    on_bench(work)


def test_requests_in_flight_are_bounded() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        calls = [asyncio.create_task(caller.call("wait")) for _ in range(3 * MAX_IN_FLIGHT)]
        await asyncio.sleep(1)
        assert one.methods.running == MAX_IN_FLIGHT
        one.methods.gate.set()
        await asyncio.gather(*calls)
        assert one.methods.most == MAX_IN_FLIGHT

    on_bench(work)


def test_bytes_in_flight_are_bounded() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        big = "x" * 5_000_000
        calls = [asyncio.create_task(caller.call("wait", big)) for _ in range(6)]
        await asyncio.sleep(5)
        assert one.methods.running == 2  # of 6.7 MB each, sealed
        one.methods.gate.set()
        await asyncio.gather(*calls)

    on_bench(work)


def test_a_slow_reader_holds_up_nobody_else() -> None:
    async def work(one: Bench) -> None:
        slow, quick = one.connect(), one.caller()
        big = "x" * WINDOW
        for number in range(3):
            await slow.write(request(str(number), "echo", big))
        await asyncio.sleep(1)
        assert slow.unread > WINDOW
        assert await quick.call("echo", 1) == 1
        slow.abort()

    on_bench(work)


def test_frames_are_no_larger_than_lines() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        assert await caller.call("echo", 1) == 1
        assert MAX_REQUEST_LINE < caller.connection.peer.max_frame_bytes < MAX_REQUEST_LINE + 4096

    on_bench(work)


def test_a_stranger_has_ten_seconds() -> None:
    async def work(one: Bench) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        stranger, friend = one.caller(), one.caller()
        assert await friend.call("echo", 1) == 1
        await stranger.ended()
        assert loop.time() - start == pytest.approx(PROVE_SECONDS)
        await asyncio.sleep(100)
        assert await friend.call("echo", 1) == 1
        assert "in time" in one.log.events("connection-refused")[0]["reason"]

    on_bench(work)


def test_a_strangers_guesses_are_counted() -> None:
    async def work(one: Bench) -> None:
        stranger = one.caller(key=bytes(32))
        for _ in range(MAX_UNPROVEN_ERRORS):
            assert (await stranger.ask("ping", {})).error == WRONG_KEY
        await stranger.ended()

    on_bench(work)


def test_what_is_sealed_for_keeping_proves_nothing() -> None:
    """Anyone who knows the public key gets the record from the DHT, and some get at a tool's hints: no keys at all."""
    kept = {
        "record": encode_record(KEY, {"sessions": [], "updatedAt": 1}).decode(),
        "hints": seal(KEY, {"addresses": [["127.0.0.1", 1]], "nodes": []}),
    }

    async def work(one: Bench) -> None:
        for number, sealed in kept.items():
            stranger = one.caller(key=bytes(32))
            answer = await stranger.raw(encode_request(Request(number, "spawn", sealed)), number)
            assert (answer.ok, answer.error) == (False, WRONG_KEY)
            await stranger.ended()
        assert not one.methods.most
        assert not one.log.events("connection-proven")
        assert len(one.log.events("connection-refused")) == len(kept)

    on_bench(work)


def test_the_oldest_stranger_goes_when_there_are_too_many() -> None:
    async def work(one: Bench) -> None:
        friend = one.caller()
        assert await friend.call("echo", 1) == 1
        strangers = [one.caller() for _ in range(MAX_UNPROVEN + 1)]
        await strangers[0].ended()
        late = one.caller()
        assert await late.call("echo", 1) == 1
        assert await friend.call("echo", 1) == 1
        assert [s.connection.closed for s in strangers] == [True, True] + [False] * (MAX_UNPROVEN - 1)

    on_bench(work)


def test_strangers_bytes_are_bounded_together() -> None:
    async def work(one: Bench) -> None:
        strangers = [one.connect() for _ in range(8)]
        writing = [asyncio.create_task(s.write(b"x" * (7_000_000 + n))) for n, s in enumerate(strangers)]
        await asyncio.wait(writing, timeout=1)
        held = sum(peer.buffer.pending for peer in one.service._peers.values())
        assert held <= service_module.MAX_UNPROVEN_BYTES
        assert any(s.closed for s in strangers)
        assert not all(s.closed for s in strangers)
        await asyncio.gather(*writing, return_exceptions=True)

    on_bench(work)


class OneDialer:
    """Dials the service once."""

    def __init__(self, one: Bench) -> None:
        self._connections = [one.connect()]

    async def dial(self, timeout: float, early_data: bytes = b"") -> FakeConnection:
        """Give the connection."""
        assert not early_data
        return self._connections.pop()

    async def destroy(self) -> None:
        """Do nothing."""


def test_clients_that_begin_with_long_messages_are_no_strangers() -> None:
    """Together they send four times what strangers may keep the daemon holding: none is broken off."""

    async def work(one: Bench) -> None:
        text = "x" * (MAX_REQUEST_LINE * 3 // 4 - 1000)
        clients = [Client(OneDialer(one), KEY) for _ in range(8)]
        answers = await asyncio.gather(*(client.call("echo", {"text": text}) for client in clients))
        assert answers == [{"text": text}] * 8
        await asyncio.gather(*(client.close() for client in clients))

    on_bench(work)


def test_first_lines_of_as_many_strangers_as_there_may_be_fit() -> None:
    assert MAX_UNPROVEN * MAX_FIRST_LINE <= service_module.MAX_UNPROVEN_BYTES


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_CONNECTIONS", 2)

    async def work(one: Bench) -> None:
        callers = [one.caller(), one.caller()]
        for caller in callers:
            assert await caller.call("echo", 1) == 1
        await one.caller().ended()
        assert await callers[0].call("echo", 1) == 1

    on_bench(work)


def test_a_lost_connection_interrupts_reading_and_nothing_else() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        calls = [asyncio.create_task(caller.call(name)) for name in ("get-output", "list-permissions", "spawn-session")]
        await asyncio.sleep(0.1)
        assert one.methods.running == 3
        caller.connection.abort()
        await asyncio.sleep(0.1)
        assert one.methods.running == 1
        one.methods.gate.set()
        await asyncio.sleep(0.1)
        assert one.methods.finished == 1
        await asyncio.gather(*calls, return_exceptions=True)

    on_bench(work)


def test_who_has_said_all_still_gets_answers() -> None:
    async def work(one: Bench) -> None:
        connection = one.connect()
        await connection.write(request("1", "wait"))
        await connection.write_eof()
        await asyncio.sleep(1)
        one.methods.gate.set()
        assert b'"ok":true' in await connection.read()
        assert await connection.read() == b""

    on_bench(work)


def test_a_connection_that_fails_oddly_harms_nobody() -> None:
    class Odd(FakeConnection):
        async def read(self) -> bytes:
            raise ZeroDivisionError

    async def work(one: Bench) -> None:
        await one.service.serve(Odd())
        assert one.log.events("internal-error")[0]["where"] == "connection"
        assert await one.caller().call("echo", 1) == 1

    on_bench(work)


def test_neither_keys_nor_text_are_logged() -> None:
    async def work(one: Bench) -> None:
        caller = one.caller()
        await caller.call("echo", {"text": "private matter"})
        await caller.raw(b'{"id":"x","method":"private matter","params":"private matter"}\n', "x")
        caller.close()
        await asyncio.sleep(0.1)
        logged = one.log.stream.getvalue()
        assert "private" not in logged
        events = [line["event"] for line in one.log.lines]
        assert events[:3] == ["connection-opened", "connection-proven", "request"]
        assert events[-1] == "connection-closed"

    on_bench(work)
