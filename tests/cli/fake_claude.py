#!/usr/bin/env python3
"""A stand-in for `claude` in the commands' tests: it speaks stream-json and does what the message says.

`FAIL` is answered with an error, `EXIT:N` ends it, `HANG` is never answered, `COUNT:N` prints N objects first, `TOOL`
calls a tool; anything else comes back.
"""

import json
import os
import sys
import time


def say(**fields: object) -> None:
    """Print one line of output."""
    print(json.dumps({**fields, "session_id": "fake"}, ensure_ascii=False), flush=True)


def say_content(**block: object) -> None:
    """Print what the assistant says or does."""
    say(type="assistant", message={"role": "assistant", "content": [block]})


def turn(text: str) -> None:
    """Answer one message."""
    word, _, number = text.partition(":")
    say(type="system", subtype="init", cwd=os.getcwd())  # noqa: PTH109 (as the real one says it)
    if word == "EXIT":
        sys.exit(int(number))
    if word == "HANG":
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
    say(type="result", subtype="success", is_error=False, result=f"echo: {text}")


for line in sys.stdin:
    turn(json.loads(line)["message"]["content"])
