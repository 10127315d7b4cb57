"""What Claude asks permission for, and what it is told (pure).

    control_request of claude   -> `Book.receive` -> Request, pending once `sessions.open_requests` has journaled it
    Answer of whoever may       -> `Answer.reply` -> control_response for claude's stdin

`sessions.open_requests` stands above with journal, clock and stdin; the tools use `decode_answer` too. The formats were
measured with `@anthropic-ai/claude-code` 2.1.197 and are not documented. A request that is not understood is answered
with an error, since Claude waits for ever for an answer that does not come; what is wrong with an answer is said before
Claude, who would take it for a failure of the tool, sees it.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from p2pclaude.errors import DataError, NoSession, Refused
from p2pclaude.protocol.wire import (
    ALREADY_ANSWERED,
    PERMISSION_ANSWER,
    PERMISSION_REQUEST,
    REQUEST_NOT_FOUND,
    dump_json,
    load_json,
)

MAX_PENDING = 64
"""Requests of one session that may wait for an answer; one more is denied."""
MAX_REQUEST_BYTES = 1024 * 1024
"""Longest request, as Claude prints it; a longer one is denied."""
MAX_LIST_BYTES = 8 * 1024 * 1024
"""Requests that `list-permissions` gives at once; the rest is counted."""
MAX_ANSWERED = 1000
"""Answered requests of one session whose outcome is remembered; the newest."""
MAX_NAME_CHARS = 256
"""Longest id of a request, and longest name of a tool."""

ALLOW = "allow"
DENY = "deny"
CANCELLED = "cancelled"
"""What a request without an answer ends as: Claude took it back, its turn was interrupted, or its process ended."""

QUESTION = "AskUserQuestion"
"""The tool whose permission request is a question: an input with `answers` answers it."""

DENIED = "Denied"
"""The reason that Claude is given when there is none."""

Json = Mapping[str, Any]

_TEXTS = {"decision_reason": "reason", "description": "description", "blocked_path": "blockedPath"}
_TEXTS |= {"title": "title", "agent_id": "agentId", "tool_use_id": "toolUseId"}


@dataclass(frozen=True, slots=True)
class Request:
    """One tool call that waits for permission. `data` is what Claude said of it; `created_at` in milliseconds.

    `number` counts the requests of all sessions, in the order in which they came, whatever the clock said.
    """

    request_id: str
    tool_name: str
    input: dict[str, Any]
    data: Json
    created_at: int
    number: int = field(default_factory=itertools.count().__next__, compare=False)

    def describe(self, session_id: str, directory: str) -> dict[str, object]:
        """Give what whoever decides is shown, as an object for JSON."""
        shown: dict[str, object] = {
            "sessionId": session_id,
            "requestId": self.request_id,
            "createdAt": self.created_at,
            "directory": directory,
            "toolName": self.tool_name,
            "input": self.input,
        }
        shown |= {ours: self.data[name] for name, ours in _TEXTS.items() if isinstance(self.data.get(name), str)}
        suggestions = self.data.get("permission_suggestions")
        return shown | {"suggestions": suggestions if isinstance(suggestions, list) else []}


@dataclass(frozen=True, slots=True)
class Answer:
    """What somebody decided. `answer_id` makes a retry harmless; `by` is set when the daemon itself decided.

    `answers` are those to questions; `complete` makes an input of them.
    """

    behavior: str
    updated_input: dict[str, Any] | None = None
    updated_permissions: list[Any] | None = None
    message: str | None = None
    interrupt: bool = False
    answer_id: str | None = None
    by: str | None = None
    answers: Json | None = None

    def complete(self, request: Request) -> "Answer":
        """Turn answers to the questions of AskUserQuestion into the tool's input. Raises DataError."""
        if self.answers is None:
            return self
        if request.tool_name != QUESTION:
            raise DataError(f"{request.tool_name} must be answered with behavior, it asks no question")
        return replace(self, updated_input=_with_answers(request.input, self.answers), answers=None)

    def fields(self) -> dict[str, object]:
        """Give what the journal keeps of it, without the request's id."""
        every = {
            "behavior": self.behavior,
            "updatedInput": self.updated_input,
            "updatedPermissions": self.updated_permissions,
            "message": self.message,
            "interrupt": self.interrupt or None,
            "answerId": self.answer_id,
            "by": self.by,
        }
        return {name: value for name, value in every.items() if value is not None}

    def reply(self, request: Request) -> dict[str, Any]:
        """Give the object for claude's stdin."""
        if self.behavior == ALLOW:
            # Claude insists on an input, also when it is its own.
            said: dict[str, Any] = {
                "behavior": ALLOW,
                "updatedInput": request.input if self.updated_input is None else self.updated_input,
            }
            if self.updated_permissions is not None:
                said["updatedPermissions"] = self.updated_permissions
        else:
            said = {"behavior": DENY, "message": self.message or DENIED}
            if self.interrupt:
                said["interrupt"] = True
        return _response(request.request_id, said)


