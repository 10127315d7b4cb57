"""One session: its state, its journal, and the claude that fills it.

    message -> journal (MESSAGE) -> inbox -> journal (TURN) -> claude's stdin        one message for each idle claude
    claude's stdout -> journal (OUTPUT) -> whoever reads

`table` holds these; `inbox` says which message is where. A session outlives its process, and the
daemon: `directory` says what is needed to show it and to start it again, `journal.jsonl` what was said.
"""

import asyncio
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from p2pclaude.sessions.directory import Info, InfoFile, delete_directory, save_last_words
from p2pclaude.sessions.inbox import MAX_ATTEMPTS, Inbox, Message
from p2pclaude.sessions.journal import DiskFull, Journal, recover
from p2pclaude.sessions.life import Happening, ImpossibleHappening, Order, SessionLife, State
from p2pclaude.sessions.open_requests import OpenRequests

MAX_QUEUED = 256
"""Messages of one session that may wait for their turn."""
SETTLE_SECONDS = 0.3
"""A child that dies within this time makes the spawn fail; one that prints a line earlier is believed earlier."""
RETRY_SECONDS = 1.0
"""Pause between attempts to write to a full disk."""
PUMP_SECONDS = 1.0
"""How long the end of what journals a claude's output is waited for once the claude is gone, each time."""


