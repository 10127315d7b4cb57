#!/usr/bin/env python3
"""A stand-in for `claude` that behaves like the CLI in what matters to the daemon, and starts in milliseconds.

Like the real one it prints nothing before the first line of stdin, repeats `system/init` every turn, ends when stdin
ends, turns SIGINT within a turn into a result, and dies of a line that is no user message. FAKE_CLAUDE in the
environment makes it misbehave from the start; the text of a message makes it do what `TURNS` says. What it was
started with and what it was told goes to the file that FAKE_CLAUDE_LOG names, one JSON object a line.
"""

import json
import os
import signal
import sys
import time
from typing import Any

SESSION = next((a.split("=", 1)[1] for a in sys.argv if a.startswith(("--session-id=", "--resume="))), "none")


def note(**fields: Any) -> None:
    """Write to the test's log."""
    if name := os.environ.get("FAKE_CLAUDE_LOG"):
        with open(name, "a", encoding="utf-8") as log:  # noqa: PTH123 (pathlib costs a third of the start)
            log.write(json.dumps(fields) + "\n")


def say(**fields: Any) -> None:
    """Print one object."""
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def result(text: str, *, is_error: bool = False) -> None:
    """End a turn."""
    say(type="result", subtype="success", is_error=is_error, result=text, session_id=SESSION)


def turn(text: str) -> None:
    """Answer one message as its first word asks."""
    word, _, rest = text.partition(":")
    say(type="system", subtype="init", session_id="cleared" if word == "CLEAR" else SESSION, cwd=os.getcwd())  # noqa: PTH109
    if word == "BIG":
        say(type="assistant", text="z" * int(rest))
    elif word == "MANY":
        for number in range(int(rest)):
            say(type="assistant", number=number)
    elif word == "GARBAGE":
        sys.stdout.buffer.write(b"not json\n\xff\xfe\n[1]\n")
    elif word == "EXIT":
        sys.stderr.write("last words\n")
        sys.stdout.write('{"type":"assistant","half')
        sys.stdout.flush()
        sys.exit(int(rest))
    elif word == "HOLD":  # until the file named is there, or SIGINT
        while not os.path.exists(rest):  # noqa: PTH110
            time.sleep(0.005)
    result(f"echo: {text}"[:200], is_error=word == "ERR")


def main() -> None:
    """Read messages until stdin ends."""
    mode = os.environ.get("FAKE_CLAUDE", "")
    note(argv=sys.argv[1:], cwd=os.getcwd(), env=dict(os.environ), pid=os.getpid())  # noqa: PTH109
    if mode == "die":
        sys.stderr.write("error: something is wrong\nand more of it\n")
        sys.exit(3)
    if mode == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        message = json.loads(line)
        note(message=message)
        try:
            turn(message["message"]["content"])
        except KeyboardInterrupt:
            result("interrupted", is_error=True)
            sys.exit(0)
    while mode == "deaf":
        time.sleep(1)


main()
