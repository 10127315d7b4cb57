"""Sessions as seen from afar: spawn, send, read, follow, list, stop.

Stands between the command-line tools and `rpc_client`: it turns the methods of the wire contract into Python calls with
typed results, and hides which daemon answers. A TypeScript daemon knows none of our additions; its answers are told
apart by their shape (no `accepted`, no `state`), and following then means asking again with `clear` every
`POLL_SECONDS`.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

from p2pclaude.client.rpc_client import CLOSE_TIMEOUT, Client, explain
from p2pclaude.errors import DataError, NoSession, P2PClaudeError, ProtocolError, Refused, TryAgain, Unavailable
from p2pclaude.hyperdht import HyperDHT, HyperDHTError, TooFewNodes
from p2pclaude.protocol.pairing import Pairing
from p2pclaude.protocol.wire import (
    OUTPUT,
    PERMISSION_REQUEST,
    REPLAY,
    SESSION_NOT_FOUND,
    TURN,
    TURN_CUT,
    Results,
    load_page,
)

if TYPE_CHECKING:
    from p2pclaude.protocol.record import SessionRecord

Envelope = Mapping[str, Any]
"""What the journal holds: `type`, `data`, `timestamp`, and `seq` unless the daemon has no journal."""

LONG_POLL_SECONDS = 20.0
"""How long the daemon holds a `get-output` that has nothing new."""

POLL_SECONDS = 0.5
"""How often a daemon without long polling is asked."""

POLLS_A_LISTING = 4
"""A daemon without states is asked after so many empty answers whether the session still exists."""

MAX_SEQ = 2**53 - 1
"""A sequence number beyond any journal's end."""

MAX_AHEAD = 16
"""Pages asked for beyond the next one, whatever the daemon says of them."""

ENDED_STATES = frozenset({"ended", "failed"})
"""States after which a session prints nothing more, unless somebody sends to it."""

DORMANT_STATE = "dormant"
"""The state of a session whose process went with its daemon; the next message brings it back."""


class Accepted(NamedTuple):
    """A message the daemon has taken; `seq` is its place in the journal, None with a daemon that has none.

    `asks`: it started a session that asks for permission.
    """

    session: str
    seq: int | None
    asks: bool = False


class Page(NamedTuple):
    """A piece of a session's output: envelopes in order.

    `state` is the session's, None if there is no such session or the daemon does not tell. `next` is the sequence
    number to read on after, None with a daemon that has no journal; `then` has those of pages after the next, as far
    as they are known already. `error` says what a failed session died of.
    """

    messages: Sequence[Envelope]
    state: str | None
    next: int | None
    error: str | None = None
    then: Sequence[int] = ()


async def spawn(
    client: Client,
    *,
    text: str,
    message_id: str,
    directory: str | None = None,
    model: str | None = None,
    permission_mode: str | None = None,
    ask: bool = False,
    persist: bool = False,
) -> Accepted:
    """Start a session with its first message; `directory` None is the daemon's default.

    With `ask` it asks for permission, if `asks` of the result says so. With `persist` a lost connection is opened
    again. Raises a P2PClaudeError that says why there is no session.
    """
    from uuid import uuid4  # here, because only this needs it and it takes its time

    # The id is made here so that a second attempt finds the session that the first one started.
    params: dict[str, object] = {"sessionId": str(uuid4()), "text": text, "messageId": message_id}
    options = {"directory": directory, "model": model, "permissionMode": permission_mode}
    params |= {name: value for name, value in options.items() if value is not None}
    if ask:
        params["ask"] = True
    result = await _submit(client, "spawn-session", params, persist=persist)
    session = result.get("sessionId")
    if result.get("type") != "success" or not isinstance(session, str):
        raise _spawn_error(result, directory)
    if not _is_argument(session):
        raise ProtocolError("the daemon names the session by what is no session's id")
    asks = result.get("ask") is True
    if "accepted" in result:
        return Accepted(session, _seq(result), asks)
    return (await send(client, session, text=text, message_id=message_id))._replace(asks=asks)


async def send(
    client: Client, session: str, *, text: str, message_id: str, now: bool = False, persist: bool = False
) -> Accepted:
    """Send a message to a session; with `persist` a lost connection is opened again.

    With `now` it does not wait for a running turn, but ends it. Raises NoSession, or another P2PClaudeError that says
    why it was not taken.
    """
    params = {"sessionId": session, "text": text, "messageId": message_id} | ({"priority": "now"} if now else {})
    result = await _submit(client, "send-message", params, persist=persist)
    if result.get("success") is True:
        return Accepted(session, _seq(result))
    error = str(result.get("error") or "no reason given")
    if error == SESSION_NOT_FOUND:
        raise no_session(session)
    raise _daemon_error("the message was not taken", error)


