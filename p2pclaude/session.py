"""One session: its state, its journal, and the claude that fills it.

    message -> journal (MESSAGE) -> queue -> journal (TURN) -> claude's stdin        one message for each idle claude
    claude's stdout -> journal (OUTPUT) -> whoever reads

`sessions` holds the table of these. A session outlives its process, and the daemon: `session.json` says what is needed
to show it and to start it again, `journal.jsonl` what was said.
"""

import asyncio
import shutil
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Self

from p2pclaude.claude import ClaudeGone, ClaudeProcess, Launch, decode_line, user_message
from p2pclaude.datadir import write_atomically
from p2pclaude.errors import P2PClaudeError, TryAgain, Unavailable, WireError
from p2pclaude.journal import DiskFull, Journal
from p2pclaude.log import Event, Log, first_line
from p2pclaude.wire import MESSAGE, TURN, dump_json, load_json

MAX_QUEUED = 256
"""Messages of one session that may wait for their turn."""
SETTLE_SECONDS = 0.3
"""A child that dies within this time makes the spawn fail; one that prints a line earlier is believed earlier."""
RETRY_SECONDS = 1.0
"""Pause between attempts to write to a full disk."""


class State(StrEnum):
    """What a session is doing, as `list-sessions` and `get-output` say it."""

    STARTING = "starting"
    """Claude was started and has not been heard of."""
    IDLE = "idle"
    """Claude waits for a message."""
    RUNNING = "running"
    """Claude works on a message."""
    PAUSED = "paused"
    """The disk is full: nothing is lost, claude waits until there is room."""
    DORMANT = "dormant"
    """No process; the next message starts one that knows the conversation."""
    ENDED = "ended"
    """It was stopped, and takes no more messages."""
    FAILED = "failed"
    """Claude died with an error; the next message tries again."""


LIVE = frozenset({State.STARTING, State.IDLE, State.RUNNING, State.PAUSED})
"""The states in which there is a process."""


@dataclass(slots=True)
class Info:
    """What `session.json` keeps. `created_at` is in milliseconds since 1970; `mark` is the seq of the last `clear`."""

    session_id: str
    claude_id: str
    directory: str
    created_at: int
    permission_mode: str
    model: str | None = None
    state: str = State.STARTING
    begun: bool = False
    mark: int = 0
    last_seq: int = 0
    exit_status: int | None = None
    error: str | None = None

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
        numbers = (self.created_at, self.mark, self.last_seq)
        good = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
        optional = all(isinstance(text, str | None) for text in (self.model, self.error))
        if not (good and optional and isinstance(self.begun, bool)) or self.state not in list(State):
            raise WireError("session.json has a field of a wrong type")


