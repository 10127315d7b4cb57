"""The session table: which sessions there are, who may start one where, and the paths between their lives.

`methods` stands above and turns requests into these calls; `session` below is one session. Errors are P2PClaudeErrors
whose texts are meant for the other side.
"""

import asyncio
import os
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pclaude.claude import PERMISSION_MODES, Launch, has_conversation
from p2pclaude.datadir import file_errors
from p2pclaude.errors import DataError, NoSession, P2PClaudeError, Refused, TryAgain, WireError
from p2pclaude.journal import PAGE_BYTES, Journal, Page
from p2pclaude.log import Event, Log, first_line
from p2pclaude.session import LIVE, Info, Session, State
from p2pclaude.wire import SESSION_NOT_FOUND

DEFAULT_MAX_SESSIONS = 64
"""Sessions with a process that a daemon runs at once, unless an option says otherwise."""
DEFAULT_PERMISSION_MODE = "acceptEdits"
"""As the TypeScript daemon's."""
MAX_WAIT_MS = 30_000
"""Longest time that `get-output` waits for something new, whatever `waitMs` asks for."""
MAX_UNMARKED = 1000
"""Envelopes at most that `get-output` gives without `after` and without `clear`; the newest."""
MAX_OPEN_JOURNALS = 16
"""Journals of sessions without a process that are kept open for the next reader."""
MAX_TEXT_FIELD = 4096
"""Longest directory, model, session id or message id, in characters."""

_OVER = frozenset({State.ENDED, State.FAILED})
"""The states in which nothing new is waited for; a dormant session may come back."""
_SESSION_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Settings:
    """How sessions are started here. `root_dir` and `default_dir` are real paths; `find_claude` raises Unavailable."""

    find_claude: Callable[[], Path]
    default_dir: Path
    root_dir: Path | None = None
    permission_mode: str = DEFAULT_PERMISSION_MODE
    model: str | None = None
    max_sessions: int = DEFAULT_MAX_SESSIONS


@dataclass(frozen=True, slots=True)
class Spawn:
    """What a new session is asked to be; None stands for the daemon's default."""

    directory: str | None = None
    session_id: str | None = None
    permission_mode: str | None = None
    model: str | None = None
    text: str | None = None
    message_id: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A page of a session's journal, and its state (None: there is no such session)."""

    page: Page
    state: State | None
    error: str | None = None