async def _submit(client: Client, method: str, params: Mapping[str, object], *, persist: bool) -> Mapping[str, Any]:
    """Make a call that must not take effect twice: repeated only with a daemon that knows `messageId`."""
    try:
        return _object(await client.call(method, params))
    except (Unavailable, TryAgain) as error:
        if not persist or not client.was_connected:
            raise
        try:
            knows_ids = "version" in _object(await client.persist("ping", {}))
        except (Unavailable, TryAgain):
            raise error from None  # what became of the message counts, not of the question
        if not knows_ids:
            raise
    return _object(await client.persist(method, params))


async def read_output(
    client: Client,
    session: str,
    *,
    after: int,
    limit: int | None = None,
    wait: float = 0.0,
    state: str | None = None,
) -> Page:
    """Read what the journal holds after a sequence number, waiting so many seconds for it if there is nothing.

    With `state`, another state than that ends the waiting too. A negative `after` begins with the newest -`after`
    objects that Claude printed. A lost connection is opened again: reading changes nothing.
    """
    params: dict[str, object] = {"sessionId": session, "after": after}
    if limit is not None:
        params["limit"] = limit
    if wait:
        params["waitMs"] = round(wait * 1000)
    if state is not None:
        params["state"] = state
    return _page(await client.persist("get-output", params, patience=wait, early=True, parse=load_page))


async def follow(client: Client, session: str, *, after: int = 0, states: bool = False) -> AsyncGenerator[Page, None]:
    """Yield a session's output from a sequence number on until it ends, over as many connections as it takes.

    With `states` there is a page, maybe an empty one, at once and as soon as the session's state has changed. Nothing
    comes twice and, with a daemon that has a journal, nothing is lost. A dormant session may come back, so its empty
    pages go on. Raises NoSession.
    """
    known: str | None = None
    loop = asyncio.get_running_loop()
    while True:
        asked = loop.time()
        wait = 0.0 if states and known is None else LONG_POLL_SECONDS
        page = await read_output(client, session, after=after, wait=wait, state=known)
        known = page.state if states else None
        if page.next is None:
            break
        if page.state is None:
            raise no_session(session)
        yield page
        after = page.next
        if page.state in ENDED_STATES and not page.messages:
            return
        if page.state == DORMANT_STATE and not page.messages:  # if the daemon does not wait where there is no process
            await asyncio.sleep(max(asked + POLL_SECONDS - loop.time(), 0.0))
    # Not the messages of the first answer: it did not clear them, so they come again.
    async with aclosing(_follow_by_clearing(client, session)) as pages:
        async for page in pages:
            yield page


async def _follow_by_clearing(client: Client, session: str) -> AsyncGenerator[Page, None]:
    """Follow with a daemon that only knows `clear`, as its own client does."""
    known, empty = False, 0
    while True:
        page = await _clear_output(client, session)
        yield page
        if page.messages:
            known, empty = True, 0
        elif empty % POLLS_A_LISTING == 0 and not await _is_listed(client, session):
            if not known:
                raise no_session(session)
            yield await _clear_output(client, session)  # what came between the two questions
            return
        else:
            known, empty = True, empty + 1
        await asyncio.sleep(POLL_SECONDS)


async def _clear_output(client: Client, session: str) -> Page:
    return _page(await client.persist("get-output", {"sessionId": session, "clear": True}))


async def _is_listed(client: Client, session: str) -> bool:
    return any(entry.get("sessionId") == session for entry in await list_sessions(client, persist=True))


async def read_journal(client: Client, session: str, *, after: int = 0) -> AsyncGenerator[Page, None]:
    """Yield what a session has printed so far, page by page. Raises NoSession.

    In a long journal the next pages are on their way meanwhile: the daemon makes one while another is printed here, and
    a long way is full of them.
    """
    asked: deque[tuple[int, asyncio.Task[Page]]] = deque()

    def ask(after: int) -> None:
        asked.append((after, asyncio.create_task(read_output(client, session, after=after))))

    ask(after)
    try:
        while True:
            page = await asked[0][1]
            asked.popleft()
            if page.state is None and (page.next is not None or not await _is_listed(client, session)):
                raise no_session(session)
            if page.next is None or not page.messages:
                yield page
                return
            if asked and asked[0][0] != page.next:
                _drop(asked)
            for seq in (page.next, *page.then):
                if not asked or asked[-1][0] < seq:
                    ask(seq)
            for _ in range(2):  # turns of the event loop: the requests are written, and leave
                await asyncio.sleep(0)
            yield page
    finally:
        tasks = _drop(asked)
        await asyncio.gather(*tasks, return_exceptions=True)


