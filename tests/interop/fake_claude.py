#!/usr/bin/env python3
"""A stand-in for `claude` that speaks its stream-json, for tests of the Node side alone.

Like the real one it says nothing before the first message, starts each turn with `system/init`, and ends at the end of
its stdin. The text decides: `BIG:N` answers with N bytes, `EXIT:N` ends with status N, anything else comes back.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def say(**fields: Any) -> None:
    """Print one line of output."""
    print(json.dumps({**fields, "session_id": "fake"}, ensure_ascii=False), flush=True)


def turn(text: str) -> None:
    """Answer one message."""
    entry = os.environ["CLAUDE_CODE_ENTRYPOINT"]
    say(type="system", subtype="init", cwd=str(Path.cwd()), argv=sys.argv[1:], entry=entry)
    if text.startswith("EXIT:"):
        sys.exit(int(text[5:]))
    answer = "z" * int(text[4:]) if text.startswith("BIG:") else f"echo: {text}"
    say(type="assistant", message={"role": "assistant", "content": [{"type": "text", "text": answer}]})
    say(type="result", subtype="success", is_error=False, result=answer)


for line in sys.stdin:
    turn(json.loads(line)["message"]["content"])