class Session:
    """One session. `on_change` is called after each change that a list of sessions would show."""

    def __init__(self, path: Path, info: Info, log: Log, on_change: Callable[[], None]) -> None:
        self.path = path
        self.info = info
        self.journal: Journal | None = None
        self.lifecycle = asyncio.Lock()  # held while the process is started or ended
        self._log = log
        self._on_change = on_change
        self._process: ClaudeProcess | None = None
        self._pump: asyncio.Task[None] | None = None
        self._queue: deque[tuple[int, dict[str, Any]]] = deque()
        self._message_ids: dict[str, int] = {}
        self._turn: int | None = None  # the seq of the message that claude works on
        self._news = asyncio.Event()
        self._final: State | None = None  # what to become when the process ends because it was told to
        self._paused = False
        self._saving = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        """Give the state as others see it."""
        return State.PAUSED if self._paused else State(self.info.state)

    @property
    def is_live(self) -> bool:
        """Tell whether there is a process."""
        return self.state in LIVE

    @property
    def is_idle(self) -> bool:
        """Tell whether nobody needs the journal open: no process writes it and no reader waits."""
        return not self.is_live and (self.journal is None or not self.journal.is_awaited)

    @property
    def pid(self) -> int | None:
        """Give claude's process id while there is one."""
        return self._process.pid if self._process is not None and self.is_live else None

    @property
    def last_seq(self) -> int:
        """Give the seq of the newest envelope."""
        return self.info.last_seq if self.journal is None else self.journal.last_seq

    def seq_of(self, message_id: str) -> int | None:
        """Give the seq under which a message was accepted before; the journal must be open."""
        return self._message_ids.get(message_id)

    async def open_journal(self) -> Journal:
        """Open the journal unless it is open, and learn from it which messages were accepted and which still wait."""
        if self.journal is None:
            found: dict[int, dict[str, Any]] = {}
            handed: set[int] = set()
            journal = await asyncio.to_thread(
                Journal.open, self.path / "journal.jsonl", on_other=lambda seq, line: _learn(seq, line, found, handed)
            )
            if self.journal is not None:  # somebody else was faster
                journal.close()
                return self.journal
            self.journal = journal
            self._message_ids = {str(value.get("messageId")): seq for seq, value in found.items()}
            waiting = [(seq, value["data"]) for seq, value in found.items() if seq not in handed and "data" in value]
            self._queue = deque(waiting)
        return self.journal

    def close_journal(self) -> None:
        """Close the journal, if it is open and there is no process; readers open it again."""
        if self.journal is not None and not self.is_live:
            self.info.last_seq = self.journal.last_seq
            self.journal.close()
            self.journal = None

    async def start(self, launch: Launch, text: str | None = None, message_id: str | None = None) -> int | None:
        """Start claude, and with `text` give it the first message, whose seq is returned.

        Raises Unavailable, with claude's own last words, if it cannot be run or dies at once.
        """
        before, self.info.state = self.info.state, State.STARTING
        try:
            journal = await self.open_journal()
            process = await ClaudeProcess.start(launch)
        except BaseException:
            self.info.state = before
            raise
        self._process, self._turn, self._final = process, None, None
        self.info.exit_status = self.info.error = None
        self._pump = asyncio.create_task(self._run(process, journal))
        self._changed()
        try:
            seq = None if text is None else self.accept(text, message_id)
            runs = await process.settle(SETTLE_SECONDS)
        except BaseException:
            await self._give_up(process, self._pump)
            raise
        if not runs:
            await self._pump
            reason = self.info.error or _describe_exit(self.info.exit_status)
            raise Unavailable(f"claude ended at once: {reason}")
        if self.info.state == State.STARTING:
            self._set_state(State.IDLE)
        return seq

    def accept(self, text: str, message_id: str | None = None) -> int:
        """Take a message for a live session and give its seq; the same `message_id` again gives the same seq.

        Raises DiskFull or TryAgain (too many wait): then it was not accepted.
        """
        message_id = str(uuid.uuid4()) if message_id is None else message_id
        if (known := self._message_ids.get(message_id)) is not None:
            return known
        if len(self._queue) >= MAX_QUEUED:
            raise TryAgain(f"{MAX_QUEUED} messages wait already in this session")
        if self.journal is None:
            raise RuntimeError("the journal is not open")
        message = user_message(text, message_id)
        seq = self.journal.append(MESSAGE, {"messageId": message_id, "data": message})
        self._message_ids[message_id] = seq
        self._queue.append((seq, message))
        self._news.set()
        self._log(Event.MESSAGE, session=self.info.session_id, seq=seq)
        return seq

    async def stop(self, final: State) -> None:
        """End the process, if there is one, and become `final`; what claude still says is journaled."""
        self._final = final
        if self._process is not None and self._pump is not None and not self._pump.done():
            if await self._process.stop() is None:
                self._log(Event.WARNING, message="claude did not end even when killed", session=self.info.session_id)
            # The pump ends with claude's stdout; what keeps it longer is a full disk.
            await asyncio.wait([self._pump], timeout=1.0)
            if not self._pump.done():
                self._pump.cancel()
                await asyncio.wait([self._pump], timeout=1.0)
        if self.info.state != final:
            self._set_state(final)
        await self.save()

    def kill(self) -> None:
        """End the process without any ceremony."""
        if self._process is not None:
            self._process.kill()

    async def save(self) -> None:
        """Write `session.json`; a failure is logged, since the next change tries again."""
        async with self._saving:
            self.info.last_seq = self.last_seq
            data = dump_json(asdict(self.info)) + b"\n"
            try:
                await asyncio.to_thread(write_atomically, self.path / "session.json", data)
            except OSError as error:
                self._log(Event.WARNING, message=f"session.json: {error.strerror}", session=self.info.session_id)

    def save_soon(self) -> None:
        """Write `session.json` in the background."""
        task = asyncio.get_running_loop().create_task(self.save())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def remove(self) -> None:
        """Delete a session that never came to be."""
        await self.settle_writes()
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        await asyncio.to_thread(shutil.rmtree, self.path, ignore_errors=True)

    async def _give_up(self, process: ClaudeProcess, pump: asyncio.Task[None]) -> None:
        process.kill()
        pump.cancel()  # maybe before its first step, and then it cleans nothing up
        await asyncio.wait([pump], timeout=1.0)
        status = await process.finish()
        if self.is_live:
            self._over(status, process.last_words(), None)

    async def settle_writes(self) -> None:
        """Wait for what `save_soon` began."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def _run(self, process: ClaudeProcess, journal: Journal) -> None:
        """Journal claude's output until it ends, while the queue is fed to it."""
        feeder = asyncio.create_task(self._feed(process, journal))
        self._news.set()
        error: str | None = None
        try:
            async for line in process:
                data, value = decode_line(line)
                await self._write_patiently(partial(journal.append_output, data))
                self._observe(value)
            if not process.has_exited:
                # Without its stdout nobody could see what it does.
                await process.stop()
        except (OSError, P2PClaudeError) as failure:
            error = f"the journal cannot be written: {failure}"
            process.kill()
        finally:
            feeder.cancel()
            self._over(await process.finish(), process.last_words(), error)

    async def _feed(self, process: ClaudeProcess, journal: Journal) -> None:
        """Hand claude one message whenever it is idle, so that answers pair with messages."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._queue and self._turn is None:
                seq, message = self._queue[0]
                self._turn = seq
                await self._write_patiently(partial(journal.append, TURN, {"message": seq}))
                try:
                    process.write(message)
                except ClaudeGone:
                    return  # it stays in the queue, for the process that comes next
                self._queue.popleft()
                self._log(Event.TURN, session=self.info.session_id, seq=seq)
                self._set_state(State.RUNNING)

    async def _write_patiently(self, append: Callable[[], int]) -> None:
        """Append; while the disk is full, wait for room, which in the end makes claude wait too."""
        while True:
            try:
                append()
                break
            except DiskFull as error:
                if not self._paused:
                    self._pause(str(error))
                await asyncio.sleep(RETRY_SECONDS)
        if self._paused:
            self._pause(None)

    def _pause(self, error: str | None) -> None:
        self._paused = error is not None
        self.info.error = error
        event = Event.PAUSED if error else Event.UNPAUSED
        self._log(event, session=self.info.session_id, error=error)
        self._changed()

    def _observe(self, value: dict[str, Any]) -> None:
        kind = value.get("type")
        if kind == "system" and value.get("subtype") == "init":
            self._follow(value.get("session_id"))
        if kind == "result":
            error = value.get("is_error") is True
            self._log(Event.TURN_ENDED, session=self.info.session_id, seq=self._turn, is_error=error)
            self._turn = None
            self._news.set()
            if not self._queue:
                self._set_state(State.IDLE)

    def _follow(self, claude_id: object) -> None:
        # `/clear` makes Claude go on under another id, and that is the one to resume.
        if isinstance(claude_id, str) and (not self.info.begun or claude_id != self.info.claude_id):
            self.info.claude_id, self.info.begun = claude_id, True
            self.save_soon()

    def _over(self, status: int | None, last_words: str, error: str | None) -> None:
        self.info.exit_status = status
        self._paused = False
        state = self._final
        if state is None:
            # Whoever waits for an answer must hear that none comes, even if claude found nothing wrong with leaving.
            orderly = status == 0 and not error and self._turn is None and not self._queue
            state = State.DORMANT if orderly else State.FAILED
        if state is State.FAILED:
            self.info.error = error or last_words or _describe_exit(status)
        said = first_line(self.info.error)
        self._log(Event.ENDED, session=self.info.session_id, state=state, exit_status=status, error=said)
        self._set_state(state)

    def _set_state(self, state: State) -> None:
        if self.info.state != state:
            self.info.state = state
            self.save_soon()
            self._changed()

    def _changed(self) -> None:
        if self.journal is not None:
            self.journal.wake()
        self._on_change()


def _learn(seq: int, line: bytes, messages: dict[int, dict[str, Any]], handed: set[int]) -> None:
    try:
        value = load_json(line)
    except WireError:
        return
    if not isinstance(value, dict):
        return
    if value.get("type") == MESSAGE:
        messages[seq] = value
    elif value.get("type") == TURN and isinstance(value.get("message"), int):
        handed.add(value["message"])


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        return f"it was ended by signal {-status}"
    return f"it exited with status {status}"
