"""A daemon for the client's tests: the wire contract over any byte stream, in memory, with every bad habit on demand.

It shares no code with the real daemon beyond wire.py. `old=True` makes it the TypeScript daemon: none of our additions.
A message's text decides what the session prints: `FAIL` gives an error result, `SILENT` nothing, `DIE` ends the
session, anything else an assistant line and a result that echo it.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from p2pclaude.protocol.wire import (
    MESSAGE,
    OUTPUT,
    SESSION_NOT_FOUND,
    TURN,
    UNKNOWN_METHOD,
    WRONG_KEY,
    LineBuffer,
    Request,
    Response,
    SealError,
    decode_request,
    encode_response,
    seal,
    unseal,
)

DATA_KEY = bytes(range(32))


class MemoryStream:
    """One end of a connection in memory."""

    def __init__(self) -> None:
        self.how = "direct"
        self.remote_address: tuple[str, int] | None = ("192.0.2.7", 40000)
        self.closed = False
        self.peer: MemoryStream | None = None
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def read(self) -> bytes:
        """Return the next chunk; empty at the end."""
        chunk = await self._chunks.get()
        if chunk is None:
            self._chunks.put_nowait(b"")
            raise ConnectionResetError("broken off")
        return chunk

    async def write(self, data: bytes) -> None:
        """Hand bytes to the other end, in pieces that cut lines and characters."""
        if self.closed or self.peer is None:
            raise ConnectionResetError("broken off")
        for start in range(0, len(data), 7 if len(data) < 500 else 4096):
            self.peer._chunks.put_nowait(data[start : start + (7 if len(data) < 500 else 4096)])
        await asyncio.sleep(0)

    async def close(self) -> None:
        """End in good order."""
        self._end(b"")

    def leave(self) -> None:
        """End both directions."""
        self._end(b"")

    def abort(self) -> None:
        """Break off."""
        self._end(None)

    def _end(self, last: bytes | None) -> None:
        self.closed = True
        if self.peer is not None:
            self.peer.closed = True
            self.peer._chunks.put_nowait(last)


def memory_pair() -> tuple[MemoryStream, MemoryStream]:
    """Return the two ends of a connection."""
    one, other = MemoryStream(), MemoryStream()
    one.peer, other.peer = other, one
    return one, other


@dataclass
class FakeSession:
    """A session: its journal, its state, and how far `clear` has come."""

    journal: list[dict[str, Any]] = field(default_factory=list)
    state: str = "idle"
    cleared: int = 0
    message_ids: dict[str, int] = field(default_factory=dict)


class FakeDaemon:
    """Answers requests; set its attributes to make it misbehave."""

    def __init__(self, *, old: bool = False, data_key: bytes = DATA_KEY) -> None:
        self.old = old
        self.data_key = data_key
        self.sessions: dict[str, FakeSession] = {}
        self.lines: list[bytes] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.pending: list[dict[str, Any]] = []
        self.omitted = 0
        self.answers: dict[str, dict[str, Any]] = {}
        self.raw_answer: bytes | None = None
        self.mute = False
        self.page_size = 1000
        self.then: Callable[[int], list[int]] = self._full_pages
        self.before_answer: Callable[[str, dict[str, Any]], Awaitable[None]] | None = None
        self.streams: list[MemoryStream] = []
        self._ids = itertools.count(1)
        self._news = asyncio.Condition()

    async def serve(self, stream: Any) -> None:
        """Answer one connection until it ends, each request in a task of its own."""
        self.streams.append(stream)
        lines = LineBuffer()
        tasks: set[asyncio.Task[None]] = set()
        with contextlib.suppress(OSError):
            while data := await stream.read():
                for line in lines.feed(data):
                    self.lines.append(line)
                    task = asyncio.create_task(self._answer(stream, decode_request(line)))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection off."""
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.abort()

    async def print(self, session_id: str, *objects: dict[str, Any], kind: str = OUTPUT, **fields: Any) -> None:
        """Let a session print objects."""
        async with self._news:
            session = self.sessions[session_id]
            for data in objects or ({},):
                seq = len(session.journal) + 1
                session.journal.append({"type": kind, "seq": seq, "timestamp": 1000 + seq, **fields, "data": data})
            self._news.notify_all()

    async def end(self, session_id: str, state: str = "ended") -> None:
        """End a session."""
        async with self._news:
            if self.old:
                self.sessions.pop(session_id, None)
            else:
                self.sessions[session_id].state = state
            self._news.notify_all()

    async def _answer(self, stream: Any, request: Request) -> None:
        response = await self._respond(request)
        if self.mute:
            return
        with contextlib.suppress(OSError):
            await stream.write(self.raw_answer if self.raw_answer is not None else encode_response(response))

    async def _respond(self, request: Request) -> Response:
        try:
            params = unseal(self.data_key, request.params or "")
        except SealError:
            error = "Unsupported state or unable to authenticate data" if self.old else WRONG_KEY
            return Response(request.id, False, error=error)
        self.requests.append((request.method, params))
        if self.before_answer is not None:
            await self.before_answer(request.method, params)
        handler = getattr(self, "_" + request.method.replace("-", "_"), None)
        if handler is None:
            return Response(request.id, False, error=UNKNOWN_METHOD + request.method)
        return Response(request.id, True, seal(self.data_key, await handler(params)))

    async def _ping(self, params: dict[str, Any]) -> object:
        return {"pong": True, "timestamp": 1} | ({} if self.old else {"version": "0.1.0"})

    async def _list_sessions(self, params: dict[str, Any]) -> object:
        plain: list[dict[str, Any]] = [
            {"sessionId": i, "pid": 7, "createdAt": 1_700_000_000_000} for i in self.sessions
        ]
        if self.old:
            return plain
        return [
            {**entry, "directory": "/srv/a\tb\x1b[31m", "state": self.sessions[entry["sessionId"]].state, "lastSeq": 0}
            for entry in plain
            if params.get("all") or self.sessions[entry["sessionId"]].state != "ended"
        ]

    async def _spawn_session(self, params: dict[str, Any]) -> object:
        if self.old and "directory" not in params:
            return {"type": "error", "errorMessage": 'The "path" argument must be of type string: directory'}
        if params.get("directory") == "/outside":
            return {"type": "error", "errorMessage": "Directory is outside the root directory"}
        if params.get("directory") == "/missing":
            return {"type": "error", "errorMessage": "Directory does not exist: /missing"}
        session_id = params.get("sessionId") or f"s{next(self._ids)}"
        again = session_id in self.sessions
        self.sessions.setdefault(session_id, FakeSession())
        result: dict[str, Any] = {"type": "success", "sessionId": session_id, "pid": 7}
        result |= {"ask": True} if params.get("ask") and not self.old else {}
        if self.old or "text" not in params:
            return result
        assert not again or params["messageId"] in self.sessions[session_id].message_ids
        return {**result, "accepted": True, "seq": await self._accept(session_id, params)}

    async def _send_message(self, params: dict[str, Any]) -> object:
        session = self.sessions.get(params["sessionId"])
        if session is None:
            return {"success": False, "error": SESSION_NOT_FOUND}
        if session.state == "ended":
            return {"success": False, "error": "Session has ended"}
        seq = await self._accept(params["sessionId"], params)
        return {"success": True} if self.old else {"success": True, "seq": seq}

    async def _accept(self, session_id: str, params: dict[str, Any]) -> int:
        session, text = self.sessions[session_id], params["text"]
        if not self.old and params["messageId"] in session.message_ids:
            return session.message_ids[params["messageId"]]
        if not self.old:
            await self.print(session_id, {"message": {"content": text}}, kind=MESSAGE)
        seq = session.message_ids[params["messageId"]] = len(session.journal)
        if not self.old:
            await self.print(session_id, kind=TURN, message=seq)
        await self.turn(session_id, text)
        return seq

    async def turn(self, session_id: str, text: str) -> None:
        """Print what Claude would."""
        if text == "DIE":
            await self.end(session_id, "failed")
        elif text == "FAIL":
            await self.print(session_id, {"type": "result", "subtype": "success", "is_error": True, "result": "API"})
        elif text != "SILENT":
            content = [{"type": "text", "text": f"echo: {text}"}]
            await self.print(session_id, {"type": "assistant", "message": {"content": content}})
            result = {"type": "result", "subtype": "success", "is_error": False, "result": f"echo: {text}"}
            await self.print(session_id, result)

    async def _get_output(self, params: dict[str, Any]) -> object:
        session = self.sessions.get(params["sessionId"])
        if self.old or "after" not in params:
            return self._old_output(session, clear=params.get("clear") is True)
        if session is None:
            return {"messages": [], "next": 0, "state": None}
        after, limit = params["after"], min(params.get("limit", self.page_size), self.page_size)
        if after < 0:
            outputs = [entry["seq"] for entry in session.journal if entry["type"] == OUTPUT]
            after = (outputs[after:] or [1])[0] - 1
        after = min(after, len(session.journal))

        def is_ready() -> bool:
            changed = session.state != params.get("state", session.state)
            return changed or len(session.journal) > after or session.state in ("ended", "failed", "dormant")

        if params.get("waitMs") and limit:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(params["waitMs"] / 1000), self._news:
                    await self._news.wait_for(is_ready)
        messages = session.journal[after : after + limit]
        end = after + len(messages)
        found = {"messages": messages, "next": end, "state": session.state}
        return found | {"then": then} if (then := self.then(end)) else found

    def _full_pages(self, after: int) -> list[int]:
        newest = max(len(session.journal) for session in self.sessions.values())
        return list(range(after + self.page_size, newest, self.page_size))[:8]

    def _old_output(self, session: FakeSession | None, *, clear: bool) -> object:
        if session is None:
            return {"messages": []}
        unread = [m for m in session.journal[session.cleared :] if m["type"] == OUTPUT]
        if clear:
            session.cleared = len(session.journal)
        return {"messages": [{k: m[k] for k in ("type", "data", "timestamp")} for m in unread]}

    async def ask(self, *request_ids: str, session: str = "s") -> None:
        """Add permission requests."""
        async with self._news:
            self.pending += [
                {"sessionId": session, "requestId": r, "toolName": "Bash", "input": {}} for r in request_ids
            ]
            self._news.notify_all()

    async def settle(self, request_id: str, **answer: Any) -> None:
        """Answer a permission request."""
        async with self._news:
            self.pending = [request for request in self.pending if request["requestId"] != request_id]
            self.answers[request_id] = answer
            self._news.notify_all()

    async def _list_permissions(self, params: dict[str, Any]) -> object:
        def state() -> str | None:
            session = self.sessions.get(params.get("sessionId", ""))
            return None if session is None else session.state

        def version() -> str:
            return ",".join(request["requestId"] for request in self.pending)

        if params.get("waitMs"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(params["waitMs"] / 1000), self._news:
                    await self._news.wait_for(lambda: version() != params["version"] or state() == "ended")
        found: dict[str, Any] = {"requests": self.pending, "version": version()}
        found |= {"state": state()} if "sessionId" in params else {}
        return found | ({"omitted": self.omitted} if self.omitted else {})

    async def _answer_permission(self, params: dict[str, Any]) -> object:
        request_id = params["requestId"]
        if (answer := self.answers.get(request_id)) is not None:
            if answer.get("answerId") == params["answerId"]:
                return {"success": True}
            return {"success": False, "error": f"Already answered: {answer['behavior']}"}
        if request_id not in [request["requestId"] for request in self.pending]:
            return {"success": False, "error": "Request not found"}
        await self.settle(request_id, **params)
        return {"success": True}

    async def _interrupt_session(self, params: dict[str, Any]) -> object:
        return {"success": params["sessionId"] in self.sessions}

    async def _stop_session(self, params: dict[str, Any]) -> object:
        session = self.sessions.get(params["sessionId"])
        if session is None:
            return {"success": False}
        await self.end(params["sessionId"])
        return {"success": True}


class MemoryDialer:
    """Dials a FakeDaemon in memory; `failures` are raised first, one a dial."""

    def __init__(self, daemon: FakeDaemon, *failures: Exception) -> None:
        self.daemon = daemon
        self.failures = list(failures)
        self.dials: list[float] = []
        self.destroyed = False
        self._serving: list[asyncio.Task[None]] = []

    async def dial(self, timeout: float, early_data: bytes = b"") -> MemoryStream:
        """Open a connection, or fail."""
        self.dials.append(asyncio.get_running_loop().time())
        if self.failures:
            raise self.failures.pop(0)
        near, far = memory_pair()
        self._serving.append(asyncio.create_task(self.daemon.serve(far)))
        if early_data:
            await near.write(early_data)
        return near

    async def destroy(self) -> None:
        """End all connections."""
        self.destroyed = True
        self.daemon.cut()
        await asyncio.gather(*self._serving, return_exceptions=True)
