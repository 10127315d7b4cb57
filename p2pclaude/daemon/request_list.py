"""Every session's permission requests in one place: listed, waited for, answered.

`methods` stands above and turns requests into these calls, `sessions` below has the sessions. Nothing is kept here: the
list is what the sessions hold at the moment, and its version is made of its contents, so that a client may go on asking
with the version it has, over lost connections and another daemon's start.
"""

import asyncio
from dataclasses import dataclass

from p2pclaude.errors import DataError, NoSession
from p2pclaude.protocol.permissions import MAX_LIST_BYTES, Answer, Request, version_of
from p2pclaude.protocol.wire import REQUEST_NOT_FOUND, dump_json
from p2pclaude.sessions.life import OVER, State
from p2pclaude.sessions.session import Session
from p2pclaude.sessions.table import MAX_WAIT_MS, SessionTable


@dataclass(frozen=True, slots=True)
class Listing:
    """Pending requests as JSON texts, oldest first; `omitted` did not fit, `version` names the whole set.

    `state` is that of the one session that was asked for.
    """

    requests: list[bytes]
    version: str
    omitted: int = 0
    state: State | None = None


class RequestList:
    """The permission requests of a session table."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table

    async def list(self, session_id: str | None, version: str | None, wait_ms: int) -> Listing:
        """Give what is pending, in one session or in all.

        With `version`, wait up to `wait_ms` until the set is another one, or the one session has ended. Raises
        NoSession.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_ms, MAX_WAIT_MS) / 1000
        while True:
            sessions = self._table.sessions if session_id is None else [self._table.find(session_id)]
            pending = [(session, request) for session in sessions for request in session.open_requests.pending]
            state = None if session_id is None else self._table.find(session_id).state
            current = version_of((session.info.session_id, request.request_id) for session, request in pending)
            left = deadline - loop.time()
            if current != version or left <= 0 or state in OVER:
                break
            await self._table.wait_change(left)
        texts = _fitting(pending)
        return Listing(texts, current, len(pending) - len(texts), state)

    async def answer(self, session_id: str | None, request_id: str, answer: Answer) -> None:
        """Answer a request; without a session it is looked for in all of them.

        Raises NoSession, DataError if several sessions know it, and what `OpenRequests.answer` raises.
        """
        if session_id is not None:
            session = self._table.find(session_id)
            if not session.open_requests.knows(request_id):
                await self._table.open_journal(session)  # it remembers what was answered before
        else:
            knowing = [session for session in self._table.sessions if session.open_requests.knows(request_id)]
            if not knowing:
                raise NoSession(REQUEST_NOT_FOUND)
            if len(knowing) > 1:
                raise DataError("several sessions have such a request, sessionId must be given")
            [session] = knowing
        await session.open_requests.answer(request_id, answer)

    def interrupt(self, session_id: str) -> None:
        """End the turn of a session, if there is one. Raises NoSession."""
        self._table.find(session_id).interrupt()


def _fitting(pending: list[tuple[Session, Request]]) -> list[bytes]:
    """Give the oldest requests as JSON, as many as may be given at once; one always is."""
    texts: list[bytes] = []
    size = 0
    for session, request in sorted(pending, key=lambda entry: entry[1].number):
        texts.append(dump_json(request.describe(session.info.session_id, session.info.directory)))
        size += len(texts[-1])
        if size > MAX_LIST_BYTES and len(texts) > 1:
            return texts[:-1]
    return texts
