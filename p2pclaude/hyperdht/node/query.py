"""Iterative lookups: ask the closest nodes known for closer ones until there are none (ring 2).

`node` makes a `Query`; `peer` and `storage` read its replies, then store something at the closest nodes
with `commit`. No task runs for it: replies arriving from `rpc` drive it on. Source: dht-rpc lib/query.js; where this
differs, nodes are visited in true order of distance, one that is silent cannot hold up the others, and what a hostile
node can make us visit is bounded.
"""

import asyncio
import logging
from bisect import insort
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from heapq import heappop, heappush
from operator import itemgetter
from typing import Final, NamedTuple, TypedDict

from ..constants import ErrorCode, K
from ..encoding import Address
from ..errors import HyperDHTError, RemoteError, Timeout, TooFewNodes
from ..rpc.messages import node_id
from ..rpc.requests import OutgoingRequest, Reply
from ..rpc.rpc import Rpc
from .bootstrap import Bootstrap
from .routing import RoutingTable
from .upkeep import Upkeep, is_usable

logger = logging.getLogger(__name__)

CONCURRENCY: Final = 10
CAREFUL_CONCURRENCY: Final = 3  # while only remembered nodes were asked, and few of them answered
QUERY_RETRIES: Final = 5
STRAGGLER_SENDS: Final = 3  # unanswered sends after which a node no longer holds up the end,
FULL_STRAGGLER_SENDS: Final = 2  # or that many once there is a full result
MAX_VISITS: Final = 512


class QueryOptions(TypedDict, total=False):
    """What may be said of a walk beside its command and its target.

    `nodes` are asked first, such as `closest_nodes` of an earlier walk. `value` goes along, to `concurrency` nodes at a
    time, each of them asked 1 + `retries` times.
    """

    value: bytes | None
    nodes: Sequence[Address] | None
    internal: bool
    concurrency: int
    retries: int


class Contacts(NamedTuple):
    """Whom a node knows, and how it asks them: what a walk needs of its node."""

    rpc: Rpc
    table: RoutingTable
    bootstrap: Bootstrap
    upkeep: Upkeep


class _Frontier:
    """The nodes of one walk: who is next, who has answered, who is silent, and the closest so far.

    Every address is visited once at most, in true order of distance.
    """

    __slots__ = ("_done", "_down", "_goal", "_pending", "_referrers", "_visits", "closest")

    def __init__(self, target: bytes) -> None:
        self._goal = int.from_bytes(target, "big")
        self._pending: list[tuple[int, Address]] = []  # a heap by distance
        self._referrers: dict[Address, list[Address]] = {}  # pending and visited, until they are done or down
        self._done: set[Address] = set()
        self._down: set[Address] = set()
        self._visits = 0
        self.closest: list[tuple[int, Reply]] = []
        """Distance and reply of the closest nodes that have an id, closest first, at most 20."""

    @property
    def farthest(self) -> int:
        """The distance from which on a node is of no use any more."""
        return self.closest[-1][0] if len(self.closest) >= K else 1 << 256

    @property
    def is_full(self) -> bool:
        """Whether there are as many closest nodes as a walk is to find."""
        return len(self.closest) >= K

    @property
    def is_exhausted(self) -> bool:
        """Whether there is nobody left to visit."""
        return not self._pending

    @property
    def was_answered(self) -> bool:
        """Whether any node has answered."""
        return bool(self._done)

    @property
    def silent(self) -> int:
        """How many nodes did not answer."""
        return len(self._down)

    def add(self, addresses: Iterable[Address], referrer: Address | None, own_id: bytes) -> list[Address]:
        """Take nodes that `referrer` named, or that we know; return those of them that did not answer us.

        The node with `own_id` is left out: that is ourselves, and changes when we become persistent in mid-walk.
        """
        farthest, down = self.farthest, []
        for address in addresses:
            if address in self._done:
                continue
            if address in self._down:
                down.append(address)
                continue
            known = self._referrers.get(address)
            if known is not None:
                if referrer is not None:
                    known.append(referrer)
                continue
            id = node_id(address)
            distance = int.from_bytes(id, "big") ^ self._goal
            if distance < farthest and id != own_id and is_usable(address):
                self._referrers[address] = [] if referrer is None else [referrer]
                heappush(self._pending, (distance, address))
        return down

    def next(self) -> tuple[int, Address] | None:
        """Return distance and address of the node to visit now; None, and nobody is left, if that led nowhere."""
        distance, address = heappop(self._pending)
        if distance >= self.farthest or self._visits >= MAX_VISITS:
            self._pending.clear()  # the rest is farther still
            return None
        self._visits += 1
        return distance, address

    def note_answer(self, source: Address) -> None:
        """Learn that a node has answered, be it with an error."""
        self._done.add(source)
        self._referrers.pop(source, None)

    def keep(self, reply: Reply) -> None:
        """Count a reply among the closest, if it is."""
        if reply.id is not None:
            insort(self.closest, (int.from_bytes(reply.id, "big") ^ self._goal, reply), key=itemgetter(0))
            del self.closest[K:]

    def note_silence(self, address: Address) -> list[Address]:
        """Learn that a node does not answer; return who named it."""
        self._down.add(address)
        return self._referrers.pop(address, [])

    def clear(self) -> None:
        """Visit nobody any more."""
        self._pending.clear()


