"""What the tests of sessions share: a fake claude to start, a table over it, a log that is kept."""

import asyncio
import io
import json
import shlex
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2pclaude.host.log import Log
from p2pclaude.protocol.wire import OUTPUT
from p2pclaude.sessions import claude, session
from p2pclaude.sessions.launcher import Settings
from p2pclaude.sessions.life import State
from p2pclaude.sessions.table import MAX_WAIT_MS, SessionTable

FAKE = Path(__file__).with_name("fake_claude.py")
PATIENT_STEPS = tuple((number, 15.0) for number, _ in claude.STOP_STEPS)
"""How a fake claude is ended: it does what it is asked to, sooner or later on a busy machine."""


def install_fake_claude(directory: Path) -> Path:
    """Put a program `claude` into a directory and give its path."""
    path = directory / "claude"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -E {shlex.quote(str(FAKE))} "$@"\n')
    path.chmod(0o755)
    return path


class KeptLog(Log):
    """A log whose lines can be looked at."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        super().__init__(self.stream, debug=True)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Give every line so far."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Give the lines of one event."""
        return [line for line in self.lines if line["event"] == name]


class Place:
    """A directory to work in, with a fake claude, a root directory and a data directory for sessions."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.claude = install_fake_claude(self.path)
        self.root = self.path / "root"
        self.sessions = self.path / "sessions"
        self.notes = self.path / "fake.log"
        self.log = KeptLog()
        self.root.mkdir()
        self.sessions.mkdir()

    def told(self) -> list[dict[str, Any]]:
        """Give what the fake claudes noted: their starts, and the messages they got."""
        lines = self.notes.read_text().splitlines(keepends=True) if self.notes.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written

    def messages(self) -> list[str]:
        """Give the texts that the fake claudes got."""
        return [entry["message"]["message"]["content"] for entry in self.told() if "message" in entry]

    def settings(self, **changes: Any) -> Settings:
        """Give settings for this place."""
        return replace(Settings(find_claude=lambda: self.claude, default_dir=self.root), **changes)

    @asynccontextmanager
    async def table(
        self, *, on_change: Callable[[], None] = lambda: None, **changes: Any
    ) -> AsyncIterator[SessionTable]:
        """Give a loaded session table, and close it in the end."""
        table = SessionTable(self.sessions, self.settings(**changes), self.log, on_change)
        await table.load()
        try:
            yield table
        finally:
            await table.close()
        defects = [line for line in self.log.events("warning") if "defect" in str(line.get("message"))]
        assert not defects, defects
        for one in table.sessions:
            one.inbox.check()


def prepare(path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place whose fake claudes write to its log and find nothing in HOME."""
    place = Place(path)
    monkeypatch.setenv("FAKE_CLAUDE_LOG", str(place.notes))
    monkeypatch.setenv("CLAUDECODE", "1")
    monkeypatch.setenv("HOME", str(path / "home"))
    monkeypatch.setattr(session, "SETTLE_SECONDS", 0.15)
    monkeypatch.setattr(claude, "STOP_STEPS", PATIENT_STEPS)
    return place


def eventually(check: Callable[[], bool]) -> None:
    """Wait for what the kernel, or another process, is about to do."""
    deadline = time.monotonic() + 40
    while not check():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def are_at_rest(pids: Iterable[int]) -> bool:
    """Tell whether each process waits for something, or is gone.

    One that has just been started is still about to become another program; at the moment when it does nobody can read
    its environment, and its mark is out of sight.
    """
    return all(map(_is_at_rest, pids))


def _is_at_rest(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"S", b"T")
    except OSError:
        return True


async def wait_for_state(table: SessionTable, session_id: str, *states: State) -> None:
    """Wait until a session is in one of the states; idle with nothing left to do, if that is one of them.

    Where the disk is slow a claude that has settled is idle for a moment, before its first message is handed to it.
    """
    found = table.find(session_id)
    while found.state not in states or (found.state is State.IDLE and not found.is_at_rest):
        await asyncio.sleep(0.01)


def run(main: Awaitable[None], seconds: float = 60.0) -> None:
    """Run a test's coroutine, bounded in time."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await main

    asyncio.run(bounded())


async def read_all(table: SessionTable, session: str, after: int = 0) -> list[dict[str, Any]]:
    """Give every envelope after a seq."""
    found: list[dict[str, Any]] = []
    while True:
        output = await table.read(session, after=after, limit=None, clear=False, wait_ms=0)
        found += [json.loads(line) for line in output.page.lines]
        if not output.page.lines:
            return found
        after = output.page.next


async def read_until(
    table: SessionTable, session: str, done: Callable[[dict[str, Any]], bool], after: int = 0
) -> list[dict[str, Any]]:
    """Follow a session until an envelope is the one; give all up to it."""
    found: list[dict[str, Any]] = []
    while True:
        output = await table.read(session, after=after, limit=None, clear=False, wait_ms=MAX_WAIT_MS)
        for line in output.page.lines:
            found.append(json.loads(line))
            if done(found[-1]):
                return found
        if not output.page.lines:
            raise AssertionError(f"state {output.state}, {output.error} after {found}")
        after = output.page.next


async def read_results(table: SessionTable, session: str, count: int = 1, after: int = 0) -> list[dict[str, Any]]:
    """Follow a session until so many results have come; give all envelopes up to there."""
    left = count

    def is_last(envelope: dict[str, Any]) -> bool:
        nonlocal left
        left -= envelope["type"] == OUTPUT and envelope["data"]["type"] == "result"
        return not left

    return await read_until(table, session, is_last, after)


def outputs(envelopes: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Give claude's objects of one type."""
    return [e["data"] for e in envelopes if e["type"] == OUTPUT and e["data"].get("type") == kind]