def _drop(asked: deque[tuple[int, asyncio.Task[Page]]]) -> list[asyncio.Task[Page]]:
    """Cancel what was asked for and is not wanted."""
    tasks = [task for _, task in asked]
    for task in tasks:
        task.cancel()
    asked.clear()
    return tasks


async def last_seq(client: Client, session: str) -> int:
    """Return the newest sequence number of a session, 0 with a daemon that has no journal. Raises NoSession."""
    page = await read_output(client, session, after=MAX_SEQ, limit=0)
    if page.state is None and page.next is not None:
        raise no_session(session)
    return page.next or 0


class AnswerFinder:
    """Finds the answer to one message in a session's output.

    The daemon marks in the journal which message is being handed to Claude; the next `result` object that answers any
    does, or the one after that if it was handed during the turn of another. What Claude says it has taken in counts
    more: that is answered next. Without a journal the first `result` is all there is to go by.
    """

    def __init__(self, seq: int | None) -> None:
        self._seq = seq
        self._results = Results()
        self._before: int | None = 0 if seq is None else None  # results that come first; None: it was not handed
        self._uuid: object = None  # by which Claude knows it
        self._rival: object = None  # by which it knows one that was handed during the turn of this one
        self._taken = False

    def feed(self, envelope: Envelope) -> Mapping[str, Any] | None:
        """Take the next envelope; return the `result` object that answers the message, once it is there.

        Raises P2PClaudeError when there will be none: the turn was cut off.
        """
        kind, data = envelope.get("type"), envelope.get("data")
        if kind in (TURN, TURN_CUT) and envelope.get("message") == self._seq:
            if kind == TURN_CUT and envelope.get("again") is not True:
                raise P2PClaudeError(
                    f"the turn was cut off: {envelope.get('reason')}", hint="p2pclaude-tail shows how far it came"
                )
            self._before = None if kind == TURN_CUT else 1 if envelope.get("steers") is not None else 0
            self._uuid, self._rival, self._taken = envelope.get("uuid"), None, False
        elif kind == TURN and envelope.get("steers") == self._seq:
            self._rival = envelope.get("uuid")
        elif kind == TURN_CUT and self._before:
            self._before -= 1
        if kind not in (OUTPUT, REPLAY) or not isinstance(data, dict):
            return None
        if kind == REPLAY and self._before is not None and self._uuid is not None:
            self._note_taken(data.get("uuid"))
        if not self._results.is_answer(data) or self._before is None:
            return None
        self._before -= 1
        return data if self._before < 0 else None

    def _note_taken(self, uuid: object) -> None:
        if uuid == self._uuid:
            self._taken, self._before = True, 0
        elif uuid == self._rival is not None and not self._taken:
            self._before, self._rival = 1, None  # it goes first; of any other, as /compact makes one, nothing follows


async def wait_for_answer(
    client: Client, accepted: Accepted, on_request: Callable[[], None] = lambda: None
) -> Mapping[str, Any]:
    """Wait for the `result` object that answers a message, over as many connections as it takes.

    `on_request` is called whenever the session asks for permission.

    Raises P2PClaudeError when the session or the turn ends without one, TryAgain when the daemon put it to sleep.
    """
    finder, reason = AnswerFinder(accepted.seq), None
    async with aclosing(follow(client, accepted.session, after=accepted.seq or 0)) as pages:
        async for page in pages:
            for envelope in page.messages:
                if envelope.get("type") == PERMISSION_REQUEST:
                    on_request()
                if (answer := finder.feed(envelope)) is not None:
                    return answer
            reason = page.error
            if page.state == DORMANT_STATE and not page.messages:
                raise TryAgain(
                    "the daemon put the session to sleep before it answered",
                    hint="p2pclaude-tail -f shows the answer when it comes",
                )
    raise P2PClaudeError(
        "the session ended without an answer" + (f": {reason}" if reason else ""),
        hint="p2pclaude-tail shows what it printed",
    )


async def skip_old_output(client: Client, session: str) -> None:
    """Make a daemon without a journal forget what it has, so that an old answer is not taken for the next one."""
    if "version" not in _object(await client.call("ping")):
        await client.call("get-output", {"sessionId": session, "clear": True})


