#!/usr/bin/env python3
"""A stand-in for `claude` that behaves like the CLI in what matters to the daemon, and starts in milliseconds.

Like the real one it prints nothing before the first line of stdin, repeats `system/init` every turn, ends when stdin
ends (with status 1 after an error), turns SIGINT and an interrupt within a turn into a result, and dies of a line that
is neither. FAKE_CLAUDE in the environment makes it misbehave from the start; the text of a message makes it do what
`TURNS` says. What it was started with and what it was told goes to the file that FAKE_CLAUDE_LOG names, one JSON
object a line.
"""

import json
import os
import select
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

WAITING: list[str] = []  # lines of stdin that came within a turn
FAILED = False  # the last turn ended with an error of its own
SESSION = next((a.split("=", 1)[1] for a in sys.argv if a.startswith(("--session-id=", "--resume="))), "none")


def note(**fields: Any) -> None:
    """Write to the test's log."""
    if name := os.environ.get("FAKE_CLAUDE_LOG"):
        with open(name, "ab", buffering=0) as log:  # noqa: PTH123 (pathlib costs a third of the start)
            log.write(json.dumps(fields).encode() + b"\n")  # in one piece: others write there too


def say(**fields: Any) -> None:
    """Print one object."""
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def result(text: str, *, is_error: bool = False) -> None:
    """End a turn."""
    say(type="result", subtype="success", is_error=is_error, result=text, session_id=SESSION)


def ask(calls: list[str]) -> list[Any] | None:
    """Ask for permission for some tool calls at once and give the answers; None if the turn was interrupted."""
    answers: dict[str, Any] = {}
    for call in calls:
        tool, _, given = call.partition(" ")
        answers[str(uuid.uuid4())] = None
        request = {"subtype": "can_use_tool", "tool_name": tool, "input": json.loads(given)}
        say(type="control_request", request_id=list(answers)[-1], request=request)
    while None in answers.values():
        line = json.loads(sys.stdin.readline() or '{"type": "eof"}')
        note(control=line)
        if line["type"] == "control_response":
            answers[line["response"]["request_id"]] = line["response"].get("response", "error")
        elif line["type"] == "eof" or line["request"]["subtype"] == "interrupt":
            for pending in [name for name, value in answers.items() if value is None]:
                say(type="control_cancel_request", request_id=pending)
            if line["type"] != "eof":
                say(type="control_response", response={"subtype": "success", "request_id": line["request_id"]})
            say(type="result", subtype="error_during_execution", is_error=True, session_id=SESSION)
            return None
    return list(answers.values())


def obey(message: dict[str, Any]) -> None:
    """Answer a control request."""
    say(type="control_response", response={"subtype": "success", "request_id": message["request_id"]})


def check_interrupt() -> None:
    """Look whether an interrupt has come; the end of stdin changes nothing within a turn."""
    if select.select([sys.stdin], [], [], 0.005)[0]:
        line = sys.stdin.readline()
        message = json.loads(line or "{}")
        if message.get("type") == "control_request":
            note(control=message)
            obey(message)
            raise InterruptedError
        if line:
            WAITING.append(line)
        time.sleep(0.005)


def lines() -> Iterator[str]:
    """Give the lines of stdin, those first that came within a turn."""
    while line := WAITING.pop(0) if WAITING else sys.stdin.readline():
        yield line


def turn(text: str) -> None:
    """Answer one message as its first word asks."""
    global FAILED
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
    elif word == "ASK":  # for permission to do each line's TOOL {input}; the answers are the result
        answers = ask(rest.splitlines())
        if answers is not None:
            result(json.dumps(answers))
        return
    elif word == "SAY":  # the object that follows, and as the result the next line that comes in
        print(rest, flush=True)
        result(sys.stdin.readline())
        return
    elif word == "SILENT_EXIT":
        sys.exit(1)
    elif word == "HOLD":  # until the file named is there, SIGINT, or an interrupt
        while not os.path.exists(rest):  # noqa: PTH110
            check_interrupt()
    elif word == "OWN":  # when this is answered begin a turn by itself, which lasts until the file named is there
        result("done")
        say(type="system", subtype="init", session_id=SESSION)
        say(type="assistant", text="a task has ended")
        while not os.path.exists(rest):  # noqa: PTH110
            time.sleep(0.005)
        say(type="result", subtype="success", is_error=False, result="own", origin={"kind": "task-notification"})
        return
    elif word == "LEAVE":  # what the shell is told to leave running
        os.system(rest)
    elif word == "FLOOD":
        while True:
            sys.stdout.write('{"type":"assistant","text":"' + "z" * 100_000 + '"}\n')
    FAILED = word == "ERR"
    result(f"echo: {text}"[:200], is_error=FAILED)


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
    for line in lines():
        message = json.loads(line)
        if message["type"] != "user":
            note(control=message)
            continue
        note(message=message)
        try:
            turn(message["message"]["content"])
        except InterruptedError:
            result("interrupted", is_error=True)
        except KeyboardInterrupt:
            result("interrupted", is_error=True)
            sys.exit(0)
    while mode == "deaf":
        time.sleep(1)
    sys.exit(FAILED)


main()
