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
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pclaude.errors import DataError, NoSession, P2PClaudeError, Refused, TryAgain, WireError
from p2pclaude.host.datadir import file_errors, sync_directory
from p2pclaude.host.log import Event, Log, first_line
from p2pclaude.host.processes import Mark, end_leftovers
from p2pclaude.protocol.wire import SESSION_ENDED, SESSION_NOT_FOUND
from p2pclaude.sessions.claude import Launch
from p2pclaude.sessions.directory import Info, take_lock
from p2pclaude.sessions.inbox import NOW
from p2pclaude.sessions.journal import Journal, Page
from p2pclaude.sessions.launcher import DEFAULT_PERMISSION_MODE, Launcher, Settings, Spawn
from p2pclaude.sessions.life import LIVE, OVER, SessionLife, State
from p2pclaude.sessions.session import Session

MAX_WAIT_MS = 30_000
"""Longest time that `get-output` waits for something new, whatever `waitMs` asks for."""
MAX_UNMARKED = 1000
"""Envelopes at most that `get-output` gives without `after` and without `clear`; the newest."""
MAX_UNMARKED_BYTES = 1024 * 1024
"""Bytes at most, but one envelope at least, that it gives without `after`."""
MAX_OPEN_JOURNALS = 16
"""Journals of sessions without a process that are kept open for the next reader."""
MAX_TEXT_FIELD = 4096
"""Longest directory, model, session id or message id, in characters."""

REVIVE_SECONDS = 2.0
"""Pause between attempts to start a session again that has messages to run."""
REVIVE_AT_ONCE = 4
"""Sessions that are started again at the same time."""

_SESSION_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Output:
    """A page of a session's journal, and its state (None: there is no such session)."""

    page: Page
    state: State | None
    error: str | None = None


