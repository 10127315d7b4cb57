"""What a person would read of Claude's stream-json objects: `p2pclaude-tail --text`.

Pure: an object in, lines out. What Claude says is printed as it is, a tool call as one line, a failed turn as its
error; the rest is bookkeeping, and so are types that are not known yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from p2pclaude.cli.common import printable, printable_text
from p2pclaude.protocol.wire import MESSAGE, NOTE, OUTPUT, PERMISSION_ANSWER, PERMISSION_REQUEST, TURN_CUT

TOOL_ARGUMENTS = ("command", "file_path", "path", "pattern", "url", "query", "description", "prompt")
"""The input of a tool that says most about the call, best first."""

MAX_CALL_CHARS = 120


def render_envelope(envelope: Mapping[str, Any]) -> list[str]:
    """Return the lines to print for an envelope of the journal."""
    kind = envelope.get("type")
    if kind == OUTPUT:
        return render(envelope.get("data"))
    if kind == MESSAGE:
        return render_message(envelope)
    if kind in (PERMISSION_REQUEST, PERMISSION_ANSWER):
        return render_permission(envelope)
    return render_note(envelope) if kind in (TURN_CUT, NOTE) else []


def render(data: object) -> list[str]:
    """Return the lines to print for one of Claude's objects, without control characters that a terminal would obey."""
    if not isinstance(data, dict):
        return []
    renderer = {"assistant": _assistant, "result": _result, "system": _system}.get(str(data.get("type")))
    return [] if renderer is None else [printable_text(line) for line in renderer(data)]


def render_message(envelope: Mapping[str, Any]) -> list[str]:
    """Return the lines for a message that somebody sent to Claude, marked like a quotation."""
    text = _content_text(envelope.get("data"))
    return [f"> {printable_text(line)}" for line in text.splitlines()]


def render_note(envelope: Mapping[str, Any]) -> list[str]:
    """Return the lines for what the daemon has to say about a journal or a turn."""
    if envelope.get("type") == TURN_CUT:
        again = envelope.get("again") is True
        text = "the message is handed to Claude again" if again else f"the turn was cut off: {envelope.get('reason')}"
    else:
        text = str(envelope.get("text"))
    return [f"[note] {printable(text)}"]


def render_permission(envelope: Mapping[str, Any]) -> list[str]:
    """Return the line for a request for permission, with the id to answer it by, or for what became of it."""
    data = envelope.get("data")
    if envelope.get("type") == PERMISSION_REQUEST:
        asked = data if isinstance(data, dict) else {}
        text = _tool_call({"name": asked.get("tool_name"), "input": asked.get("input")})
    else:
        text = " ".join(filter(None, (str(envelope.get("behavior")), _reason(envelope))))
    return [f"[permission {printable(str(envelope.get('requestId')))}] {text}"]


def _reason(envelope: Mapping[str, Any]) -> str:
    said = envelope.get("message")
    return f"({printable(' '.join(said.split()))})" if isinstance(said, str) and said else ""


def _content_text(data: object) -> str:
    """Dig the text out of a message: a string, or a user object whose content is a string or blocks."""
    if isinstance(data, dict):
        inner = data.get("message", data)
        data = inner.get("content", inner.get("text")) if isinstance(inner, dict) else inner
    if isinstance(data, list):
        return "\n".join(str(block["text"]) for block in data if isinstance(block, dict) and "text" in block)
    return data if isinstance(data, str) else ""


def _assistant(data: Mapping[str, Any]) -> Iterator[str]:
    message = data.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    for block in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if not isinstance(block, dict):
            continue
        if block.get("type") == "text" and isinstance(block.get("text"), str) and block["text"].strip():
            yield block["text"].strip("\n")
        elif block.get("type") == "tool_use":
            yield _tool_call(block)


def _tool_call(block: Mapping[str, Any]) -> str:
    given = block.get("input")
    known = given if isinstance(given, dict) else {}
    argument = next((known[name] for name in TOOL_ARGUMENTS if isinstance(known.get(name), str)), "")
    call = printable(f"[{block.get('name')}] {' '.join(argument.split())}".strip())
    return call if len(call) <= MAX_CALL_CHARS else call[: MAX_CALL_CHARS - 1] + "…"


def _result(data: Mapping[str, Any]) -> Iterator[str]:
    """Say nothing of a success: the assistant's own text came before it."""
    if data.get("is_error") or data.get("subtype", "success") != "success":
        text = data.get("result")
        yield f"[error] {text if isinstance(text, str) and text else data.get('subtype')}"


def _system(data: Mapping[str, Any]) -> Iterator[str]:
    if data.get("subtype") == "permission_denied":
        yield f"[denied] {data.get('tool_name', 'a tool')}"
