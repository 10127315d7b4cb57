#!/usr/bin/env python3
"""A stand-in for `claude` that treats crashes as the real one was measured to do (2.1.197), for `crash`.

- A message stands in the transcript, under its uuid, 0.1 s after it was read, or at once on SIGTERM; SIGKILL loses it.
- A uuid that the transcript holds is ignored, without a word.
- When stdin ends the turn is finished first; a stdout that nobody reads is no reason to stop.
- `--session-id` is refused once there is a transcript, `--resume` without one; on SIGINT a turn ends with a result.

`TOOL:echo WORD >> FILE` appends the word to the file: what was run is counted there.
"""

import glob
import json
import os
import random
import signal
import sys
import threading
import time
from typing import Any, NoReturn

FLUSH_SECONDS = 0.1

option = next(a for a in sys.argv if a.startswith(("--session-id=", "--resume=")))
session_id = option.partition("=")[2]
projects = os.environ["HOME"] + "/.claude/projects/work"
transcript = f"{projects}/{session_id}.jsonl"
pending: list[str] = []
lock = threading.RLock()


def flush() -> None:
    """Write what the transcript does not hold yet."""
    with lock:
        if pending:
            with open(transcript, "a", encoding="utf-8") as file:  # noqa: PTH123 (pathlib costs a third of the start)
                file.write("".join(json.dumps({"type": "user", "uuid": uuid}) + "\n" for uuid in pending))
            pending.clear()


def terminate(*_: object) -> NoReturn:
    """Leave as on SIGTERM."""
    flush()
    os._exit(143)


def say(**fields: Any) -> None:
    """Print one object, if anybody reads."""
    try:
        os.write(1, json.dumps(fields).encode() + b"\n")
    except OSError:
        pass


def turn(text: str) -> None:
    """Ask for a tool, run it, answer."""
    say(type="system", subtype="init", session_id=session_id)
    time.sleep(random.uniform(0, 0.03))
    say(type="assistant", message={"content": [{"type": "tool_use", "name": "Bash"}]})
    command = text.removeprefix("TOOL:echo ")
    word, _, name = command.partition(" >> ")
    file = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, word.encode() + b"\n")
    os.close(file)
    time.sleep(random.uniform(0, 0.05))
    say(type="user", message={"content": [{"type": "tool_result"}]})
    say(type="result", subtype="success", is_error=False, result=f"ran {word}", session_id=session_id)


def main() -> None:
    """Take messages until stdin ends."""
    os.makedirs(projects, exist_ok=True)  # noqa: PTH103
    exists = bool(glob.glob(transcript))  # noqa: PTH207
    if exists != option.startswith("--resume"):
        sys.stderr.write(f"Error: Session ID {session_id} is {'already in use' if exists else 'unknown'}.\n")
        sys.exit(1)
    signal.signal(signal.SIGTERM, terminate)
    known: set[str] = set()
    if exists:
        with open(transcript, encoding="utf-8") as file:  # noqa: PTH123
            known = {json.loads(line)["uuid"] for line in file}
    for line in sys.stdin:
        message = json.loads(line)
        if message["uuid"] in known:
            continue
        known.add(message["uuid"])
        with lock:
            pending.append(message["uuid"])
        timer = threading.Timer(FLUSH_SECONDS, flush)
        timer.daemon = True
        timer.start()
        try:
            turn(message["message"]["content"])
        except KeyboardInterrupt:
            say(type="result", subtype="error_during_execution", is_error=True, result="", session_id=session_id)
            break
    flush()


main()