def decode_answer(value: Json, *, answer_id: str | None = None) -> Answer:
    """Read an answer's fields as `answer-permission` has them; others are ignored. Raises DataError."""
    behavior, message, interrupt = (value.get(name) for name in ("behavior", "message", "interrupt"))
    changed, permissions, answers = (value.get(name) for name in ("updatedInput", "updatedPermissions", "answers"))
    if behavior not in (ALLOW, DENY):
        raise DataError(f"behavior must be {ALLOW} or {DENY}")
    for name, found in (("updatedInput", changed), ("answers", answers)):
        if not isinstance(found, dict | None):
            raise DataError(f"{name} must be an object")
    if not isinstance(permissions, list | None) or not all(isinstance(one, dict) for one in permissions or ()):
        raise DataError("updatedPermissions must be a list of objects")
    if not isinstance(message, str | None):
        raise DataError("message must be text")
    if not isinstance(interrupt, bool | None):
        raise DataError("interrupt must be true or false")
    of_allow = (changed, permissions, answers)
    if behavior == DENY and any(found is not None for found in of_allow):
        raise DataError("behavior must be allow with updatedInput, updatedPermissions or answers")
    if behavior == ALLOW and interrupt:
        raise DataError("behavior must be deny with interrupt")
    if changed is not None and answers is not None:
        raise DataError("updatedInput must be left out with answers")
    return Answer(behavior, changed, permissions, message, bool(interrupt), answer_id, answers=answers)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that is not passed on: what to tell claude (None: it cannot be told), and why, for the log."""

    reply: dict[str, Any] | None
    reason: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Claude takes a request back."""

    request_id: str


class Book:
    """The requests of one session: those that wait, and what became of the others. With `asks` False it takes none."""

    def __init__(self, *, asks: bool) -> None:
        self.pending: dict[str, Request] = {}
        self._asks = asks
        self._answered: OrderedDict[str, tuple[str, str | None]] = OrderedDict()

    def receive(self, value: Json, size: int, now_ms: int) -> Request | Refusal | Cancel | None:
        """Take an object that Claude printed in so many bytes; None if there is nothing to do. Never raises.

        A Request counts when it is handed to `add`, which comes after it was journaled.
        """
        request_id = value.get("request_id")
        if value.get("type") == "control_cancel_request":
            return Cancel(request_id) if isinstance(request_id, str) and request_id in self.pending else None
        if value.get("type") != "control_request":
            return None
        if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_NAME_CHARS:
            return Refusal(None, "a control request without a usable id")
        data = value.get("request")
        if not isinstance(data, dict) or data.get("subtype") != "can_use_tool":
            kind = data.get("subtype") if isinstance(data, dict) else None
            return _error(request_id, f"unknown control request {str(kind)[:100]}")
        return self._receive_tool(request_id, data, size, now_ms)

    def _receive_tool(self, request_id: str, data: Json, size: int, now_ms: int) -> Request | Refusal | None:
        name, given = data.get("tool_name"), data.get("input")
        if not self._asks:
            return _error(request_id, "this session does not ask")
        if request_id in self.pending:
            return None  # one answer serves both
        if request_id in self._answered:
            return _error(request_id, "the id of this request was used before")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not isinstance(given, dict):
            return _error(request_id, "a permission request without a tool and its input")
        request = Request(request_id, name, given, data, now_ms)
        if size > MAX_REQUEST_BYTES:
            return _denial(request, f"the request is longer than {MAX_REQUEST_BYTES >> 20} MiB")
        if len(self.pending) >= MAX_PENDING:
            return _denial(request, f"{MAX_PENDING} requests wait already")
        return request

    def add(self, request: Request) -> None:
        """Make a request pending."""
        self.pending[request.request_id] = request

    def settle(self, request_id: str, behavior: str, answer_id: str | None = None) -> None:
        """Note what became of a request."""
        self.pending.pop(request_id, None)
        self._answered[request_id] = (behavior, answer_id)
        while len(self._answered) > MAX_ANSWERED:
            self._answered.popitem(last=False)

    def knows(self, request_id: str) -> bool:
        """Tell whether there is, or was, such a request."""
        return request_id in self.pending or request_id in self._answered

    def check_answered(self, request_id: str, answer_id: str | None) -> None:
        """Return if the request was answered with this very answer id. Raises Refused if with another, else NoSession.

        For a request that is not pending.
        """
        behavior, known = self._answered.get(request_id, (None, None))
        if behavior is None:
            raise NoSession(REQUEST_NOT_FOUND)
        if answer_id is None or known != answer_id:
            raise Refused(f"{ALREADY_ANSWERED}{behavior}")


