"""One session's permission requests: from claude to whoever decides, and the answer back.

    claude's stdout -> journal (PERMISSION_REQUEST) -> pending
    answer -> journal (PERMISSION_ANSWER) -> claude's stdin

`session` stands above and hands in what claude prints, `protocol.permissions` knows the formats. Whatever others can
see, and whatever claude is told, is in the journal first. The first answer wins; each request gets one
PERMISSION_ANSWER envelope, also when nobody decided ("cancelled").
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

from p2pclaude.errors import P2PClaudeError
from p2pclaude.host.log import Event, Log
from p2pclaude.protocol.permissions import CANCELLED, DENY, Answer, Book, Cancel, History, Json, Refusal, Request
from p2pclaude.protocol.wire import PERMISSION_ANSWER, PERMISSION_REQUEST

Tell = Callable[[Mapping[str, Any]], None]
"""Writes an object to claude's stdin. Raises ClaudeGone."""


class Keep(Protocol):
    """Appends an envelope to the journal and returns when it is durable; a patient one waits for room on the disk."""

    def __call__(self, kind: str, fields: Mapping[str, object], *, patient: bool = True) -> Awaitable[None]:
        """Append. Raises OSError, or P2PClaudeError if there is no journal."""


class OpenRequests:
    """What one session asks. `on_change` is called when the set of pending requests has changed.

    With `timeout`, in seconds, a request that nobody answers is denied.
    """

    def __init__(
        self, session_id: str, keep: Keep, log: Log, on_change: Callable[[], None], *, asks: bool, timeout: float | None
    ) -> None:
        self._session_id = session_id
        self._keep = keep
        self._log = log
        self._on_change = on_change
        self._timeout = timeout
        self._book = Book(asks=asks)
        self._tell: Tell | None = None
        self._answering = asyncio.Lock()  # one request has one outcome, also while the journal takes its time
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> Iterable[Request]:
        """Give the requests that wait, oldest first."""
        return self._book.pending.values()

    def knows(self, request_id: str) -> bool:
        """Tell whether there is, or was, such a request; the journal must have been opened once."""
        return self._book.knows(request_id)

    async def receive(self, value: Json, size: int, tell: Tell) -> None:
        """Take an object that claude printed in so many bytes; `tell` is for the answer. Raises OSError."""
        outcome = self._book.receive(value, size, time.time_ns() // 1_000_000)
        if isinstance(outcome, Request):
            await self._ask(outcome, tell)
        elif isinstance(outcome, Cancel):
            async with self._answering:
                if outcome.request_id in self._book.pending:
                    await self._settle(outcome.request_id, Answer(CANCELLED))
        elif isinstance(outcome, Refusal):
            self._log(Event.CONTROL_REFUSED, session=self._session_id, reason=outcome.reason)
            if outcome.reply is not None:
                _try(tell, outcome.reply)

    async def answer(self, request_id: str, answer: Answer) -> None:
        """Give claude an answer; once more with the same `answer_id` is harmless.

        Raises NoSession if there is no such request, Refused if it was answered, DataError if the answer does not fit
        the request, ClaudeGone if claude has ended.
        """
        async with self._answering:
            request = self._book.pending.get(request_id)
            if request is None or self._tell is None:
                self._book.check_answered(request_id, answer.answer_id)
                return
            tell, answer = self._tell, answer.complete(request)
            await self._settle(request_id, answer)
            tell(answer.reply(request))

    async def abandon(self) -> None:
        """Cancel what is pending, because claude has ended."""
        try:
            async with self._answering:
                await self._cancel(list(self._book.pending))
        finally:
            self._book.pending.clear()
            self._tell = None
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    async def restore(self, history: History) -> None:
        """Take up what the journal says of earlier times; requests that nobody answered are cancelled now."""
        for request_id, (behavior, answer_id) in history.answered.items():
            self._book.settle(request_id, behavior, answer_id)
        await self._cancel(history.unanswered)

    async def _ask(self, request: Request, tell: Tell) -> None:
        fields = {"requestId": request.request_id, "data": request.data}
        await self._keep(PERMISSION_REQUEST, fields)
        self._tell = tell
        self._book.add(request)
        if self._timeout is not None:
            loop = asyncio.get_running_loop()
            self._timers[request.request_id] = loop.call_later(self._timeout, self._expire, request.request_id)
        self._log(
            Event.PERMISSION_ASKED,
            session=self._session_id,
            request=request.request_id,
            tool=request.tool_name,
        )
        self._on_change()

    async def _settle(self, request_id: str, answer: Answer, *, patient: bool = True) -> None:
        fields = {"requestId": request_id, **answer.fields()}
        await self._keep(PERMISSION_ANSWER, fields, patient=patient)
        self._book.settle(request_id, answer.behavior, answer.answer_id)
        if (timer := self._timers.pop(request_id, None)) is not None:
            timer.cancel()
        self._log(
            Event.PERMISSION_ANSWERED,
            session=self._session_id,
            request=request_id,
            behavior=answer.behavior,
            by=answer.by,
        )
        self._on_change()

    async def _cancel(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            try:
                await self._settle(request_id, Answer(CANCELLED), patient=False)
            except (P2PClaudeError, OSError) as error:
                # It is said when the journal is opened the next time.
                self._log(Event.WARNING, message=f"a cancelled request: {error}", session=self._session_id)
                return

    def _expire(self, request_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._deny_late(request_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deny_late(self, request_id: str) -> None:
        message = f"nobody answered within {self._timeout:g} s"
        try:
            await self.answer(request_id, Answer(DENY, message=message, by="timeout"))
        except (P2PClaudeError, OSError):
            pass  # it was answered in the same moment, or there is nobody left to tell


def _try(tell: Tell, value: Json) -> None:
    try:
        tell(value)
    except P2PClaudeError:
        pass  # claude has ended, and so nobody waits for it
