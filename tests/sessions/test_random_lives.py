"""Real sessions in a real table, with claudes in memory, through random lives: what must hold holds after each step."""

import asyncio
import errno
import itertools
import json
import random
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
from kit.bad_disk import BadDisk
from kit.sessions import Place, prepare, run

from p2pclaude.errors import P2PClaudeError, Refused
from p2pclaude.host.processes import Mark
from p2pclaude.sessions import session as session_module
from p2pclaude.sessions.claude import ClaudeGone, Launch
from p2pclaude.sessions.launcher import Spawn
from p2pclaude.sessions.life import LIVE, Stage, State
from p2pclaude.sessions.session import Session
from p2pclaude.sessions.table import SessionTable

STEPS = 40


class MemoryClaude:
    """A claude without a process: it keeps what it is handed, and says and does what it is told to."""

    made: list["MemoryClaude"] = []  # noqa: RUF012 - emptied by each test
    refuse = False
    numbers = itertools.count(1)
    transcript: set[str] = set()  # noqa: RUF012 - which messages a later claude would know of

    def __init__(self) -> None:
        self.pid = next(self.numbers)
        self.had: list[str] = []
        self.answered = 0
        self.has_exited = False
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.made.append(self)

    @classmethod
    async def start(
        cls, launch: Launch, environ: object = None, *, mark: Mark | None = None, keep: Collection[int] = ()
    ) -> Self:
        """Begin, unless claude cannot be started at the moment."""
        if MemoryClaude.refuse:
            raise Refused("there is no claude")
        return cls()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Give what it says, until it ends."""
        while (line := await self._lines.get()) is not None:
            yield line

    def say(self, **value: object) -> None:
        """Print an object."""
        if not self.has_exited:
            self._lines.put_nowait(json.dumps(value).encode())

    def write(self, value: Mapping[str, Any]) -> None:
        """Take an object."""
        if self.has_exited:
            raise ClaudeGone("claude has ended")
        if value.get("type") == "user":
            self.had.append(str(value["uuid"]))

    def answer(self) -> None:
        """Answer the oldest message that has no answer."""
        if self.answered < len(self.had) and not self.has_exited:
            self.say(type="system", subtype="init", session_id="fake")
            self.say(type="user", isReplay=True, uuid=self.had[self.answered], message={"content": "x"})
            self.say(type="assistant", message={"content": []})
            self.say(type="result", subtype="success", is_error=False, result="done")
            self.transcript.add(self.had[self.answered])
            self.answered += 1

    def die(self, status: int) -> None:
        """End."""
        if not self.has_exited:
            self.has_exited = True
            self._status.set_result(status)
            self._lines.put_nowait(None)

    def kill(self) -> None:
        """End by a signal."""
        self.die(-9)

    async def stop(self, *, in_turn: bool = False) -> int | None:
        """End in order."""
        await asyncio.sleep(0)
        self.die(0)
        return 0

    async def finish(self) -> int:
        """Wait for the end."""
        return await asyncio.shield(self._status)

    async def settle(self, timeout: float) -> bool:
        """Tell whether it runs still."""
        await asyncio.sleep(0)
        return not self.has_exited

    def last_words(self) -> str:
        """Say nothing."""
        return ""

    async def has_background(self) -> bool:
        """Have nothing in the background."""
        return False


class Lives:
    """A table that random things happen to."""

    def __init__(self, table: SessionTable, rng: random.Random, disk: BadDisk) -> None:
        self.table = table
        self.rng = rng
        self.disk = disk
        self.accepted: dict[str, set[int]] = {}
        self.ended: set[str] = set()

    def pick(self) -> Session | None:
        """Give one of the sessions."""
        sessions = list(self.table.sessions)
        return self.rng.choice(sessions) if sessions else None

    async def step(self) -> None:
        """Let one thing happen."""
        rng, session = self.rng, self.pick()
        what = rng.choice(
            ["spawn", "send", "send", "send", "answer", "answer", "answer", "print", "own", "die", "fail", "stop",
             "refuse", "together", "cut", "cut", "cut", "full", "fails"]
        )  # fmt: skip
        if what not in ("full", "fails"):
            self.disk.mend()
        live = [claude for claude in MemoryClaude.made if not claude.has_exited]
        claude = rng.choice(live) if live else None
        if what == "refuse":
            MemoryClaude.refuse = not MemoryClaude.refuse
        elif what in ("full", "fails"):
            self.disk.is_full, self.disk.sync_error = what == "full", errno.EIO if what == "fails" else None
            await self.cut(self.begin(session))
        elif what == "spawn" or session is None:
            await self.spawn()
        elif what == "cut":
            await self.cut(self.begin(session))
        elif what == "send":
            await self.send(session.info.session_id)
        elif what == "stop":
            if rng.random() < 0.3:
                await self.stop(session.info.session_id)
        elif what == "together":
            await asyncio.gather(*(self.send(session.info.session_id) for _ in range(3)))
        elif claude is not None:
            self.happen(claude, what)

    def happen(self, claude: MemoryClaude, what: str) -> None:
        """Let a claude do something by itself."""
        if what == "answer":
            claude.answer()
        elif what == "print":
            claude.say(type="assistant", message={"content": []})
        elif what == "own":
            claude.say(type="system", subtype="init", session_id="fake")
            claude.say(type="result", origin={"kind": "task-notification"}, subtype="success")
        elif what == "die":
            claude.die(0)
        elif what == "fail":
            claude.die(1)

    async def spawn(self) -> None:
        """Start a session, with a message or without."""
        text = "hello" if self.rng.random() < 0.5 else None
        try:
            session, seq = await self.table.spawn(Spawn(text=text))
        except (P2PClaudeError, OSError):
            return
        self.accepted[session.info.session_id] = set() if seq is None else {seq}

    async def send(self, session_id: str) -> None:
        """Send a message; a session that was stopped takes none."""
        priority = "now" if self.rng.random() < 0.2 else None
        try:
            seq = await self.table.send(session_id, "hello", priority=priority)
        except (P2PClaudeError, OSError):
            return
        assert session_id not in self.ended, "a session that has ended took a message"
        self.accepted.setdefault(session_id, set()).add(seq)

    async def stop(self, session_id: str) -> None:
        """Stop a session for good."""
        if await self.table.stop(session_id):
            self.ended.add(session_id)

    def begin(self, session: Session | None) -> asyncio.Task[object]:
        """Begin something that others may overtake."""
        if session is None:
            return asyncio.create_task(self.spawn())
        session_id = session.info.session_id
        return asyncio.create_task(
            self.rng.choice(
                [self.spawn, lambda: self.send(session_id), lambda: self.stop(session_id), self.table._make_room]
            )()
        )

    async def cut(self, task: asyncio.Task[object]) -> None:
        """Cancel something at one of its awaits."""
        for _ in range(self.rng.randrange(12)):
            await asyncio.sleep(self.rng.choice([0, 0, 0.0005]))
        task.cancel()
        (how,) = await asyncio.gather(task, return_exceptions=True)
        assert how is None or isinstance(how, bool | asyncio.CancelledError | P2PClaudeError | OSError), how

    def check(self) -> None:
        """Assert what holds of every session at any time."""
        listed = {entry["sessionId"]: entry for entry in self.table.listing(everything=True)}
        for session in self.table.sessions:
            session.inbox.check()
            entry = listed[session.info.session_id]
            assert entry["state"] == session.state and session.info.state == session.life.stored
            assert (entry["pid"] is not None) == session.life.has_process
            assert entry["pid"] is None or session.state in LIVE
            if session.info.session_id in self.ended:
                assert session.life.stage is Stage.ENDED


async def settle() -> None:
    """Let the loop and the journals' threads come to rest."""
    for _ in range(4):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("seed", range(12))