async def read_record(pairing: Pairing, *, bootstrap: Sequence[str] | None, timeout: float) -> SessionRecord:
    """Read the session record of a pairing's daemon from the DHT within `timeout` seconds.

    Raises Unavailable when there is none, Refused when it does not open, ProtocolError, TryAgain.
    """
    dht = HyperDHT(bootstrap=bootstrap, port=0, ephemeral=True)
    try:
        async with asyncio.timeout(timeout):
            await dht.start()
            found = await dht.mutable_get(pairing.public_key)
            if found is None and not dht.latest_nodes(1):
                raise TooFewNodes("no node of the DHT answers")
    except (HyperDHTError, OSError) as error:
        raise explain(error) from error
    finally:
        await dht.destroy(timeout=CLOSE_TIMEOUT)
    from p2pclaude.protocol.record import decode_record  # here, because only `p2pclaude-ls --dht` needs it

    if found is None:
        raise Unavailable("the DHT holds no record of this daemon", hint="it is stored while p2pclaude-daemon runs")
    return decode_record(found.seq, found.value, pairing.data_key)


async def list_sessions(client: Client, *, every: bool = False, persist: bool = False) -> list[Mapping[str, Any]]:
    """Return the sessions as the daemon lists them, ended ones too with `every`."""
    call = client.persist if persist else client.call
    result = await call("list-sessions", {"all": True} if every else {}, early=True)
    if not isinstance(result, list):
        raise ProtocolError("the daemon's list of sessions is not a list")
    return [entry for entry in result if isinstance(entry, dict) and isinstance(entry.get("sessionId"), str)]


async def stop(client: Client, session: str) -> bool:
    """Stop a session; False if there is no such session."""
    return _object(await client.call("stop-session", {"sessionId": session})).get("success") is True


async def interrupt(client: Client, session: str) -> bool:
    """End the turn of a session, if there is one; False if there is no such session."""
    return _object(await client.call("interrupt-session", {"sessionId": session})).get("success") is True


def no_session(session: str) -> NoSession:
    """Return the error for a session that the daemon does not know."""
    return NoSession(f"no such session: {session}", hint="p2pclaude-ls -a lists them all")


def _page(result: object) -> Page:
    answer = _object(result)
    messages = answer.get("messages")
    if not isinstance(messages, list):
        raise ProtocolError("the daemon's answer holds no messages")
    state = answer.get("state")
    envelopes = [message for message in messages if isinstance(message, Mapping)]
    error = answer.get("error")
    return Page(
        envelopes,
        state if isinstance(state, str) else None,
        _number(answer.get("next")),
        error if isinstance(error, str) else None,
        _numbers(answer.get("then")),
    )


def _object(result: object) -> Mapping[str, Any]:
    if not isinstance(result, dict):
        raise ProtocolError("the daemon's answer is not an object")
    return result


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: object) -> list[int]:
    found = [_number(entry) for entry in value[:MAX_AHEAD]] if isinstance(value, list) else []
    return [number for number in found if number is not None]


def _is_argument(session: str) -> bool:
    """Tell whether an id may be printed, and given to a command as it is: one word, and none of its options."""
    return session.isprintable() and " " not in session and not session.startswith("-") and session != ""


def _seq(envelope: Mapping[str, Any]) -> int | None:
    return _number(envelope.get("seq"))


def _spawn_error(result: Mapping[str, Any], directory: str | None) -> P2PClaudeError:
    message = str(result.get("errorMessage") or "no reason given")
    error = _daemon_error("no session was started", message)
    if directory is None and "director" in message.lower() and not isinstance(error, Unavailable):
        error.hint = error.hint or "name a directory with -C"
    return error


_REASONS: tuple[tuple[tuple[str, ...], type[P2PClaudeError]], ...] = (
    (
        ("claude was not found", "claude not found", "a program that", "could not be started", "ended at once"),
        Unavailable,  # first, because what Claude said of it may follow
    ),
    (("no space left", "which is the most", "is stopping", "wait already"), TryAgain),
    (("too many", "limit", "maximum", "busy", "full"), TryAgain),
    (("outside", "permission", "not allowed", "denied"), Refused),
    (("not exist", "not a directory", "no such", "already", "invalid", "must be", "required", "missing"), DataError),
    ((" enoent", " eacces"), Unavailable),  # Node's `spawn claude ENOENT`: no such program, or no such directory
)


_PATH = re.compile(r"(?s)^/.*?(?=: | could not be started: )|(?<=: )/.*$")
"""A path in a reason, at its beginning or its end: it may hold any word."""


def _daemon_error(text: str, reason: str) -> P2PClaudeError:
    """Choose the class, and so the exit status, by the words of a daemon's reason: the contract has no codes."""
    lower = _PATH.sub("", reason.lower())
    kind = next((kind for words, kind in _REASONS if any(word in lower for word in words)), Refused)
    hint = "nothing was done, it may do later" if kind is TryAgain else None
    return kind(f"{text}: {reason[0].lower()}{reason[1:]}", hint=hint)