class History:
    """What a journal says of permission requests; `learn` takes every envelope that is no output, in order."""

    def __init__(self) -> None:
        self.unanswered: dict[str, None] = {}
        self.answered: dict[str, tuple[str, str | None]] = {}
        """The behavior, and the answer id if there was one."""

    def learn(self, line: bytes) -> None:
        """Take one envelope, which is a JSON object."""
        value = load_json(line)
        kind, request_id = value.get("type"), value.get("requestId")
        if kind == PERMISSION_REQUEST and isinstance(request_id, str):
            self.unanswered[request_id] = None
        elif kind == PERMISSION_ANSWER and isinstance(request_id, str):
            behavior, answer_id = value.get("behavior"), value.get("answerId")
            self.unanswered.pop(request_id, None)
            self.answered[request_id] = (str(behavior), answer_id if isinstance(answer_id, str) else None)
            if len(self.answered) > MAX_ANSWERED:
                del self.answered[next(iter(self.answered))]


def interrupt_request(request_id: str) -> dict[str, Any]:
    """Give the object for claude's stdin that ends its turn, and nothing if there is none."""
    return {"type": "control_request", "request_id": request_id, "request": {"subtype": "interrupt"}}


def version_of(pending: Iterable[tuple[str, str]]) -> str:
    """Give the name of a set of pending requests, each a session's id and its own; another set has another name."""
    return sha256(dump_json(sorted(pending))).hexdigest()[:16]


def _with_answers(given: dict[str, Any], answers: Json) -> dict[str, Any]:
    """Give the input of AskUserQuestion with answers in it. Several choices are a list; Claude wants one text."""
    questions = given.get("questions")
    asked = [q.get("question") for q in questions if isinstance(q, dict)] if isinstance(questions, list) else []
    said = {}
    for question, answer in answers.items():
        choices = answer if isinstance(answer, list) else [answer]
        if question not in asked:
            raise DataError(f"each answer must be to a question that was asked, not to {question[:100]!r}")
        if not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"the answer to {question[:100]!r} must be text or a list of texts")
        said[question] = ", ".join(choices)
    if not said:
        raise DataError("there must be an answer")
    return {**given, "answers": said}


def _response(request_id: str, said: Json) -> dict[str, Any]:
    return {
        "type": "control_response",
        "response": {"subtype": "success", "request_id": request_id, "response": said},
    }


def _error(request_id: str, reason: str) -> Refusal:
    said = {"subtype": "error", "request_id": request_id, "error": f"p2pclaude: {reason}"}
    return Refusal({"type": "control_response", "response": said}, reason)


def _denial(request: Request, reason: str) -> Refusal:
    return Refusal(Answer(DENY, message=f"p2pclaude: {reason}").reply(request), reason)