class SessionTable:
    """Every session of a data directory. `on_change` is called when the list, or what it shows, changes."""

    def __init__(
        self, path: Path, settings: Settings, log: Log, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._path = path
        self._settings = settings
        self._log = log
        self._notify = on_change
        self._sessions: dict[str, Session] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._closing = False
        self._changed_at: int | None = None

    async def load(self) -> None:
        """Read what earlier daemons left: sessions whose process is gone with its daemon are dormant."""
        with file_errors(self._path):
            self._path.mkdir(mode=0o700, exist_ok=True)
            entries = sorted(self._path.iterdir())
        for entry in entries:
            if entry.is_dir() and _SESSION_ID.fullmatch(entry.name):
                await self._load_one(entry)

    async def _load_one(self, path: Path) -> None:
        try:
            info = Info.decode((path / "session.json").read_bytes())
            if info.session_id != path.name:
                raise WireError("session.json belongs to another session")
        except (OSError, WireError) as error:
            self._log(Event.WARNING, message=f"a session is left out: {error}", session=path.name)
            return
        session = self._sessions[path.name] = Session(path, info, self._log, self._changed)
        if State(info.state) in LIVE:
            info.state = State.DORMANT
            await session.open_journal()
            session.close_journal()
            await session.save()

    async def spawn(self, spawn: Spawn) -> tuple[Session, int | None]:
        """Start a session and give it, with the seq of the first message if there was one.

        A retry with the same session and message ids gives the session that the first attempt made.
        """
        if (known := await self._spawned_before(spawn)) is not None:
            return known
        session_id = self._check_id(spawn.session_id)
        launch = self._launch(spawn, session_id)
        info = Info(
            session_id=session_id,
            claude_id=launch.claude_id,
            directory=str(launch.directory),
            created_at=time.time_ns() // 1_000_000,
            permission_mode=launch.permission_mode,
            model=launch.model,
        )
        session = self._create(info)
        async with session.lifecycle:
            try:
                seq = await self._start(session, launch, Event.SPAWNED, spawn)
            except BaseException:
                await session.remove()
                del self._sessions[session_id]
                self._changed()
                raise
        return session, seq

    async def send(self, session_id: str, text: str, message_id: str | None = None) -> int:
        """Accept a message and give its seq; a session without a process gets one first. Raises NoSession."""
        session = self._get(session_id)
        await self._journal(session)
        if message_id is not None and (known := session.seq_of(message_id)) is not None and session.is_live:
            return known
        if not session.is_live:
            async with session.lifecycle:
                if not session.is_live:
                    await self._resume(session)
        return session.accept(text, message_id)

    async def read(
        self, session_id: str, *, after: int | None, limit: int | None, clear: bool, wait_ms: int
    ) -> Output:
        """Give a page of a session's journal.

        `after` >= 0: every envelope after that seq; < 0: from the newest -`after` outputs on. None: the outputs since
        the mark, as the TypeScript daemon gives them. An empty page waits up to `wait_ms` while the session lives.
        """
        session = self._sessions.get(session_id)
        if session is None:
            return Output(Page([], max(after or 0, 0)), None)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_ms, MAX_WAIT_MS) / 1000
        while True:
            journal = await self._journal(session)
            page = self._page(session, journal, after, limit, clear)
            left = deadline - loop.time()
            if page.lines or limit == 0 or left <= 0 or session.state in _OVER:
                break
            await journal.wait_change(left)
        if clear and page.next != session.info.mark:
            self._move_mark(session, page.next)
        return Output(page, session.state, session.info.error)

    def _page(
        self, session: Session, journal: Journal, after: int | None, limit: int | None, clear: bool
    ) -> Page:
        if after is not None:
            start = after if after >= 0 else journal.start_of_last(-after)
            return journal.read(start, limit=limit)
        start = session.info.mark
        if not clear:
            # Asked again it would be the same page, so it is the newest that is of use.
            count = MAX_UNMARKED if limit is None else min(limit, MAX_UNMARKED)
            start = journal.start_of_last(count, after=start, max_bytes=PAGE_BYTES)
        return journal.read(start, limit=limit, outputs_only=True)

    def _move_mark(self, session: Session, seq: int) -> None:
        session.info.mark = seq
        if not session.is_live:
            session.save_soon()
        # While it lives, the next change of state writes it: the mark moves with every poll of a TypeScript client.

    async def stop(self, session_id: str) -> bool:
        """End a session for good; tell whether there is such a session."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        async with session.lifecycle:
            if session.state is not State.ENDED:
                await session.stop(State.ENDED)
        return True

    def listing(self, *, everything: bool = False) -> list[dict[str, Any]]:
        """Give what `list-sessions` gives, oldest first; with `everything`, also sessions without a process."""
        sessions = [s for s in self._sessions.values() if everything or s.is_live]
        return [
            {
                "sessionId": session.info.session_id,
                "pid": session.pid,
                "createdAt": session.info.created_at,
                "directory": session.info.directory,
                "state": session.state,
                "model": session.info.model,
                "lastSeq": session.last_seq,
            }
            for session in sorted(sessions, key=lambda s: s.info.created_at)
        ]

    def snapshot(self) -> dict[str, Any] | None:
        """Give the session record's content: the sessions with a process; None before the first change."""
        if self._changed_at is None:
            return None
        names = ("sessionId", "pid", "createdAt", "directory")
        return {"sessions": [{n: s[n] for n in names} for s in self.listing()], "updatedAt": self._changed_at}

    async def close(self) -> None:
        """End every process, leaving its session dormant, and close every journal."""
        self._closing = True
        await asyncio.gather(*(self._put_to_sleep(session) for session in list(self._sessions.values())))
        for session in self._sessions.values():
            session.close_journal()

    def kill(self) -> None:
        """End every process at once."""
        for session in self._sessions.values():
            session.kill()

    async def _put_to_sleep(self, session: Session) -> None:
        async with session.lifecycle:
            if session.is_live:
                await session.stop(State.DORMANT)
        await session.settle_writes()

    async def _start(self, session: Session, launch: Launch, event: Event, spawn: Spawn | None = None) -> int | None:
        if self._closing:
            raise TryAgain("the daemon is stopping")
        live = sum(other.is_live for other in self._sessions.values() if other is not session)
        if live >= self._settings.max_sessions:
            raise TryAgain(f"{live} sessions run already, which is the most that this daemon allows")
        text, message_id = (None, None) if spawn is None else (spawn.text, spawn.message_id)
        try:
            seq = await session.start(launch, text, message_id)
        except (P2PClaudeError, OSError) as error:
            self._log(Event.SPAWN_FAILED, session=session.info.session_id, error=first_line(str(error)))
            raise
        await session.save()
        self._log(
            event,
            session=session.info.session_id,
            pid=session.pid,
            directory=str(launch.directory),
            permission_mode=launch.permission_mode,
            model=launch.model,
        )
        return seq

    async def _resume(self, session: Session) -> None:
        info = session.info
        if info.state == State.ENDED:
            raise Refused("Session has ended")
        if info.permission_mode == "bypassPermissions":
            # Whoever wants a session without any questions again has to say so again.
            info.permission_mode = "default"
        known = has_conversation(info.claude_id, os.environ)
        launch = Launch(
            executable=self._settings.find_claude(),
            directory=self._check_directory(info.directory),
            permission_mode=info.permission_mode,
            claude_id=info.claude_id,
            model=info.model,
            resume=info.begun if known is None else known,
        )
        await self._start(session, launch, Event.RESUMED)

    async def _spawned_before(self, spawn: Spawn) -> tuple[Session, int] | None:
        session = self._sessions.get(spawn.session_id or "")
        if session is None or spawn.message_id is None:
            return None
        async with session.lifecycle:  # the first attempt may be under way
            if session.info.session_id not in self._sessions:
                return None
            await self._journal(session)
            seq = session.seq_of(spawn.message_id)
        return None if seq is None else (session, seq)

    def _launch(self, spawn: Spawn, session_id: str) -> Launch:
        mode = spawn.permission_mode or self._settings.permission_mode
        if mode not in PERMISSION_MODES:
            raise DataError(f"permissionMode is none of {', '.join(PERMISSION_MODES)}")
        directory = self._check_directory(spawn.directory)
        return Launch(
            executable=self._settings.find_claude(),
            directory=directory,
            permission_mode=mode,
            claude_id=_claude_id(session_id),
            model=spawn.model or self._settings.model,
        )

    def _check_id(self, session_id: str | None) -> str:
        if session_id is None:
            return str(uuid.uuid4())
        if not _SESSION_ID.fullmatch(session_id):
            raise DataError("sessionId is 1 to 128 letters, digits, `_`, `-` and `.`, and begins with no `-` or `.`")
        if session_id in self._sessions:
            raise Refused("sessionId is taken")
        return session_id

    def _check_directory(self, directory: str | None) -> Path:
        """Give the real path of a directory in which a session may run. Raises DataError or Refused."""
        path = self._settings.default_dir / (directory or "")
        real = Path(os.path.realpath(path))
        root = self._settings.root_dir
        # Before anything else is said: who may not go there shall not learn what is there.
        if root is not None and not real.is_relative_to(root):
            raise Refused("Directory is outside the root directory")
        if not os.access(real, os.F_OK):
            raise DataError(f"Directory does not exist: {path}")
        if not real.is_dir():
            raise DataError(f"Not a directory: {path}")
        if not os.access(real, os.R_OK | os.X_OK):
            raise Refused(f"Permission denied: {path}")
        return real

    def _create(self, info: Info) -> Session:
        path = self._path / info.session_id
        try:
            with file_errors(path):
                path.mkdir(mode=0o700)
        except P2PClaudeError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise Refused("sessionId is taken") from error
            raise
        session = self._sessions[info.session_id] = Session(path, info, self._log, self._changed)
        return session

    def _get(self, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise NoSession(SESSION_NOT_FOUND)
        return session

    async def _journal(self, session: Session) -> Journal:
        journal = await session.open_journal()
        self._recent[session.info.session_id] = None
        self._recent.move_to_end(session.info.session_id)
        idle = [i for i in self._recent if i not in self._sessions or self._sessions[i].is_idle]
        for session_id in idle[:-MAX_OPEN_JOURNALS]:
            del self._recent[session_id]
            if session_id in self._sessions:
                self._sessions[session_id].close_journal()
        return journal

    def _changed(self) -> None:
        self._changed_at = time.time_ns() // 1_000_000
        self._notify()


def _claude_id(session_id: str) -> str:
    """Give the UUID for Claude: the session's own id if it is one, else a new one, which session.json keeps."""
    try:
        return str(uuid.UUID(session_id))
    except ValueError:
        return str(uuid.uuid4())
