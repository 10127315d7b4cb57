"""One session: its state, its journal, and the claude that fills it.

    message -> journal (MESSAGE) -> inbox -> journal (TURN) -> claude's stdin        one message for each idle claude
    claude's stdout -> journal (OUTPUT) -> whoever reads

`sessions` holds the table of these; `inbox` says which message is where. A session outlives its process, and the
daemon: `sessionfile` says what is needed to show it and to start it again, `journal.jsonl` what was said.
"""

import asyncio
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from p2pclaude.errors import NoSession, P2PClaudeError, Refused, TryAgain, Unavailable
from p2pclaude.host.log import Event, Log, first_line
from p2pclaude.host.processes import Mark
from p2pclaude.protocol.permissions import interrupt_request
from p2pclaude.protocol.wire import (
    MESSAGE,
    NOTE,
    OUTPUT,
    REPLAY,
    SESSION_ENDED,
    SESSION_NOT_FOUND,
    TURN,
    TURN_CUT,
    Results,
)
from p2pclaude.sessions.claude import (
    ClaudeGone,
    ClaudeProcess,
    Launch,
    decode_line,
    describe_exit,
    knows_message,
    user_message,
)
from p2pclaude.sessions.directory import LIVE, SAVE_AGAIN_SECONDS, Info, State, delete_directory, save_last_words
from p2pclaude.sessions.inbox import MAX_ATTEMPTS, Inbox, Message
from p2pclaude.sessions.journal import DiskFull, Journal, recover
from p2pclaude.sessions.open_requests import Asking

__all__ = ["LIVE", "MAX_QUEUED", "Info", "Session", "State"]

MAX_QUEUED = 256
"""Messages of one session that may wait for their turn."""
SETTLE_SECONDS = 0.3
"""A child that dies within this time makes the spawn fail; one that prints a line earlier is believed earlier."""
RETRY_SECONDS = 1.0
"""Pause between attempts to write to a full disk."""


