"""What `tail --text` and `ls` make of single objects, well-formed and not."""

from typing import Any

import pytest

from p2pclaude.cli.ls import format_time
from p2pclaude.cli.text import MAX_CALL_CHARS, render, render_envelope, render_message


def assistant(*blocks: Any) -> dict[str, Any]:
    """Make an assistant object of content blocks."""
    return {"type": "assistant", "message": {"role": "assistant", "content": list(blocks)}}


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (assistant({"type": "text", "text": "one\ntwo\n"}), ["one\ntwo"]),
        (assistant({"type": "text", "text": "bell\x07 \x1b]0;title\x07 \x9b31m tab\t"}), ["bell ]0;title 31m tab\t"]),
        (assistant({"type": "text", "text": "rm \u202eelif\u202c \u2066x\u2069 \u200f"}), ["rm elif x \u200f"]),
        (assistant({"type": "text", "text": "  \n"}), []),
        (assistant({"type": "thinking", "thinking": "hm"}), []),
        (assistant({"type": "tool_use", "name": "Read", "input": {"file_path": "/a"}}), ["[Read] /a"]),
        (assistant({"type": "tool_use", "name": "Odd", "input": {"x": 1}}), ["[Odd]"]),
        (assistant({"type": "tool_use", "name": "Odd", "input": None}), ["[Odd]"]),
        (assistant(None, 3, {"type": "text"}), []),
        ({"type": "assistant", "message": {"content": "plain"}}, ["plain"]),
        ({"type": "assistant"}, []),
        ({"type": "result", "subtype": "success", "is_error": False, "result": "said already"}, []),
        ({"type": "result", "subtype": "success", "is_error": True, "result": "API"}, ["[error] API"]),
        ({"type": "result", "subtype": "error_during_execution"}, ["[error] error_during_execution"]),
        ({"type": "system", "subtype": "init"}, []),
        ({"type": "system", "subtype": "permission_denied", "tool_name": "Bash"}, ["[denied] Bash"]),
        ({"type": "brand_new"}, []),
        ({"type": ["list"]}, []),
        ("text", []),
        (None, []),
    ],
)
def test_what_a_person_would_read(data: object, lines: list[str]) -> None:
    assert render(data) == lines


def test_a_long_tool_call_is_cut() -> None:
    [line] = render(assistant({"type": "tool_use", "name": "Bash", "input": {"command": "x" * 1000}}))
    assert len(line) == MAX_CALL_CHARS
    assert line.endswith("…")


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"type": "user", "message": {"role": "user", "content": "a\nb"}}, ["> a", "> b"]),
        ({"message": {"content": [{"type": "text", "text": "a"}, {"type": "image"}]}}, ["> a"]),
        ("plain", ["> plain"]),
        ({"message": 3}, []),
        (None, []),
    ],
)
def test_a_message_is_quoted(data: object, lines: list[str]) -> None:
    assert render_message({"type": "message", "data": data}) == lines


@pytest.mark.parametrize(
    ("envelope", "line"),
    [
        (
            {"type": "permission-request", "data": {"tool_name": "Bash", "input": {"command": "ls\n\x1b[2J"}}},
            "[permission r1] [Bash] ls [2J",
        ),
        ({"type": "permission-request", "data": None}, "[permission r1] [None]"),
        ({"type": "permission-answer", "behavior": "allow"}, "[permission r1] allow"),
        (
            {"type": "permission-answer", "behavior": "deny", "message": "not\ntoday\x07"},
            "[permission r1] deny (not today)",
        ),
        ({"type": "permission-answer", "behavior": "cancelled", "message": 3}, "[permission r1] cancelled"),
    ],
)
def test_a_permission_is_a_line(envelope: dict[str, Any], line: str) -> None:
    assert render_envelope(envelope | {"requestId": "r1"}) == [line]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_700_000_000_000, "2023-11-14T22:13:20Z"),
        (1_700_000_000_000.7, "2023-11-14T22:13:20Z"),
        ("2023-11-14T23:13:20+01:00", "2023-11-14T22:13:20Z"),
        ("2023-11-14T22:13:20.123Z", "2023-11-14T22:13:20Z"),
        ("yesterday", "-"),
        (1e300, "-"),
        (float("inf"), "-"),
        (True, "-"),
        (None, "-"),
    ],
)
def test_times_are_iso_8601_in_utc(value: object, text: str) -> None:
    assert format_time(value) == text