class _Outcome:
    """What a walk has brought so far, for whoever reads it."""

    __slots__ = ("_arrived", "_error", "_replies", "ended")

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self._replies: deque[Reply] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None

    def put(self, reply: Reply) -> None:
        """Have one more reply to read."""
        self._replies.append(reply)
        self._arrived.set()

    def end(self, error: Exception | None) -> None:
        """Have no more replies; `error` is why, if the walk did not come to its own end."""
        assert not self.ended.is_set()
        self._error = error
        self.ended.set()
        self._arrived.set()

    async def next(self) -> Reply:
        """Return the next reply; raises StopAsyncIteration at the end, or what ended the walk."""
        while not self._replies:
            if self.ended.is_set():
                self.check()
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._replies.popleft()

    def check(self) -> None:
        """Raise what ended the walk, if it did not come to its own end."""
        if self._error is not None:
            raise self._error


class _Sources:
    """Where the first nodes of a walk come from, each source asked when the one before it has not done."""

    __slots__ = ("careful", "from_table", "resolving", "tried_fallbacks")

    def __init__(self) -> None:
        self.careful = False  # only nodes of an earlier walk are asked, and few of them have answered
        self.from_table = False
        self.resolving = False  # a bootstrap node's name is being looked up
        self.tried_fallbacks = False