@dataclass(slots=True)
class _Child:
    """A claude, and the task that journals what it prints."""

    process: ClaudeProcess
    pump: asyncio.Task[None]
    turns: int = 0
    """Turns that it has finished, one way or the other."""


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
        self.life = SessionLife()
        self.file = InfoFile(path, info, log, self._note_numbers)
        self.journal: Journal | None = None
        self.inbox = Inbox()
        self.open_requests = OpenRequests(
            info.session_id, self._keep, log, self._changed, asks=info.ask, timeout=ask_timeout
        )
        self.lifecycle = asyncio.Lock()  # held while the process is started or ended
        self._log = log
        self._on_change = on_change
        self._on_orphans = on_orphans
        self._child: _Child | None = None
        self.idle_since = 0.0
        """The loop's time at which its state last changed: for one that is idle, since when it is."""
        self._news = asyncio.Event()  # there may be something to hand to claude
        self._opening = asyncio.Lock()

    @property
    def path(self) -> Path:
        """Give the session's directory."""
        return self.file.path

    @property
    def info(self) -> Info:
        """Give what session.json keeps."""
        return self.file.info

    @property
    def state(self) -> State:
        """Give the state as others see it."""
        return self.life.seen(asks=any(self.open_requests.pending))

    @property
    def is_live(self) -> bool:
        """Tell whether there is a process, or is about to be one."""
        return self.life.is_live

    @property
    def is_orphaned(self) -> bool:
        """Tell whether there is no process, but is about to be one."""
        return self.life.is_orphaned

    @property
    def is_at_rest(self) -> bool:
        """Tell whether claude has done all that there was to do."""
        return self.state == State.IDLE and not self.inbox and not self.inbox.handed

    @property
    def needs_no_journal(self) -> bool:
        """Tell whether nobody needs the journal open: no process writes it and no reader waits."""
        return not self.is_live and (self.journal is None or not self.journal.is_awaited)

    @property
    def pid(self) -> int | None:
        """Give claude's process id while there is one."""
        return self._child.process.pid if self._child is not None and self.life.has_process else None

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
            if self.life.is_removed:
                raise NoSession(SESSION_NOT_FOUND)
            if self.journal is None or (anew and self.journal.is_broken):
                file, inbox, asked = await asyncio.to_thread(recover, self.path / "journal.jsonl")
                if self.journal is not None:
                    self.journal.close()
                self.journal, self.inbox = Journal(file, self._pause), inbox
                if file.cut:
                    self._tell_cut(self.journal, file.cut)
                await self.open_requests.restore(asked)
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
        was_live = self.is_live
        self._see(Happening.START_TRIED, quietly=True)
        try:
            journal = await self.open_journal(anew=True)
            if not was_live:  # the next daemon shall look for what is accepted from here on
                await self.file.save()
            await self.settle_turns("claude ended in its turn")
            keep = () if lock is None else (lock,)
            process = await ClaudeProcess.start(launch, mark=Mark.of_session(self.path), keep=keep)
        except BaseException as error:
            stuck = not was_live and bool(self.inbox)  # what was accepted while it looked alive
            self.info.error = str(error) if stuck else self.info.error
            self._see(Happening.START_REFUSED_MAIL if stuck else Happening.START_REFUSED)
            raise
        self._see(Happening.LAUNCHED, quietly=True)
        self.info.exit_status = self.info.error = self.info.ended_at = None
        child = self._child = _Child(process, asyncio.create_task(self._run(process, journal)))
        self._changed()
        try:
            seq = None if text is None else await self.accept(text, message_id)
            runs = await process.settle(SETTLE_SECONDS)
        except BaseException:
            await self._take_back(child)
            raise
        if not runs:
            await child.pump
        if not self.is_live:
            reason = self.info.error or describe_exit(self.info.exit_status)
            raise Unavailable(f"claude ended at once: {reason}")
        if self.life.is_unheard:
            self._see(Happening.SETTLED_BUSY if self.inbox or self.inbox.handed else Happening.SETTLED)
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
            if self.life.refuses_messages:
                raise Refused(SESSION_ENDED)
            if len(self.inbox) >= MAX_QUEUED:
                raise TryAgain(f"{MAX_QUEUED} messages wait already in this session")
            data = user_message(text, message_id, priority)
            seq = self.journal.append(MESSAGE, {"messageId": message_id, "data": data})
            self.inbox.accept(message_id, Message(seq, data))
            self._news.set()
            self._log(Event.MESSAGE, session=self.info.session_id, seq=seq)
            self._see(Happening.ACCEPTED)  # until it is handed over the disk may take its time, and it is not done
        await self.journal.synced(seq)
        return seq

    def interrupt(self) -> None:
        """End claude's turn, if there is one: its `result` follows, and what it asked is cancelled."""
        if self._child is not None and self.is_live:
            try:
                self._child.process.write(interrupt_request(str(uuid.uuid4())))
            except ClaudeGone:
                return  # and its turn with it
            self._log(Event.INTERRUPTED, session=self.info.session_id)

    async def stop(self) -> None:
        """End the process, if there is one, for good; what claude still says is journaled."""
        await self._end(Order.STOP)

    async def put_away(self) -> None:
        """End the process, if there is one, since the daemon ends; the session is dormant then, or ended as before."""
        await self._end(Order.LEAVE)

    async def _end(self, order: Order) -> None:
        self.life.tell(order)
        await self._end_process(order)
        if (what := self.life.outstanding) is not None:
            self._see_end(what)
        await self.file.save()

    async def sleep(self) -> bool:
        """End a claude that has nothing to do, also in the background; tell whether it is such a one.

        The session is dormant then. A message that comes meanwhile has another claude started.
        """
        if self._child is None or await self._child.process.has_background() or not self.is_at_rest:
            return False
        self.life.tell(Order.SLEEP)
        await self._end_process(Order.SLEEP)
        await self.file.save()
        return self.pid is None

    async def _end_process(self, order: Order) -> None:
        child = self._child
        if child is None or child.pump.done():
            return
        if await child.process.stop(in_turn=bool(self.inbox.handed)) is None:
            self._log(Event.WARNING, message="claude did not end even when killed", session=self.info.session_id)
        # The pump ends with claude's stdout; what keeps it longer is a full disk.
        await asyncio.wait([child.pump], timeout=PUMP_SECONDS)
        # After a stop no other claude comes: what was cut off is still told, as soon as there is room.
        await self._end_pump(child, cancels=1 if order is Order.STOP else 2)

    async def _end_pump(self, child: _Child, *, cancels: int = 2) -> None:
        """Have the pump of a claude that is gone wind up, and cancelled again not even that.

        A full disk may hold up the winding up as well, and then it would speak of the claude that comes next.
        """
        for _ in range(cancels):
            if not child.pump.done():
                child.pump.cancel()
                await asyncio.wait([child.pump], timeout=PUMP_SECONDS)

    def kill(self) -> None:
        """End the process without any ceremony."""
        if self._child is not None:
            self._child.process.kill()

    def give_up(self, error: str) -> None:
        """Become failed: claude could not be started."""
        if not self.life.is_removed:
            self.info.error = error
            self._see_end(Happening.GIVEN_UP)

    def load(self, life: SessionLife) -> None:
        """Go on with the life that an earlier daemon left."""
        self.life = life
        self.info.state = life.stored

    def await_claude(self) -> None:
        """Wait for a claude, since messages of an earlier daemon's are not done. Nobody need be told yet."""
        self._see(Happening.MAIL_FOUND, quietly=True)

    async def remove(self, *, ignore_errors: bool = False) -> None:
        """Delete the session with all it has said. Raises OSError, maybe with some of it deleted."""
        await self.file.abandon()
        async with self._opening:  # whoever reads it is woken, and would make its journal anew
            if self.journal is not None:
                self.journal.close()
                self.journal = None
            await asyncio.to_thread(delete_directory, self.path, ignore_errors=ignore_errors)
            self._see(Happening.DELETED, quietly=True)

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
            self._count_turn(not again)
        for message in self.inbox.restored.copy():
            if await self._is_known(message):
                await self._cut_off(self.journal, message, again=False, reason="claude had it from another journal")
        self.inbox.restored.clear()
        await self.journal.synced()

    async def _is_known(self, message: Message) -> bool:
        return await asyncio.to_thread(knows_message, self.info.claude_id, message.uuid, os.environ)

    async def _cut_off(self, journal: Journal, message: Message, *, again: bool, reason: str) -> None:
        fields = {"message": message.seq, "again": again, "reason": reason}

        def cut() -> int:  # in one step: whoever is cancelled while the disk is full has done both, or neither
            seq = journal.append(TURN_CUT, fields)
            self.inbox.drop(message, again=again)
            return seq

        await self._write_patiently(journal, cut)
        self._log(Event.TURN_CUT, session=self.info.session_id, seq=message.seq, again=again)

    def _count_turn(self, is_over: bool) -> None:
        if self._child is not None:
            self._child.turns += is_over

    async def _take_back(self, child: _Child) -> None:
        """End a claude whose start was interrupted."""
        process, status = child.process, None
        process.kill()
        try:
            await self._end_pump(child)
            status = await process.finish()
            if self.life.has_process:  # the pump was cancelled before its first step, and has cleaned nothing up
                await asyncio.to_thread(save_last_words, self.path, process.last_words())
        finally:
            if self.life.has_process:  # who is cancelled here once more leaves no session that seems to run
                self._over(status, process.last_words(), None, in_order=False)

    async def _run(self, process: ClaudeProcess, journal: Journal) -> None:
        """Journal claude's output until it ends, while the inbox is fed to it."""
        feeder = asyncio.create_task(self._feed(process, journal))
        self._news.set()
        error: str | None = None
        try:
            async for line in process:
                data, value = decode_line(line)
                await self._write_patiently(journal, partial(self._take, journal, data, value))
                await self.open_requests.receive(value, len(data), process.write)
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
        # A claude that has answered with an error ends with status 1, also where it was put to sleep.
        status, in_order = None, self.life.is_being_ended
        try:
            status = await process.finish()
            in_order = self.life.is_being_ended or (status == 0 and not self.inbox.handed)
            await self.open_requests.abandon()
            await asyncio.to_thread(save_last_words, self.path, process.last_words())
            # Whoever is told that the session is over has been shown all that it said.
            await self.settle_turns(first_line(process.last_words()) or describe_exit(status))
        except OSError as failure:
            error = f"the journal cannot be written: {failure}"
        finally:
            self._over(status, process.last_words(), error, in_order=in_order)

    async def _feed(self, process: ClaudeProcess, journal: Journal) -> None:
        """Hand claude one message whenever it is idle, so that answers pair with messages, and urgent ones at once."""
        while True:
            await self._news.wait()
            self._news.clear()
            while not self.life.is_being_ended and (message := self.inbox.next()) is not None:
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
                self._see(Happening.HANDED)

    async def _write_patiently(self, journal: Journal, append: Callable[[], int]) -> None:
        """Append; while the disk is full, wait for room, which in the end makes claude wait too."""
        await journal.room()
        while True:
            try:
                append()
                break
            except DiskFull as error:
                if not self.life.is_paused:
                    self._pause(str(error))
                await asyncio.sleep(RETRY_SECONDS)
        if self.life.is_paused:
            await journal.synced()
            self._pause(None)

    async def _keep(self, kind: str, fields: Mapping[str, object], *, patient: bool = True) -> None:
        """Append an envelope of `open_requests`, and wait until it is on disk."""
        if (journal := self.journal) is None:
            raise ClaudeGone("the session has ended")
        append = partial(journal.append, kind, fields)
        if patient:
            await self._write_patiently(journal, append)
        else:
            append()
        await journal.synced()

    def _pause(self, error: str | None) -> None:
        if self.life.is_paused is (error is not None):
            return
        self.life.is_paused = error is not None
        self.info.error = error
        self._log(Event.PAUSED if error else Event.UNPAUSED, session=self.info.session_id, error=error)
        self._changed()

    def _take(self, journal: Journal, data: bytes, value: dict[str, Any]) -> int:
        # In one step: the mark of a turn may come next, and says what has no result by then.
        taken = journal.append_output(data, REPLAY if Results.is_replay(value) else OUTPUT)
        if (kind := value.get("type")) == "system" and value.get("subtype") == "init":
            self._follow(value.get("session_id"))
            self._see(Happening.OWN_TURN)
        answered = self.inbox.observe(value)
        if kind == "result":
            seq = None if answered is None else answered.seq
            self._log(Event.TURN_ENDED, session=self.info.session_id, seq=seq, is_error=value.get("is_error") is True)
            self._count_turn(answered is not None)
            self._news.set()
            if not self.inbox.handed and not self.inbox:
                self._see(Happening.DONE)
        return taken

    def _follow(self, claude_id: object) -> None:
        # `/clear` makes Claude go on under another id, and that is the one to resume.
        if isinstance(claude_id, str) and (not self.info.begun or claude_id != self.info.claude_id):
            self.info.claude_id, self.info.begun = claude_id, True
            self.file.save_soon()

    def _over(self, status: int | None, last_words: str, error: str | None, *, in_order: bool) -> None:
        self.info.exit_status, self.life.is_paused = status, False
        turns = 0 if self._child is None else self._child.turns
        what = self.life.meaning_of_exit(
            mail=bool(self.inbox), progress=turns > 0, in_order=in_order, broken=error is not None
        )
        if what is Happening.DIED:
            self.info.error = error or last_words or describe_exit(status)
        if self.life.has_process:  # else `_end` has not waited for a full disk, and has said so
            self._see_end(what)
        if what is Happening.DIED_WITH_MAIL:
            self._on_orphans(self)

    def _see_end(self, what: Happening) -> None:
        """See what leaves the session without a process, and say so in the log."""
        self._see(what, ended=True)

    def _see(self, what: Happening, *, quietly: bool = False, ended: bool = False) -> None:
        """Go where a happening leads; unless `quietly`, whoever is concerned is told of another state.

        What cannot happen is a defect, and no reason to lose the session: it is logged, and changes nothing.
        """
        before, stage = self.life.stored, self.life.stage
        try:
            self.life.see(what)
        except ImpossibleHappening as defect:
            self._log(Event.WARNING, message=f"defect: {defect}", session=self.info.session_id)
            return
        state = self.info.state = self.life.stored
        if ended and self.life.stage is not stage:  # who gives up what has failed has nothing new to say
            said, status = first_line(self.info.error), self.info.exit_status
            self._log(Event.ENDED, session=self.info.session_id, state=state, exit_status=status, error=said)
        if state is not before and not quietly:
            self.idle_since = asyncio.get_running_loop().time()
            self.file.save_soon()
            self._changed()

    def _changed(self) -> None:
        if self.journal is not None:
            self.journal.wake()
        self._on_change()

    def _note_numbers(self) -> None:
        self.info.last_seq = self.last_seq
        if self.journal is not None:
            self.info.queued = len(self.inbox) + len(self.inbox.handed)