class Session:
    """One session.

    `on_change` is called after each change that a list of sessions would show, `on_orphans` when claude has ended while
    messages wait that another one could run. After `ask_timeout` seconds a permission request that nobody has answered
    is denied.
    """

    def __init__(
        self,
        path: Path,
        info: Info,
        log: Log,
        on_change: Callable[[], None],
        on_orphans: Callable[["Session"], None] = lambda _: None,
        ask_timeout: float | None = None,
    ) -> None:
        self.path = path
        self.info = info
        self.is_damaged = False  # session.json cannot be read: it can be shown, but neither resumed nor written
        self.journal: Journal | None = None
        self.inbox = Inbox()
        self.asking = Asking(info.session_id, self._keep, log, self._changed, asks=info.ask, timeout=ask_timeout)
        self.lifecycle = asyncio.Lock()  # held while the process is started or ended
        self._log = log
        self._on_change = on_change
        self._on_orphans = on_orphans
        self._process: ClaudeProcess | None = None
        self._pump: asyncio.Task[None] | None = None
        self.idle_since = 0.0
        """The loop's time at which claude was last done with all that there was."""
        self._turns = 0  # that this process has finished, one way or the other
        self._orderly = False  # it ended with nothing left to do; put to sleep after an error it has status 1 as well
        self._ending = False  # it is being ended: nothing more is handed to it
        self._news = asyncio.Event()
        self._final: State | None = None  # what to become when the process ends because it was told to
        self._paused = self._unsaved = False  # there is no room for output; session.json is out of date
        self._removed = False
        self._opening = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        """Give the state as others see it."""
        stored = State(self.info.state)
        if stored in LIVE and self._paused:  # without a process there is nobody who waits for room
            return State.PAUSED
        return State.WAITING if stored in LIVE and any(self.asking.pending) else stored

    @property
    def is_live(self) -> bool:
        """Tell whether there is a process, or is about to be one."""
        return self.state in LIVE

    @property
    def is_orphaned(self) -> bool:
        """Tell whether there is no process, but is about to be one."""
        return self.info.state == State.STARTING and (self._pump is None or self._pump.done())

    @property
    def is_at_rest(self) -> bool:
        """Tell whether claude has done all that there was to do."""
        return self.state == State.IDLE and not self.inbox and not self.inbox.handed

    @property
    def is_idle(self) -> bool:
        """Tell whether nobody needs the journal open: no process writes it and no reader waits."""
        return not self.is_live and (self.journal is None or not self.journal.is_awaited)

    @property
    def pid(self) -> int | None:
        """Give claude's process id while there is one."""
        return self._process.pid if self._process is not None and self.is_live and not self.is_orphaned else None

    @property
    def last_seq(self) -> int:
        """Give the seq of the newest envelope."""
        return self.info.last_seq if self.journal is None else self.journal.last_seq

    def seq_of(self, message_id: str) -> int | None:
        """Give the seq under which a message was accepted before; the journal must be open."""
        return self.inbox.seq_of(message_id)

    async def open_journal(self, *, anew: bool = False) -> Journal:
        """Open the journal unless it is open, `anew` also if its disk has failed; learn which messages are not done.

        Raises NoSession once the session is deleted, and OSError.
        """
        async with self._opening:
            if self._removed:
                raise NoSession(SESSION_NOT_FOUND)
            if self.journal is None or (anew and self.journal.is_broken):
                file, inbox, asked = await asyncio.to_thread(recover, self.path / "journal.jsonl")
                if self.journal is not None:
                    self.journal.close()
                self.journal, self.inbox = Journal(file, self._pause), inbox
                if file.cut:
                    self._tell_cut(self.journal, file.cut)
                await self.asking.restore(asked)
        return self.journal

    def _tell_cut(self, journal: Journal, size: int) -> None:
        self._log(Event.JOURNAL_CUT, session=self.info.session_id, bytes=size)
        text = "the end of the journal was torn, and cut off: nobody had seen it"
        try:
            journal.append(NOTE, {"event": "cut", "bytes": size, "text": text})
        except (OSError, DiskFull) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self._log(Event.WARNING, message=f"journal: {reason}", session=self.info.session_id)

    def close_journal(self) -> None:
        """Close the journal, if it is open and there is no process; readers open it again."""
        if self.journal is not None and not self.is_live:
            self._note_numbers()
            self.journal.close()
            self.journal = None

    async def start(
        self, launch: Launch, text: str | None = None, message_id: str | None = None, *, lock: int | None = None
    ) -> int | None:
        """Start claude, and with `text` give it the first message, whose seq is returned once it is on disk.

        `lock` is the descriptor of the session's lock, for claude to hold. Raises Unavailable, with claude's own last
        words, if it cannot be run or dies at once.
        """
        before, self.info.state = self.info.state, State.STARTING
        try:
            journal = await self.open_journal(anew=True)
            if before not in LIVE:  # the next daemon shall look for what is accepted from here on
                await self.save()
            await self.settle_turns("claude ended in its turn")
            keep = () if lock is None else (lock,)
            process = await ClaudeProcess.start(launch, mark=Mark.of_session(self.path), keep=keep)
        except BaseException as error:
            stuck = before not in LIVE and bool(self.inbox)  # what was accepted while it looked alive
            self.info.error = str(error) if stuck else self.info.error
            self._set_state(State.FAILED if stuck else State(before))
            raise
        self._process, self._turns, self._final, self._ending = process, 0, None, False
        self.info.exit_status = self.info.error = self.info.ended_at = None
        self._pump = asyncio.create_task(self._run(process, journal))
        self._changed()
        try:
            seq = None if text is None else await self.accept(text, message_id)
            runs = await process.settle(SETTLE_SECONDS)
        except BaseException:
            await self._give_up(process, self._pump)
            raise
        if not runs:
            await self._pump
        if not self.is_live:
            reason = self.info.error or describe_exit(self.info.exit_status)
            raise Unavailable(f"claude ended at once: {reason}")
        if self.info.state == State.STARTING and not self.is_orphaned:
            self._set_state(State.RUNNING if self.inbox or self.inbox.handed else State.IDLE)
        return seq

    async def accept(self, text: str, message_id: str | None = None, priority: str | None = None) -> int:
        """Take a message for a live session and give its seq once it is on disk.

        The same `message_id` again gives the same seq. With priority "now" it does not wait for the end of a turn.
        Raises DiskFull, TryAgain (too many wait) or Refused (it is being stopped): then it was not accepted.
        """
        message_id = str(uuid.uuid4()) if message_id is None else message_id
        if self.journal is None:
            raise RuntimeError("the journal is not open")
        if (seq := self.inbox.seq_of(message_id)) is None:
            if self._final is State.ENDED:
                raise Refused(SESSION_ENDED)
            if len(self.inbox) >= MAX_QUEUED:
                raise TryAgain(f"{MAX_QUEUED} messages wait already in this session")
            data = user_message(text, message_id, priority)
            seq = self.journal.append(MESSAGE, {"messageId": message_id, "data": data})
            self.inbox.accept(message_id, Message(seq, data))
            self._news.set()
            self._log(Event.MESSAGE, session=self.info.session_id, seq=seq)
            if self.info.state == State.IDLE:  # until it is handed over the disk may take its time, and it is not done
                self._set_state(State.RUNNING)
        await self.journal.synced(seq)
        return seq

    def interrupt(self) -> None:
        """End claude's turn, if there is one: its `result` follows, and what it asked is cancelled."""
        if self._process is not None and self.is_live:
            try:
                self._process.write(interrupt_request(str(uuid.uuid4())))
            except ClaudeGone:
                return  # and its turn with it
            self._log(Event.INTERRUPTED, session=self.info.session_id)

    async def stop(self, final: State) -> None:
        """End the process, if there is one, and become `final`; what claude still says is journaled."""
        self._final = final
        await self._end_process()
        if self.info.state != final:
            self._become(final)
        await self.save()

    async def sleep(self) -> bool:
        """End a claude that has nothing to do, also in the background; tell whether it is such a one.

        The session is dormant then. A message that comes meanwhile has another claude started.
        """
        if self._process is None or await self._process.has_background() or not self.is_at_rest:
            return False
        await self._end_process()
        await self.save()
        return self.pid is None

    async def _end_process(self) -> None:
        if self._process is None or self._pump is None or self._pump.done():
            return
        self._ending = True
        if await self._process.stop(in_turn=bool(self.inbox.handed)) is None:
            self._log(Event.WARNING, message="claude did not end even when killed", session=self.info.session_id)
        # The pump ends with claude's stdout; what keeps it longer is a full disk.
        await asyncio.wait([self._pump], timeout=1.0)
        if not self._pump.done():
            self._pump.cancel()
            await asyncio.wait([self._pump], timeout=1.0)

    def kill(self) -> None:
        """End the process without any ceremony."""
        if self._process is not None:
            self._process.kill()

    def fail(self, error: str) -> None:
        """Become failed: claude could not be started."""
        self.info.error = error
        self._become(State.FAILED)

    async def create(self) -> None:
        """Write `session.json` for the first time: what is accepted later can be found again. Raises OSError."""
        await asyncio.to_thread(self.info.save, self.path)

    async def save(self) -> None:
        """Write `session.json`; a failure is logged, and it is tried again after a while."""
        if self.is_damaged:
            return
        async with self._saving:
            self._note_numbers()
            self._unsaved = False
            try:
                await asyncio.to_thread(self.info.save, self.path)
            except OSError as error:
                self._log(Event.WARNING, message=f"session.json: {error.strerror}", session=self.info.session_id)
                self._unsaved = not isinstance(error, FileNotFoundError)
                asyncio.get_running_loop().call_later(SAVE_AGAIN_SECONDS, partial(self.save_soon, again=True))

    def save_soon(self, *, again: bool = False) -> None:
        """Write `session.json` in the background; with `again` only if that was in vain the last time."""
        if again and not self._unsaved:
            return
        task = asyncio.create_task(self.save())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def remove(self, *, ignore_errors: bool = False) -> None:
        """Delete the session with all it has said. Raises OSError, maybe with some of it deleted."""
        await self.settle_writes()
        self._unsaved = False
        async with self._opening:  # whoever reads it is woken, and would make its journal anew
            if self.journal is not None:
                self.journal.close()
                self.journal = None
            await asyncio.to_thread(delete_directory, self.path, ignore_errors=ignore_errors)
            self._removed = True

    async def settle_turns(self, reason: str) -> None:
        """Say of each message that claude was handed and never answered what becomes of it; no claude may run.

        It is handed again, before all others, unless claude has begun with it: then its turn was cut off. What was
        found waiting is cut off too if claude has had it.
        """
        if self.journal is None:
            return
        for message in reversed(self.inbox.handed.copy()):
            known = message.begun or await self._is_known(message)
            again = not known and message.attempts < MAX_ATTEMPTS
            await self._cut_off(self.journal, message, again=again, reason=reason)
            self._turns += not again
        for message in self.inbox.restored:
            if await self._is_known(message):
                await self._cut_off(self.journal, message, again=False, reason="claude had it from another journal")
        self.inbox.restored.clear()
        await self.journal.synced()

    async def _is_known(self, message: Message) -> bool:
        return await asyncio.to_thread(knows_message, self.info.claude_id, message.uuid, os.environ)

    async def _cut_off(self, journal: Journal, message: Message, *, again: bool, reason: str) -> None:
        fields = {"message": message.seq, "again": again, "reason": reason}
        await self._write_patiently(journal, partial(journal.append, TURN_CUT, fields))
        self.inbox.drop(message, again=again)
        self._log(Event.TURN_CUT, session=self.info.session_id, seq=message.seq, again=again)

    async def settle_writes(self) -> None:
        """Wait for what `save_soon` began, and write what could not be written before."""
        self.save_soon(again=True)
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def _give_up(self, process: ClaudeProcess, pump: asyncio.Task[None]) -> None:
        process.kill()
        pump.cancel()  # maybe before its first step, and then it cleans nothing up
        await asyncio.wait([pump], timeout=1.0)
        status = await process.finish()
        if self.is_live:
            await asyncio.to_thread(save_last_words, self.path, process.last_words())
            self._over(status, process.last_words(), None)

    async def _run(self, process: ClaudeProcess, journal: Journal) -> None:
        """Journal claude's output until it ends, while the inbox is fed to it."""
        feeder = asyncio.create_task(self._feed(process, journal))
        self._news.set()
        error: str | None = None
        try:
            async for line in process:
                data, value = decode_line(line)
                await self._write_patiently(journal, partial(self._take, journal, data, value))
                await self.asking.receive(value, len(data), process.write)
            if not process.has_exited:  # without its stdout nobody could see what it does
                await process.stop()
        except (OSError, P2PClaudeError) as failure:
            error = f"the journal cannot be written: {failure}"
            process.kill()
        finally:
            feeder.cancel()
            await self._wind_up(process, error)

    async def _wind_up(self, process: ClaudeProcess, error: str | None) -> None:
        """Settle what claude leaves behind; cancelled, because the disk takes too long, it is over all the same."""
        status, self._orderly = None, self._ending
        try:
            status = await process.finish()
            self._orderly = self._ending or (status == 0 and not self.inbox.handed)
            await self.asking.abandon()
            await asyncio.to_thread(save_last_words, self.path, process.last_words())
            # Whoever is told that the session is over has been shown all that it said.
            await self.settle_turns(first_line(process.last_words()) or describe_exit(status))
        except OSError as failure:
            error = f"the journal cannot be written: {failure}"
        finally:
            self._over(status, process.last_words(), error)

    async def _feed(self, process: ClaudeProcess, journal: Journal) -> None:
        """Hand claude one message whenever it is idle, so that answers pair with messages, and urgent ones at once."""
        while True:
            await self._news.wait()
            self._news.clear()
            while not self._ending and (message := self.inbox.next()) is not None:
                self.inbox.hand(message)
                append = partial(lambda one: journal.append(TURN, self.inbox.turn_of(one)), message)
                try:
                    # The mark is on disk before claude can begin: what may have run is known after any crash.
                    await self._write_patiently(journal, append)
                    await journal.synced()
                    process.write(message.data)
                except ClaudeGone:
                    return  # it is handed to the process that comes next
                except OSError:
                    process.kill()  # the journal is of no more use, as the pump says
                    return
                self._log(Event.TURN, session=self.info.session_id, seq=message.seq)
                self._set_state(State.RUNNING)

    async def _write_patiently(self, journal: Journal, append: Callable[[], int]) -> None:
        """Append; while the disk is full, wait for room, which in the end makes claude wait too."""
        await journal.room()
        while True:
            try:
                append()
                break
            except DiskFull as error:
                if not self._paused:
                    self._pause(str(error))
                await asyncio.sleep(RETRY_SECONDS)
        if self._paused:
            await journal.synced()
            self._pause(None)

    async def _keep(self, kind: str, fields: Mapping[str, object], *, patient: bool = True) -> None:
        """Append an envelope of `asking`, and wait until it is on disk."""
        if (journal := self.journal) is None:
            raise ClaudeGone("the session has ended")
        append = partial(journal.append, kind, fields)
        if patient:
            await self._write_patiently(journal, append)
        else:
            append()
        await journal.synced()

    def _pause(self, error: str | None) -> None:
        if self._paused is (error is not None):
            return
        self._paused = error is not None
        self.info.error = error
        self._log(Event.PAUSED if error else Event.UNPAUSED, session=self.info.session_id, error=error)
        self._changed()

    def _take(self, journal: Journal, data: bytes, value: dict[str, Any]) -> int:
        # In one step: the mark of a turn may come next, and says what has no result by then.
        taken = journal.append_output(data, REPLAY if Results.is_replay(value) else OUTPUT)
        if (kind := value.get("type")) == "system" and value.get("subtype") == "init":
            self._follow(value.get("session_id"))
            if self.info.state == State.IDLE:  # a turn that Claude begins by itself
                self._set_state(State.RUNNING)
        answered = self.inbox.observe(value)
        if kind == "result":
            seq = None if answered is None else answered.seq
            self._log(Event.TURN_ENDED, session=self.info.session_id, seq=seq, is_error=value.get("is_error") is True)
            self._turns += answered is not None
            self._news.set()
            if not self.inbox.handed and not self.inbox:
                self._set_state(State.IDLE)
        return taken

    def _follow(self, claude_id: object) -> None:
        # `/clear` makes Claude go on under another id, and that is the one to resume.
        if isinstance(claude_id, str) and (not self.info.begun or claude_id != self.info.claude_id):
            self.info.claude_id, self.info.begun = claude_id, True
            self.save_soon()

    def _over(self, status: int | None, last_words: str, error: str | None) -> None:
        self.info.exit_status, self._paused = status, False
        if self._final is not None:
            if self.info.state != self._final:  # else `stop` has not waited for a full disk, and has said so
                self._become(self._final)
        elif self.inbox and (self._turns or self._ending) and error is None:
            # Each claude that ends by itself has done away with one message at least, so this comes to an end.
            self._become(State.STARTING)
            self._on_orphans(self)
        elif self._orderly and error is None and not self.inbox:
            self._become(State.DORMANT)
        else:
            self.info.error = error or last_words or describe_exit(status)
            self._become(State.FAILED)

    def _become(self, state: State) -> None:
        """Go on without a process."""
        said = first_line(self.info.error)
        self._log(Event.ENDED, session=self.info.session_id, state=state, exit_status=self.info.exit_status, error=said)
        self._set_state(state)

    def _set_state(self, state: State) -> None:
        if self.info.state != state:
            self.info.state = state
            self.idle_since = asyncio.get_running_loop().time()
            self.save_soon()
            self._changed()

    def _changed(self) -> None:
        if self.journal is not None:
            self.journal.wake()
        self._on_change()

    def _note_numbers(self) -> None:
        self.info.last_seq = self.last_seq
        if self.journal is not None:
            self.info.queued = len(self.inbox) + len(self.inbox.handed)