def test_random_lives(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place: Place = prepare(tmp_path, monkeypatch)
    monkeypatch.setattr(session_module, "ClaudeProcess", MemoryClaude)
    monkeypatch.setattr(session_module, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(MemoryClaude, "made", [])
    monkeypatch.setattr(MemoryClaude, "refuse", False)
    monkeypatch.setattr(MemoryClaude, "transcript", set())
    # What was answered and could not be written down, since the disk failed, claude knows by itself.
    monkeypatch.setattr(session_module, "knows_message", lambda _id, uuid, _environ: uuid in MemoryClaude.transcript)
    rng = random.Random(seed)
    disk = BadDisk(monkeypatch)
    lives: Lives | None = None

    async def one_daemon() -> None:
        nonlocal lives
        begun: list[asyncio.Task[object]] = []
        async with place.table(max_sessions=3) as table:
            accepted, ended = ({}, set()) if lives is None else (lives.accepted, lives.ended)
            lives = Lives(table, rng, disk)
            lives.accepted, lives.ended = accepted, ended
            lives.check()
            for _ in range(STEPS // 2):
                await lives.step()
                lives.check()
                await settle()
                lives.check()
            MemoryClaude.refuse = False
            disk.mend()
            begun = [lives.begin(lives.pick()) for _ in range(rng.randrange(3))]  # the end of the daemon overtakes it
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
        assert all(claude.has_exited for claude in MemoryClaude.made)
        for task in begun:
            await lives.cut(task)
        assert all(claude.has_exited for claude in MemoryClaude.made)

    async def main() -> None:
        for _ in range(2):
            await one_daemon()
        assert lives is not None
        async with place.table(max_sessions=3) as table:
            for session in table.sessions:  # whatever was accepted is known, and gets to its end
                await table.open_journal(session)
                for seq in lives.accepted.get(session.info.session_id, ()):
                    assert session.inbox.is_done(seq) or session.inbox or session.inbox.handed
            while any(session.is_live and not session.is_at_rest for session in table.sessions):
                for claude in MemoryClaude.made:
                    claude.answer()
                await settle()
            for session in table.sessions:
                await table.open_journal(session)
                waits = not session.inbox and not session.inbox.handed
                assert waits or session.state in (State.ENDED, State.FAILED)

    run(main())
    had = [uuid for claude in MemoryClaude.made for uuid in claude.had[: claude.answered]]
    assert len(set(had)) == len(had), "a message was answered twice"


def test_a_spawn_that_is_cancelled_while_its_claude_is_taken_back_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Place = prepare(tmp_path, monkeypatch)
    monkeypatch.setattr(session_module, "ClaudeProcess", MemoryClaude)
    monkeypatch.setattr(MemoryClaude, "made", [])
    disk = BadDisk(monkeypatch)

    async def main() -> None:
        async with place.table() as table:
            disk.is_full = True
            spawning = asyncio.create_task(table.spawn(Spawn(text="hello")))
            while not (MemoryClaude.made and MemoryClaude.made[0].has_exited):
                await asyncio.sleep(0)
            (session,) = table.sessions
            spawning.cancel()
            await asyncio.gather(spawning, return_exceptions=True)
            disk.mend()
            assert session.life.is_removed and session.pid is None
        assert not place.log.events("warning")

    run(main())