class Query:
    """One walk towards `target`. It begins when it is first iterated over or awaited.

    `async for reply in query` gives every reply without an error as it comes; `closest_replies` are the best of those
    so far that carried an id, closest first. Leave early with `cancel`, or use the query as an async context manager;
    an abandoned query ends by itself.
    """

    def __init__(
        self,
        contacts: Contacts,
        command: int,
        target: bytes,
        *,
        value: bytes | None = None,
        nodes: Sequence[Address] | None = None,
        internal: bool = False,
        concurrency: int = CONCURRENCY,
        retries: int = QUERY_RETRIES,
    ) -> None:
        self.target = target
        self.successes = 0
        self.errors = 0
        self.resends = 0
        """Requests that had to be sent again: what nobody knows may be what somebody's lost answer said."""
        self.commit_errors: list[Exception] = []
        """What went wrong in the last `commit`, one entry a node."""
        self.on_reply: Callable[[Reply], None] | None = None
        self._contacts = contacts
        self._visit = partial(
            contacts.rpc.start, command=command, internal=internal, target=target, value=value, retries=retries
        )
        self._concurrency = concurrency
        self._initial = nodes
        self._started = False
        self._frontier = _Frontier(target)
        self._calls: dict[OutgoingRequest, int] = {}  # in flight -> distance
        self._straggling: dict[OutgoingRequest, int] = {}  # those of them with sends not answered in time, how many
        self._outcome = _Outcome()
        self._sources = _Sources()

    # reading

    @property
    def closest_replies(self) -> list[Reply]:
        """The replies of the closest nodes so far: no error, a checked id, closest first, at most 20."""
        return [reply for _, reply in self._frontier.closest]

    @property
    def was_answered(self) -> bool:
        """Whether any node has answered, be it with an error."""
        return self._frontier.was_answered

    @property
    def closest_nodes(self) -> list[Address]:
        """The addresses of `closest_replies`: start a later query of the same target with them."""
        return [reply.source for _, reply in self._frontier.closest]

    def __aiter__(self) -> "Query":
        return self

    async def __anext__(self) -> Reply:
        self.start()
        return await self._outcome.next()

    async def __aenter__(self) -> "Query":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cancel()

    async def finished(self) -> None:
        """Wait for the end of the walk; raises Suspended or Destroyed if the node's ended it."""
        self.start()
        await self._outcome.ended.wait()
        self._outcome.check()

    async def commit(self, store: Callable[[Reply], Awaitable[object]]) -> int:
        """Finish the walk, run `store` for each of the closest replies at once and count those that succeed.

        If every one fails a refusal is raised rather than another error; TooFewNodes if there was no node to store at.
        """
        await self.finished()
        replies = self.closest_replies
        if not replies:
            raise TooFewNodes("no DHT node answered")
        outcomes = await asyncio.gather(*map(store, replies), return_exceptions=True)
        self.commit_errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if len(self.commit_errors) == len(replies):
            refusals = [error for error in self.commit_errors if isinstance(error, RemoteError)]
            raise (refusals or self.commit_errors)[-1]
        return len(replies) - len(self.commit_errors)

    def cancel(self) -> None:
        """End the walk here; requests in flight are forgotten."""
        self._finish(None)

    # walking

    def start(self) -> None:
        """Begin the walk if it has not begun; done by whoever reads first."""
        if self._started:
            return
        self._started = True
        self._guard(self._begin)

    def _begin(self) -> None:
        if self._initial:
            self._add(self._initial, None)
            self._advance()
            self._sources.careful = not self._sources.from_table
        else:
            self._add_from_table()
            self._advance()

    def _guard(self, step: Callable[[], None]) -> None:
        """Take one step; from a callback nobody would see its exception, so that ends the walk and is its outcome."""
        try:
            step()
        except Exception as error:
            logger.exception("a query failed")
            self._finish(error)

    def _add_from_table(self) -> None:
        self._sources.from_table = True
        nodes = self._contacts.table.closest(self.target)
        self._add([node.address for node in nodes], None)
        if len(nodes) < K:
            self._add_bootstrap(fallbacks=False)

    def _add_bootstrap(self, *, fallbacks: bool) -> None:
        bootstrap = self._contacts.bootstrap
        self._add(bootstrap.known(), None)
        lookup = bootstrap.lookup(fallbacks=fallbacks)
        if lookup is not None:
            self._sources.resolving = True
            lookup.add_done_callback(self._bootstrap_resolved)

    def _bootstrap_resolved(self, lookup: asyncio.Task[None]) -> None:
        self._sources.resolving = False
        self._guard(self._take_bootstrap)

    def _take_bootstrap(self) -> None:
        self._add(self._contacts.bootstrap.known(), None)
        self._advance()

    def _add(self, addresses: Iterable[Address], referrer: Address | None) -> None:
        for down in self._frontier.add(addresses, referrer, self._contacts.table.id):
            if referrer is not None:
                self._contacts.upkeep.send_down_hint(referrer, down)

    def _advance(self) -> None:
        if self._outcome.ended.is_set():
            return
        while not self._frontier.is_exhausted and len(self._calls) < self._limit():
            visit = self._frontier.next()
            if visit is not None and not self._ask(*visit):
                return
        if self._frontier.is_exhausted and self._is_over():
            self._end_or_widen()

    def _limit(self) -> int:
        return (CAREFUL_CONCURRENCY if self._sources.careful else self._concurrency) + len(self._straggling)

    def _ask(self, distance: int, address: Address) -> bool:
        try:
            call = self._visit(address, on_resend=self._on_resend)
        except HyperDHTError as error:
            self._finish(error)
            return False
        self._calls[call] = distance
        call.future.add_done_callback(partial(self._settled, call))
        return True

    def _on_resend(self, call: OutgoingRequest) -> None:
        if call in self._calls:
            self.resends += 1
            self._straggling[call] = call.sends
            self._guard(self._advance)

    def _is_over(self) -> bool:
        if not self._calls:
            return not self._sources.resolving
        full, farthest = self._frontier.is_full, self._frontier.farthest
        sends = FULL_STRAGGLER_SENDS if full else STRAGGLER_SENDS
        if not all(
            self._straggling.get(call, 0) >= sends or distance >= farthest for call, distance in self._calls.items()
        ):
            return False
        return full or self.successes >= len(self._calls)

    def _end_or_widen(self) -> None:
        sources = self._sources
        if not sources.from_table and self.successes < K / 4:
            sources.careful = False
            self._add_from_table()
        elif self.successes + self.errors == self._frontier.silent and not sources.tried_fallbacks and not self._calls:
            sources.tried_fallbacks = True  # nobody answered: perhaps the bootstrap nodes have moved
            self._add_bootstrap(fallbacks=True)
        else:
            self._finish(None)
            return
        self._advance()

    def _finish(self, error: Exception | None) -> None:
        if self._outcome.ended.is_set():
            return
        self._started = True
        self._outcome.end(error)
        calls, self._calls = self._calls, {}
        self._straggling = {}
        self._frontier.clear()
        for call in calls:
            call.cancel()
            if error is None and call.sends >= STRAGGLER_SENDS:
                self._contacts.upkeep.suspect(call.to)

    # hearing

    def _settled(self, call: OutgoingRequest, future: "asyncio.Future[Reply]") -> None:
        self._calls.pop(call, None)
        self._straggling.pop(call, None)
        if future.cancelled():
            return
        error = future.exception()  # looked at in any case, so that asyncio does not complain
        if not self._outcome.ended.is_set():
            self._guard(partial(self._learn, call, future, error))

    def _learn(self, call: OutgoingRequest, future: "asyncio.Future[Reply]", error: BaseException | None) -> None:
        if error is None:
            self._answered(future.result())
        elif isinstance(error, Timeout):
            self._contacts.upkeep.forget(call)
            self._timed_out(call.to)
        elif isinstance(error, Exception):
            self._finish(error)
        self._advance()

    def _answered(self, reply: Reply) -> None:
        self._frontier.note_answer(reply.source)
        if reply.error == ErrorCode.NONE:
            self._take(reply)
        else:
            self.errors += 1
        # Ephemeral nodes answer storage commands with an error, and yet know who is closer.
        self._add(reply.closer_nodes[:K], reply.source)
        if self.successes + self.errors >= self._concurrency:
            self._sources.careful = False

    def _take(self, reply: Reply) -> None:
        self.successes += 1
        self._frontier.keep(reply)
        self._outcome.put(reply)
        if self.on_reply is not None:
            self._tell(self.on_reply, reply)

    def _tell(self, listener: Callable[[Reply], None], reply: Reply) -> None:
        try:
            listener(reply)
        except Exception:
            logger.exception("a query's listener failed")

    def _timed_out(self, address: Address) -> None:
        self.errors += 1
        for referrer in self._frontier.note_silence(address):
            self._contacts.upkeep.send_down_hint(referrer, address)
