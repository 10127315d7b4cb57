"""Draw the tables of lives into ARCHITECTURE.md, between its marks.

A life is two enumerations and a mapping (state, event) -> state. Its drawing has a row for each state: what leads
where, and what changes nothing.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"

Transitions = Mapping[Any, StrEnum]  # from pairs of a state and an event

LIVES: Final = {  # the mark in the document: the module, and the name of its table
    "session": ("p2pclaude.sessions.life", "TRANSITIONS"),
    "ending": ("p2pclaude.sessions.life", "ENDINGS"),
    "message": ("p2pclaude.sessions.message_life", "TRANSITIONS"),
    "attempt": ("p2pclaude.hyperdht.peer.attempt_life", "TRANSITIONS"),
}


def table_of(mark: str) -> Transitions:
    """Return a life's table."""
    module, name = LIVES[mark]
    table: Transitions = getattr(importlib.import_module(module), name)
    return table


def draw(table: Transitions) -> str:
    """Return a table as Markdown: a row for each state that something leads out of, and the final states in the end."""
    states = type(next(iter(table.values())))
    rows = ["| it is | and then |", "| --- | --- |"]
    final = []
    for state in states:
        leads: dict[str, list[str]] = {}
        for (before, event), after in table.items():
            if before is state:
                leads.setdefault("no change" if after is state else after, []).append(event)
        if leads:
            stays = leads.pop("no change", [])
            ways = [f"{', or '.join(events)}: **{after}**" for after, events in leads.items()]
            ways += [f"no change by {', '.join(stays)}"] if stays else []
            rows.append(f"| **{state}** | {'; '.join(ways)} |")
        else:
            final.append(f"**{state}**")
    if final:
        rows.append(f"| {', '.join(final)} | nothing more |")
    return "\n".join(rows)


def redraw(text: str) -> str:
    """Return a document with every life drawn anew. Raises ValueError if a mark is missing."""
    for mark in LIVES:
        begin, end = f"<!-- life: {mark} -->", f"<!-- end: {mark} -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.S)
        if not pattern.search(text):
            raise ValueError(f"{DOCUMENT.name} lacks {begin} ... {end}")
        drawing = f"{begin}\n{draw(table_of(mark))}\n{end}"
        text = pattern.sub(lambda _, drawing=drawing: drawing, text)  # type: ignore[misc]
    return text


def main(arguments: list[str] | None = None, document: Path = DOCUMENT) -> int:
    """Draw, or with `--check` tell whether what is drawn is true; return the exit status."""
    parser = argparse.ArgumentParser(prog="tests/draw", description="Draw the tables of lives into ARCHITECTURE.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the drawings are old")
    options = parser.parse_args(arguments)
    try:
        before = document.read_text(encoding="utf-8")
        after = redraw(before)
    except (OSError, ValueError) as error:
        print(f"tests/draw: {error}", file=sys.stderr)
        return 1
    if options.check:
        if before != after:
            print(f"tests/draw: {document.name} does not show the lives as they are; run tests/draw", file=sys.stderr)
        return int(before != after)
    document.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
