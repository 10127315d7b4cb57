"""What a session's directory holds beside its journal: `session.json`, the last words of claude, the lock.

    sessions/ID/   journal.jsonl, journal.index
                   session.json   what is needed to list the session and to start it again
                   stderr.txt     the end of what the last claude wrote to stderr
                   lock           locked while a claude serves the session, by claude itself

`session` stands above, the file system below.
"""

import asyncio
import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Self

from p2pclaude.errors import TryAgain, WireError
from p2pclaude.host.datadir import file_errors, write_atomically
from p2pclaude.host.log import Event, Log
from p2pclaude.host.processes import Mark, end_leftovers, holders
from p2pclaude.protocol.wire import dump_json, load_json
from p2pclaude.sessions.life import State

LOCK_SECONDS = 3.0
"""How long a new claude waits for an earlier one of its session to be gone."""
SAVE_AGAIN_SECONDS = 30.0
"""Pause between attempts to write `session.json`."""


@dataclass(slots=True)
class Info:
    """What `session.json` keeps. Times are in milliseconds since 1970; `mark` is the seq of the last `clear`.

    `queued` counts the messages that were accepted and are not done; `number` the sessions, in the order in which they
    were made, whatever the clock said (0: made by an earlier version).
    """

    session_id: str
    claude_id: str
    directory: str
    created_at: int
    permission_mode: str
    model: str | None = None
    state: str = State.STARTING
    begun: bool = False
    ask: bool = False
    mark: int = 0
    last_seq: int = 0
    queued: int = 0
    ended_at: int | None = None
    exit_status: int | None = None
    error: str | None = None
    number: int = 0

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the `session.json` of a session's directory. Raises OSError, or WireError if it is damaged."""
        info = cls.decode((path / "session.json").read_bytes())
        if info.session_id != path.name:
            raise WireError("session.json belongs to another session")
        return info

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read `session.json`; unknown fields are ignored. Raises WireError if it is damaged."""
        value = load_json(data)
        if not isinstance(value, dict):
            raise WireError("session.json is not an object")
        known = {field.name: value[field.name] for field in fields(cls) if field.name in value}
        try:
            info = cls(**known)
        except TypeError:
            raise WireError("session.json lacks a field") from None
        info._check()
        return info

    def _check(self) -> None:
        texts = (self.session_id, self.claude_id, self.directory, self.permission_mode)
        numbers = (self.created_at, self.mark, self.last_seq, self.queued, self.number)
        good = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
        optional = all(isinstance(text, str | None) for text in (self.model, self.error))
        optional &= all(isinstance(number, int | None) for number in (self.ended_at, self.exit_status))
        optional &= isinstance(self.begun, bool) and isinstance(self.ask, bool)
        if not (good and optional) or self.state not in list(State):
            raise WireError("session.json has a field of a wrong type")

    def save(self, path: Path) -> None:
        """Write `session.json` into a session's directory, in one step. Raises OSError."""
        write_atomically(path / "session.json", dump_json(asdict(self)) + b"\n")


class InfoFile:
    """A session's `session.json`: what it shall hold, and that it is written again after a failure.

    `note` brings `info` up to date before each write.
    """

    def __init__(self, path: Path, info: Info, log: Log, note: Callable[[], None]) -> None:
        self.path = path
        self.info = info
        self.is_damaged = False
        """Whether the file cannot be read: the session can be shown, but neither resumed nor written."""
        self._log = log
        self._note = note
        self._saving = asyncio.Lock()
        self._is_out_of_date = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def create(self) -> None:
        """Write it for the first time: what is accepted later can be found again. Raises OSError."""
        await asyncio.to_thread(self.info.save, self.path)

    async def save(self) -> None:
        """Write it; a failure is logged, and it is tried again after a while."""
        if self.is_damaged:
            return
        async with self._saving:
            self._note()
            self._is_out_of_date = False
            try:
                await asyncio.to_thread(self.info.save, self.path)
            except OSError as error:
                self._log(Event.WARNING, message=f"session.json: {error.strerror}", session=self.info.session_id)
                self._is_out_of_date = not isinstance(error, FileNotFoundError)
                asyncio.get_running_loop().call_later(SAVE_AGAIN_SECONDS, partial(self.save_soon, again=True))

    def save_soon(self, *, again: bool = False) -> None:
        """Write it in the background; with `again` only if that was in vain the last time."""
        if again and not self._is_out_of_date:
            return
        task = asyncio.create_task(self.save())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait for what `save_soon` began, and write what could not be written before."""
        self.save_soon(again=True)
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def abandon(self) -> None:
        """Write it a last time if that is due, and not again: the directory is about to be deleted."""
        await self.settle()
        self._is_out_of_date = False


def delete_directory(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a session's directory. Raises OSError, with some of it deleted, unless that is to be ignored.

    `session.json` goes last: what a failure or a crash leaves is still a session that has ended, and not a damaged one.
    """
    try:
        for entry in () if path.is_symlink() else path.iterdir():
            if entry.name != "session.json" and entry.is_file():
                entry.unlink()
    except OSError:
        if not ignore_errors:
            raise
    shutil.rmtree(path, ignore_errors=ignore_errors)


def save_last_words(path: Path, text: str) -> None:
    """Keep what claude wrote to stderr at the end, if anything; a failure costs no more than these words."""
    try:
        if text:
            write_atomically(path / "stderr.txt", text.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass


async def take_lock(path: Path) -> int:
    """Take a session's lock, so that never two claudes serve it, and give its descriptor.

    The child inherits the descriptor and the daemon closes its own: the lock lasts as long as claude, whatever becomes
    of the daemon. Raises TryAgain if an earlier claude stays.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + LOCK_SECONDS
    while True:
        with file_errors(path):
            lock = _try_lock(path)
        if lock is not None:
            return lock
        # What an earlier daemon left, not seen when this began, and what inherited the lock and dropped the mark.
        heirs = await asyncio.to_thread(holders, path / "lock")
        await end_leftovers(Mark.of_session(path), heirs)
        if loop.time() > deadline:
            raise TryAgain("an earlier claude still works in this session, which is busy until it is done")
        await asyncio.sleep(0.05)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
