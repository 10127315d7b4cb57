#!/usr/bin/env python3
"""A stand-in for `claude` in the commands' tests: it speaks stream-json and does what the message says.

`FAIL` is answered with an error, `DENIED` with denied tools, `ABORTED` cut short, `EXIT:N` ends it, `HANG` is never
answered, `COUNT:N` prints N objects first, `TOOL` calls a tool; `ASK:COMMAND` asks for permission to run it, and
`QUESTION` which colour it shall be; anything else comes back.
"""

import itertools
import json
import os
import sys
import time
from typing import Any


def say(**fields: object) -> None:
    """Print one line of output."""
    print(json.dumps({**fields, "session_id": "fake"}, ensure_ascii=False), flush=True)


def say_content(**block: object) -> None:
    """Print what the assistant says or does."""
    say(type="assistant", message={"role": "assistant", "content": [block]})


def ask(number: int, line: str) -> None:
    """Ask for permission and wait: the answer, or the interrupt, is the result."""
    tool, given = "Bash", {"command": line.partition(":")[2]}
    if line.startswith("QUESTION"):
        tool, given = "AskUserQuestion", {"questions": [{"question": "Which colour?"}]}  # type: ignore[dict-item]
    request_id = f"{os.getpid()}-{number}"
    say(
        type="control_request",
        request_id=request_id,
        request={"subtype": "can_use_tool", "tool_name": tool, "input": given},
    )
    answer = json.loads(sys.stdin.readline())
    if answer["type"] == "control_request":
        say(type="control_cancel_request", request_id=request_id)
        say(type="result", subtype="error_during_execution", is_error=True)
        return
    said = answer["response"]["response"]
    ran = json.dumps(said["updatedInput"]) if said["behavior"] == "allow" else said["message"]
    say(type="result", subtype="success", is_error=False, result=f"{said['behavior']}: {ran}")


def turn(text: str) -> None:
    """Answer one message."""
    word, _, number = text.partition(":")
    say(type="system", subtype="init", cwd=os.getcwd())  # noqa: PTH109 (as the real one says it)
    if word == "EXIT":
        sys.exit(int(number))
    if word == "HANG":
        return
    if word in ("ASK", "QUESTION"):
        ask(next(numbers), text)
        return
    if word == "COUNT":
        for n in range(int(number)):
            say(type="stream_event", n=n)
            time.sleep(0.005)
    if word == "TOOL":
        say_content(type="tool_use", name="Bash", input={"command": "ls  -l\n\x1b[31m"})
    if word == "FAIL":
        say(type="result", subtype="success", is_error=True, result="API Error: 529 overloaded")
        return
    say_content(type="text", text=f"echo: {text}")
    more: dict[str, Any] = {}
    if word == "DENIED":
        more["permission_denials"] = [{"tool_name": name, "tool_input": {}} for name in ("Bash", "Bash", "Write")]
    if word == "ABORTED":
        more["terminal_reason"] = "aborted_streaming"
    say(type="result", subtype="success", is_error=False, result=f"echo: {text}", **more)


numbers = itertools.count(1)
for line in sys.stdin:
    value = json.loads(line)
    if value["type"] == "user":
        turn(value["message"]["content"])