class SessionTable:
    """Every session of a data directory. `on_change` is called when the list, or what it shows, changes."""

    def __init__(self, path: Path, settings: Settings, log: Log, on_change: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._launcher = Launcher(settings)
        self._max_sessions = settings.max_sessions
        self._ask_timeout = settings.ask_timeout
        self._starting: set[Session] = set()
        self._new: set[Session] = set()  # these are deleted if their start fails
        self._turnstile = asyncio.Semaphore(REVIVE_AT_ONCE)
        self._log = log
        self._notify = on_change
        self._sessions: dict[str, Session] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._closing = False
        self._reviving: dict[str, asyncio.Task[None]] = {}
        self._changed_at: int | None = None
        self._change = asyncio.Event()

    async def load(self) -> None:
        """Read what earlier daemons left, and end what they left running: its sessions are dormant.

        Those with messages that were accepted and are not done are started again, in the background.
        """
        if ended := await end_leftovers(Mark.of_sessions(self._path)):
            self._log(Event.WARNING, message=f"ended {ended} processes that an earlier daemon left running")
        with file_errors(self._path):
            self._path.mkdir(mode=0o700, exist_ok=True)
            entries = sorted(self._path.iterdir())
        for entry in entries:
            if entry.is_dir() and _SESSION_ID.fullmatch(entry.name):
                await self._load_one(entry)

    async def _load_one(self, path: Path) -> None:
        try:
            info = Info.load(path)
        except (OSError, WireError) as error:
            self._load_damaged(path, error)
            return
        session = self._sessions[path.name] = self._make(path, info)
        crashed = State(info.state) in LIVE
        session.load(SessionLife.loaded(State(info.state)))
        if session.life.has_ended and info.ended_at is None:  # as an earlier version left it
            info.ended_at = int((path / "session.json").stat().st_mtime * 1000)
        if crashed or (info.queued and not session.life.has_ended):
            try:
                await self._find_unfinished(session)
            except OSError as error:
                session.give_up(f"the journal cannot be read: {error.strerror}")

    def _load_damaged(self, path: Path, error: Exception) -> None:
        """Keep a session in sight whose session.json is damaged: what it has said can be read still."""
        try:
            created = int((path / "journal.jsonl").stat().st_mtime * 1000)
        except OSError:  # there is none, or the directory may not be entered
            created = None
        what = "a session is left out" if created is None else "a session cannot go on"
        reason = f"session.json: {(error.strerror or '').lower()}" if isinstance(error, OSError) else str(error)
        self._log(Event.WARNING, message=f"{what}: {reason}", session=path.name)
        if created is not None:
            info = Info(path.name, "", "", created, DEFAULT_PERMISSION_MODE, state=State.FAILED, error=reason)
            session = self._sessions[path.name] = self._make(path, info)
            session.load(SessionLife.loaded(State.FAILED))
            session.file.is_damaged = True

    async def _find_unfinished(self, session: Session) -> None:
        await self.open_journal(session)
        if session.inbox or session.inbox.handed:
            session.await_claude()
            self._revive_soon(session)
        else:
            session.close_journal()
        await session.file.save()

    def _make(self, path: Path, info: Info) -> Session:
        return Session(path, info, self._log, self._changed, self._revive_soon, self._ask_timeout)

    @property
    def sessions(self) -> Collection[Session]:
        """Give every session."""
        return self._sessions.values()

    async def wait_change(self, timeout: float) -> None:
        """Wait, at most so many seconds, for a change of any session that a list would show."""
        try:
            async with asyncio.timeout(timeout):
                await self._change.wait()
        except TimeoutError:
            pass

    def _revive_soon(self, session: Session) -> None:
        """Start a session again that has messages to run, as soon as possible."""
        session_id = session.info.session_id
        before = self._reviving.get(session_id)
        if (before is None or before.done()) and not self._closing:
            task = self._reviving[session_id] = asyncio.create_task(self._revive(session))
            task.add_done_callback(lambda task: self._forget_revival(session_id, task))

    def _forget_revival(self, session_id: str, task: asyncio.Task[None]) -> None:
        if self._reviving.get(session_id) is task:  # it may have died again since
            del self._reviving[session_id]

    async def _revive(self, session: Session) -> None:
        while True:
            try:
                async with self._turnstile, session.lifecycle:
                    if session.is_orphaned:
                        await self._resume(session)
                    if not session.is_orphaned:
                        return
            except TryAgain:
                await asyncio.sleep(REVIVE_SECONDS)
            except (P2PClaudeError, OSError) as error:
                session.give_up(str(error))
                return

    async def spawn(self, spawn: Spawn) -> tuple[Session, int | None]:
        """Start a session and give it, with the seq of the first message if there was one.

        A retry with the same session and message ids gives the session that the first attempt made.
        """
        if (known := await self._spawned_before(spawn)) is None:
            await self._launcher.reach(spawn.directory)
            known = await self._spawned_before(spawn)  # maybe meanwhile
        if known is not None:
            return known
        session_id = self._check_id(spawn.session_id)
        launch = self._launcher.spawn(spawn, session_id)
        info = Info(
            session_id=session_id,
            claude_id=launch.claude_id,
            directory=str(launch.directory),
            created_at=_now_ms(),
            permission_mode=launch.permission_mode,
            model=launch.model,
            ask=launch.ask,
            number=1 + max((session.info.number for session in self._sessions.values()), default=0),
        )
        self._new.add(session := self._create(info))
        async with session.lifecycle:
            try:
                with file_errors(session.path):
                    await asyncio.to_thread(sync_directory, self._path)
                    await session.file.create()
                seq = await self._start(session, launch, Event.SPAWNED, spawn)
            except BaseException:
                await session.remove(ignore_errors=True)
                del self._sessions[session_id]
                self._changed()
                raise
            finally:
                self._new.discard(session)
        return session, seq

    async def send(self, session_id: str, text: str, message_id: str | None = None, priority: str | None = None) -> int:
        """Accept a message and give its seq; a session without a process gets one first. Raises NoSession."""
        if priority not in (None, NOW):
            raise DataError(f"priority must be {NOW}")
        while (session := self.find(session_id)) in self._new:
            async with session.lifecycle:  # what it accepted would be deleted with it
                pass
        journal = await self.open_journal(session)
        known = None if message_id is None else session.seq_of(message_id)
        if known is not None and session.inbox.is_done(known):
            await journal.synced(known)
            return known
        if not session.is_live:
            async with session.lifecycle:
                if not session.is_live:
                    await self._resume(session)
        return await session.accept(text, message_id, priority)

    async def read(
        self,
        session_id: str,
        *,
        after: int | None,
        limit: int | None,
        clear: bool,
        wait_ms: int,
        known_state: str | None = None,
    ) -> Output:
        """Give a page of a session's journal.

        `after` >= 0: every envelope after that seq; < 0: from the newest -`after` outputs on. None: the outputs since
        the mark, as the TypeScript daemon gives them. An empty page waits up to `wait_ms` while the session lives,
        and as long as its state is `known_state`, if that is given.
        """
        session = self._sessions.get(session_id)
        if session is None:
            return Output(Page([], max(after or 0, 0)), None)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_ms, MAX_WAIT_MS) / 1000
        while True:
            try:
                journal = await self.open_journal(session)
            except NoSession:  # it was deleted meanwhile
                return Output(Page([], max(after or 0, 0)), None)
            page = self._page(session, journal, after, limit, clear)
            left = deadline - loop.time()
            if page.lines or limit == 0 or left <= 0 or session.state in OVER:
                break
            if known_state is not None and session.state != known_state:
                break
            await journal.wait_change(left)
        if clear and page.next != session.info.mark:
            self._move_mark(session, page.next)
        return Output(page, session.state, session.info.error)

    def _page(self, session: Session, journal: Journal, after: int | None, limit: int | None, clear: bool) -> Page:
        if after is not None:
            start = after if after >= 0 else journal.start_of_last(-after)
            return journal.read(start, limit=limit)
        start = session.info.mark
        if not clear:
            # Asked again it would be the same page, so it is the newest that is of use.
            count = MAX_UNMARKED if limit is None else min(limit, MAX_UNMARKED)
            start = journal.start_of_last(count, after=start, max_bytes=MAX_UNMARKED_BYTES)
        return journal.read(start, limit=limit, max_bytes=MAX_UNMARKED_BYTES, outputs_only=True)

    def _move_mark(self, session: Session, seq: int) -> None:
        session.info.mark = seq
        if not session.is_live:
            session.file.save_soon()
        # While it lives, the next change of state writes it: the mark moves with every poll of a TypeScript client.

    async def stop(self, session_id: str) -> bool:
        """End a session for good; tell whether there is such a session."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        async with session.lifecycle:
            if self._sessions.get(session_id) is not session:  # its start has failed meanwhile
                return False
            if not session.life.has_ended:
                # With a clock that was set back it would look old, and be deleted too soon.
                youngest = max(other.info.created_at for other in self._sessions.values())
                session.info.ended_at = max(_now_ms(), youngest)
                await session.stop()
        return True

    def ended_before(self, moment: float) -> list[str]:
        """Give the ids of the sessions that were stopped before a time, in seconds since 1970."""
        ended = [session.info for session in self._sessions.values() if session.life.has_ended]
        return [info.session_id for info in ended if info.ended_at is not None and info.ended_at < moment * 1000]

    async def remove(self, session_id: str) -> bool:
        """Delete a session that has ended, with all it has said; tell whether it was there. Raises OSError."""
        session = self._sessions.get(session_id)
        if session is None or not session.life.has_ended:
            return False
        async with session.lifecycle:
            if self._sessions.get(session_id) is not session:  # another call was quicker
                return False
            del self._sessions[session_id]
            try:
                await session.remove()
            except OSError:
                self._sessions[session_id] = session
                raise
        self._changed()
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
            for session in sorted(sessions, key=lambda s: (s.info.number, s.info.created_at))
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
        for task in list(self._reviving.values()):
            task.cancel()
        await asyncio.gather(*self._reviving.values(), return_exceptions=True)
        await asyncio.gather(*(self._put_away(session) for session in list(self._sessions.values())))
        for session in self._sessions.values():
            session.close_journal()

    def kill(self) -> None:
        """End every process at once."""
        for session in self._sessions.values():
            session.kill()

    async def _put_away(self, session: Session) -> None:
        async with session.lifecycle:
            if session.is_live:
                await session.put_away()
        await session.file.settle()

    async def _start(self, session: Session, launch: Launch, event: Event, spawn: Spawn | None = None) -> int | None:
        while (live := self._count_live()) >= self._max_sessions and not self._closing:
            if not await self._make_room():
                raise TryAgain(f"{live} sessions run already, which is the most that this daemon allows")
        if self._closing:
            raise TryAgain("the daemon is stopping")
        text, message_id = (None, None) if spawn is None else (spawn.text, spawn.message_id)
        self._starting.add(session)
        self._note_open(session)  # the journal is about to be, and may be read by nobody ever
        lock: int | None = None
        try:
            lock = await take_lock(session.path)
            seq = await session.start(launch, text, message_id, lock=lock)
        except (P2PClaudeError, OSError) as error:
            self._log(Event.SPAWN_FAILED, session=session.info.session_id, error=first_line(str(error)))
            raise
        finally:
            self._starting.discard(session)
            if lock is not None:
                os.close(lock)
        # Nothing is waited for from here on: whoever accepts a message next shall find claude alive, or hear of it.
        self._log(
            event,
            session=session.info.session_id,
            pid=session.pid,
            directory=str(launch.directory),
            permission_mode=launch.permission_mode,
            model=launch.model,
        )
        return seq

    def _count_live(self) -> int:
        return sum(other in self._starting or other.pid is not None for other in self._sessions.values())

    async def _make_room(self) -> bool:
        """Put the session to sleep that has been idle the longest; tell whether there was one."""
        for session in sorted(self._sessions.values(), key=lambda session: session.idle_since):
            if session.is_at_rest and not session.lifecycle.locked():
                async with session.lifecycle:
                    if await session.sleep():
                        return True
        return False

    async def _resume(self, session: Session) -> None:
        info = session.info
        if self._sessions.get(info.session_id) is not session:  # its start has failed, or it was deleted
            raise NoSession(SESSION_NOT_FOUND)
        if session.life.has_ended:
            raise Refused(SESSION_ENDED)
        if session.file.is_damaged:
            raise DataError(f"the session cannot go on: {info.error}")
        await self._launcher.reach(info.directory)
        os.close(await take_lock(session.path))  # what an earlier claude says in its transcript counts when it is gone
        await self._start(session, self._launcher.resume(info), Event.RESUMED)

    async def _spawned_before(self, spawn: Spawn) -> tuple[Session, int] | None:
        while (session := self._sessions.get(spawn.session_id or "")) is not None and spawn.message_id is not None:
            async with session.lifecycle:  # the first attempt may be under way
                if self._sessions.get(session.info.session_id) is not session:
                    continue  # it has failed, and another attempt may have begun since
                journal = await self.open_journal(session)
                seq = session.seq_of(spawn.message_id)
                if seq is not None:
                    await journal.synced(seq)
                    return session, seq
                if journal.last_seq == 0 and not session.is_live:  # a crash cut the first attempt short
                    await session.remove(ignore_errors=True)
                    del self._sessions[session.info.session_id]
                return None
        return None

    def _check_id(self, session_id: str | None) -> str:
        if session_id is None:
            return str(uuid.uuid4())
        if not _SESSION_ID.fullmatch(session_id):
            raise DataError("sessionId is 1 to 128 letters, digits, `_`, `-` and `.`, and begins with no `-` or `.`")
        if session_id in self._sessions:
            raise Refused("sessionId is taken")
        return session_id

    def _create(self, info: Info) -> Session:
        path = self._path / info.session_id
        # A directory with nothing in it is what a crash left of a spawn: its retry shall find it free.
        if any((path / name).exists() for name in ("session.json", "journal.jsonl")):
            raise Refused("sessionId is taken")
        with file_errors(path):
            path.mkdir(mode=0o700, exist_ok=True)
        session = self._sessions[info.session_id] = self._make(path, info)
        return session

    def find(self, session_id: str) -> Session:
        """Give a session. Raises NoSession."""
        session = self._sessions.get(session_id)
        if session is None:
            raise NoSession(SESSION_NOT_FOUND)
        return session

    async def open_journal(self, session: Session) -> Journal:
        """Open a session's journal unless it is open, and close those that nobody has needed for the longest."""
        journal = await session.open_journal()
        self._note_open(session)
        return journal

    def _note_open(self, session: Session) -> None:
        self._recent[session.info.session_id] = None
        self._recent.move_to_end(session.info.session_id)
        idle = [i for i in self._recent if i not in self._sessions or self._sessions[i].needs_no_journal]
        for session_id in idle[:-MAX_OPEN_JOURNALS]:
            del self._recent[session_id]
            if session_id in self._sessions:
                self._sessions[session_id].close_journal()

    def _changed(self) -> None:
        self._changed_at = _now_ms()
        self._change.set()
        self._change = asyncio.Event()
        self._notify()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
