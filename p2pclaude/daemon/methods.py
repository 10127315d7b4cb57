"""The RPC methods: checked parameters in, a result in the shape of the wire contract out.

`service` stands above with opened requests, the session table below. What is wrong with a parameter is said in the
shape that the method has for errors; a method without one raises MethodError, which is answered with `ok: false`.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from p2pclaude import __version__
from p2pclaude.daemon.request_list import RequestList
from p2pclaude.errors import DataError, NoSession, P2PClaudeError
from p2pclaude.protocol.permissions import MAX_NAME_CHARS, decode_answer
from p2pclaude.protocol.wire import PAGE_END, PAGE_START, UNKNOWN_METHOD, dump_json
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.table import MAX_TEXT_FIELD, Output, SessionTable

Params = Mapping[str, Any]

_MAX_NUMBER = 2**53 - 1


class MethodError(P2PClaudeError):
    """The request is answered with `ok: false` and this text."""


class Methods:
    """Every method of the contract over one session table."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._request_list = RequestList(table)
        self._methods: dict[str, Callable[[Params], Awaitable[bytes]]] = {
            "spawn-session": self._spawn_session,
            "send-message": self._send_message,
            "get-output": self._get_output,
            "stop-session": self._stop_session,
            "interrupt-session": self._interrupt_session,
            "list-permissions": self._list_permissions,
            "answer-permission": self._answer_permission,
            "list-sessions": self._list_sessions,
            "get-session-state": self._get_session_state,
            "ping": self._ping,
        }

    async def call(self, method: str, params: object) -> bytes:
        """Run a method and give its result as JSON text. Raises MethodError."""
        function = self._methods.get(method)
        if function is None:
            raise MethodError(UNKNOWN_METHOD + method[:100])
        if params is None:
            params = {}
        if not isinstance(params, dict):
            raise MethodError("params must be an object")
        return await function(params)

    async def _spawn_session(self, params: Params) -> bytes:
        try:
            spawn = Spawn(
                directory=_name(params, "directory"),
                session_id=_name(params, "sessionId"),
                permission_mode=_name(params, "permissionMode"),
                model=_name(params, "model"),
                text=_message(params) if params.get("text") is not None else None,
                message_id=_name(params, "messageId"),
                ask=_flag(params, "ask"),
            )
            session, seq = await self._table.spawn(spawn)
        except (P2PClaudeError, OSError) as error:
            return dump_json({"type": "error", "errorMessage": _say(error)})
        result: dict[str, object] = {"type": "success", "sessionId": session.info.session_id, "pid": session.pid}
        if seq is not None:
            result |= {"accepted": True, "seq": seq}
        if spawn.ask:
            result["ask"] = True
        return dump_json(result)

    async def _send_message(self, params: Params) -> bytes:
        try:
            session_id = _required(params, "sessionId")
            seq = await self._table.send(
                session_id, _message(params), _name(params, "messageId"), _name(params, "priority")
            )
        except (P2PClaudeError, OSError) as error:
            return dump_json({"success": False, "error": _say(error)})
        return dump_json({"success": True, "seq": seq})

    async def _get_output(self, params: Params) -> bytes:
        try:
            output = await self._table.read(
                _required(params, "sessionId"),
                after=_number(params, "after", lowest=-_MAX_NUMBER),
                limit=_number(params, "limit"),
                clear=_flag(params, "clear"),
                wait_ms=_number(params, "waitMs") or 0,
                known_state=_name(params, "state"),
            )
        except (DataError, OSError) as error:
            raise MethodError(_say(error)) from error
        return _encode_output(output)

    async def _stop_session(self, params: Params) -> bytes:
        try:
            stopped = await self._table.stop(_required(params, "sessionId"))
        except DataError:
            stopped = False
        return dump_json({"success": stopped})

    async def _interrupt_session(self, params: Params) -> bytes:
        try:
            self._request_list.interrupt(_required(params, "sessionId"))
        except P2PClaudeError as error:
            return dump_json({"success": False, "error": _say(error)})
        return dump_json({"success": True})

    async def _list_permissions(self, params: Params) -> bytes:
        try:
            found = await self._request_list.list(
                _name(params, "sessionId"), _name(params, "version"), _number(params, "waitMs") or 0
            )
        except NoSession:
            return dump_json({"requests": [], "version": "", "state": None})
        except DataError as error:
            raise MethodError(_say(error)) from error
        rest: dict[str, object] = {"version": found.version}
        if found.omitted:
            rest["omitted"] = found.omitted
        if found.state is not None:
            rest["state"] = found.state
        return b'{"requests":[' + b",".join(found.requests) + b"]," + dump_json(rest)[1:]

    async def _answer_permission(self, params: Params) -> bytes:
        try:
            answer = decode_answer(params, answer_id=_name(params, "answerId"))
            request_id = _text(params, "requestId")
            if not request_id or len(request_id) > MAX_NAME_CHARS:
                raise DataError("requestId is missing or too long")
            await self._request_list.answer(_name(params, "sessionId"), request_id, answer)
        except (P2PClaudeError, OSError) as error:
            return dump_json({"success": False, "error": _say(error)})
        return dump_json({"success": True})

    async def _list_sessions(self, params: Params) -> bytes:
        try:
            everything = _flag(params, "all")
        except DataError as error:
            raise MethodError(_say(error)) from error
        return dump_json(self._table.listing(everything=everything))

    async def _get_session_state(self, params: Params) -> bytes:
        return dump_json(self._table.snapshot())

    async def _ping(self, params: Params) -> bytes:
        now = time.time_ns() // 1_000_000
        return dump_json({"pong": True, "timestamp": now, "version": __version__})


def _encode_output(output: Output) -> bytes:
    # The envelopes are JSON already: pages go out without being read and written again, each on a line of its own so
    # that they come apart as easily (wire.load_page).
    rest: dict[str, object] = {"next": output.page.next, "state": output.state}
    if output.page.then:
        rest["then"] = output.page.then
    if output.error is not None:
        rest["error"] = output.error
    # A page is long: it is joined, not added up, which would copy it each time.
    return b"".join((PAGE_START, b"\n", b",\n".join(output.page.lines), b"\n", PAGE_END, dump_json(rest)[1:]))


def _say(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the daemon's disk: {(error.strerror or str(error)).lower()}"
    hint = error.hint if isinstance(error, P2PClaudeError) else None
    return f"{error} ({hint})" if hint else str(error)


def _text(params: Params, name: str) -> str | None:
    value = params.get(name)
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"{name} must be text")


def _name(params: Params, name: str) -> str | None:
    """Give a text that may become a path, an argument or a key; an empty one counts as left out."""
    value = _text(params, name)
    if value is not None and (len(value) > MAX_TEXT_FIELD or "\0" in value):
        raise DataError(f"{name} must be at most {MAX_TEXT_FIELD} characters, none of them NUL")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} must be valid Unicode") from None
    return value or None


def _required(params: Params, name: str) -> str:
    value = _name(params, name)
    if value is None:
        raise DataError(f"{name} is missing")
    return value


def _message(params: Params) -> str:
    text = _text(params, "text")
    if text is None or not text.strip():
        raise DataError("text is missing or empty")
    return text


def _number(params: Params, name: str, lowest: int = 0) -> int | None:
    value = params.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= _MAX_NUMBER:
        raise DataError(f"{name} must be a whole number{'' if lowest else ' that is not negative'}")
    return value


def _flag(params: Params, name: str) -> bool:
    value = params.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise DataError(f"{name} must be true or false")
