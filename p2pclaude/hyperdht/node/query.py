"""Iterative lookups: ask the closest nodes known for closer ones until there are none (ring 2).

`node` makes a `Query`; `dht`, `connect` and `announcer` read its replies, then store something at the closest nodes
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
from typing import TYPE_CHECKING, Final, TypedDict

from ..constants import ErrorCode, K
from ..encoding import Address
from ..errors import HyperDHTError, RemoteError, Timeout, TooFewNodes
from ..rpc.messages import node_id
from ..rpc.requests import OutgoingRequest, Reply

if TYPE_CHECKING:
    from .node import Node

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


class Query:
    """One walk towards `target`. It begins when it is first iterated over or awaited.

    `async for reply in query` gives every reply without an error as it comes; `closest_replies` are the best of those
    so far that carried an id, closest first. Leave early with `cancel`, or use the query as an async context manager;
    an abandoned query ends by itself.
    """

    def __init__(
        self,
        node: "Node",
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
        self.command = command
        self.internal = internal
        self.value = value
        self.concurrency = concurrency
        self.retries = retries
        self.successes = 0
        self.errors = 0
        self.resends = 0
        """Requests that had to be sent again: what nobody knows may be what somebody's lost answer said."""
        self.commit_errors: list[Exception] = []
        """What went wrong in the last `commit`, one entry a node."""
        self.on_reply: Callable[[Reply], None] | None = None
        self._node = node
        self._goal = int.from_bytes(target, "big")
        self._initial = nodes
        self._pending: list[tuple[int, Address]] = []  # a heap by distance
        self._referrers: dict[Address, list[Address]] = {}  # pending and visited, until they are done or down
        self._done: set[Address] = set()
        self._down: set[Address] = set()
        self._calls: dict[OutgoingRequest, int] = {}  # in flight -> distance
        self._straggling: dict[OutgoingRequest, int] = {}  # those of them with sends not answered in time, how many
        self._closest: list[tuple[int, Reply]] = []
        self._results: deque[Reply] = deque()
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()
        self._error: Exception | None = None
        self._started = False
        self._from_table = False
        self._careful = False
        self._resolving = False
        self._fallbacks_tried = False
        self._visits = 0

    # reading

    @property
    def closest_replies(self) -> list[Reply]:
        """The replies of the closest nodes so far: no error, a checked id, closest first, at most 20."""
        return [reply for _, reply in self._closest]

    @property
    def was_answered(self) -> bool:
        """Whether any node has answered, be it with an error."""
        return bool(self._done)

    @property
    def closest_nodes(self) -> list[Address]:
        """The addresses of `closest_replies`: start a later query of the same target with them."""
        return [reply.source for _, reply in self._closest]

    def __aiter__(self) -> "Query":
        return self

    async def __anext__(self) -> Reply:
        self.start()
        while not self._results:
            if self._ended.is_set():
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._results.popleft()

    async def __aenter__(self) -> "Query":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cancel()

    async def finished(self) -> None:
        """Wait for the end of the walk; raises Suspended or Destroyed if the node's ended it."""
        self.start()
        await self._ended.wait()
        if self._error is not None:
            raise self._error

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
            self._careful = not self._from_table
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
        self._from_table = True
        nodes = self._node.table.closest(self.target)
        self._add([node.address for node in nodes], None)
        if len(nodes) < K:
            self._add_bootstrap(fallbacks=False)

    def _add_bootstrap(self, *, fallbacks: bool) -> None:
        bootstrap = self._node.bootstrap
        self._add(bootstrap.known(), None)
        lookup = bootstrap.lookup(fallbacks=fallbacks)
        if lookup is not None:
            self._resolving = True
            lookup.add_done_callback(self._bootstrap_resolved)

    def _bootstrap_resolved(self, lookup: asyncio.Task[None]) -> None:
        self._resolving = False
        self._guard(self._take_bootstrap)

    def _take_bootstrap(self) -> None:
        self._add(self._node.bootstrap.known(), None)
        self._advance()

    def _add(self, addresses: Iterable[Address], referrer: Address | None) -> None:
        farthest = self._farthest()
        for address in addresses:
            if address in self._done:
                continue
            if address in self._down:
                if referrer is not None:
                    self._node.send_down_hint(referrer, address)
                continue
            known = self._referrers.get(address)
            if known is not None:
                if referrer is not None:
                    known.append(referrer)
                continue
            id = node_id(address)
            distance = int.from_bytes(id, "big") ^ self._goal
            if distance < farthest and id != self._node.table.id and self._node.accepts(address):
                self._referrers[address] = [] if referrer is None else [referrer]
                heappush(self._pending, (distance, address))

    def _farthest(self) -> int:
        return self._closest[-1][0] if len(self._closest) >= K else 1 << 256

    def _advance(self) -> None:
        if self._ended.is_set():
            return
        while self._pending and len(self._calls) < self._limit():
            distance, address = heappop(self._pending)
            if distance >= self._farthest() or self._visits >= MAX_VISITS:
                self._pending.clear()  # the rest is farther still
            elif not self._visit(address, distance):
                return
        if not self._pending and self._is_over():
            self._end_or_widen()

    def _limit(self) -> int:
        return (CAREFUL_CONCURRENCY if self._careful else self.concurrency) + len(self._straggling)

    def _visit(self, address: Address, distance: int) -> bool:
        self._visits += 1
        try:
            call = self._node.rpc.start(
                address,
                self.command,
                internal=self.internal,
                target=self.target,
                value=self.value,
                retries=self.retries,
                on_resend=self._on_resend,
            )
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
            return not self._resolving
        full = len(self._closest) >= K
        sends, farthest = FULL_STRAGGLER_SENDS if full else STRAGGLER_SENDS, self._farthest()
        if not all(
            self._straggling.get(call, 0) >= sends or distance >= farthest for call, distance in self._calls.items()
        ):
            return False
        return full or self.successes >= len(self._calls)

    def _end_or_widen(self) -> None:
        if not self._from_table and self.successes < K / 4:
            self._careful = False
            self._add_from_table()
        elif self.successes + self.errors == len(self._down) and not self._fallbacks_tried and not self._calls:
            self._fallbacks_tried = True  # nobody answered: perhaps the bootstrap nodes have moved
            self._add_bootstrap(fallbacks=True)
        else:
            self._finish(None)
            return
        self._advance()

    def _finish(self, error: Exception | None) -> None:
        if self._ended.is_set():
            return
        self._error = error
        self._started = True
        self._ended.set()
        self._arrived.set()
        calls, self._calls = self._calls, {}
        self._straggling = {}
        self._pending.clear()
        for call in calls:
            call.cancel()
            if error is None and call.sends >= STRAGGLER_SENDS:
                self._node.suspect(call.to)

    # hearing

    def _settled(self, call: OutgoingRequest, future: "asyncio.Future[Reply]") -> None:
        self._calls.pop(call, None)
        self._straggling.pop(call, None)
        if future.cancelled():
            return
        error = future.exception()  # looked at in any case, so that asyncio does not complain
        if not self._ended.is_set():
            self._guard(partial(self._learn, call, future, error))

    def _learn(self, call: OutgoingRequest, future: "asyncio.Future[Reply]", error: BaseException | None) -> None:
        if error is None:
            self._answered(future.result())
        elif isinstance(error, Timeout):
            self._node.forget(call)
            self._timed_out(call.to)
        elif isinstance(error, Exception):
            self._finish(error)
        self._advance()

    def _answered(self, reply: Reply) -> None:
        self._done.add(reply.source)
        self._referrers.pop(reply.source, None)
        if reply.error == ErrorCode.NONE:
            self._take(reply)
        else:
            self.errors += 1
        # Ephemeral nodes answer storage commands with an error, and yet know who is closer.
        self._add(reply.closer_nodes[:K], reply.source)
        if self.successes + self.errors >= self.concurrency:
            self._careful = False

    def _take(self, reply: Reply) -> None:
        self.successes += 1
        if reply.id is not None:
            insort(self._closest, (int.from_bytes(reply.id, "big") ^ self._goal, reply), key=itemgetter(0))
            del self._closest[K:]
        self._results.append(reply)
        self._arrived.set()
        if self.on_reply is not None:
            self._tell(self.on_reply, reply)

    def _tell(self, listener: Callable[[Reply], None], reply: Reply) -> None:
        try:
            listener(reply)
        except Exception:
            logger.exception("a query's listener failed")

    def _timed_out(self, address: Address) -> None:
        self.errors += 1
        self._down.add(address)
        for referrer in self._referrers.pop(address, ()):
            self._node.send_down_hint(referrer, address)
