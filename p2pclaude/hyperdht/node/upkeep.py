"""Keeps the routing table true (ring 2): who was heard from, who is silent, who replaces whom, how others see us.

`node` reports every request and reply with a checked id; pings of doubtful nodes leave through `rpc`. Times are
ticks of five seconds. Source: dht-rpc index.js (_addNodeFromNetwork, _onfullrow, _check, _pingSome).
"""

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Final

from ..constants import InternalCommand
from ..crypto import hash
from ..encoding import Address, ipv4
from ..errors import HyperDHTError, Timeout
from ..rpc.messages import node_id
from ..rpc.requests import OutgoingRequest, Reply
from ..rpc.rpc import Rpc
from .nat import NatSampler
from .routing import OLD_TICKS, RECENT_TICKS, RoutingTable, TableNode

MAX_CHECKS: Final = 10
MAX_SWAPS: Final = 3
MAX_DOWN_HINTS: Final = 50  # a tick
WAKEUP_TICKS: Final = 2 * OLD_TICKS  # makes everything look old

# hyperdht index.js, filterNode: nodes that answer and yet are no use to the public network.
_REFUSED: Final = frozenset({("134.209.28.98", 49738), ("167.99.142.185", 49738), ("35.233.47.252", 9400)})
_REFUSED_HOST: Final = "150.136.142.116"


def is_usable(address: Address) -> bool:
    """Tell whether an address from the network may be sent to: no port 0, no multicast, not a refused node."""
    host, port = address
    first = int(host.partition(".")[0])
    return port > 0 and 0 < first < 224 and address not in _REFUSED and host != _REFUSED_HOST


class Upkeep:
    """The table, the NAT sampler, and the tick count they are dated by."""

    def __init__(self, rpc: Rpc, table: RoutingTable, rng: random.Random, *, max_bootstrap_samples: int) -> None:
        self.table = table
        self.nat = NatSampler()
        self.tick = rng.randint(51, 100)
        self.ready = False  # full rows are left alone while the node is still bootstrapping
        self.on_nat_update: Callable[[], None] = _nothing
        self._rpc = rpc
        self._checks = 0
        self._swaps = 0
        self._down_hints = 0
        self._max_bootstrap_samples = max(1, max_bootstrap_samples)
        self._bootstrap_samples: set[Address] = set()

    # hearing

    def heard_reply(self, reply: Reply, external: bool) -> None:
        """Note an answer. One without id may come from a bootstrap node: a few of those are NAT samples too."""
        if not is_usable(reply.source):
            return
        if reply.id is not None:
            self._heard(reply.id, reply.source, None if external else reply.to)
        elif not external and self._is_new_bootstrap_sample(reply.source):
            self.sample(reply.to)

    def _is_new_bootstrap_sample(self, source: Address) -> bool:
        known = self._bootstrap_samples
        if source in known or len(known) >= self._max_bootstrap_samples:
            return False
        known.add(source)
        return True

    def heard_request(self, id: bytes, source: Address) -> None:
        """Note a request with a checked id. Its source may be forged, so what it says about us is no sample."""
        if is_usable(source):
            self._heard(id, source, None)

    def _heard(self, id: bytes, source: Address, to: Address | None) -> None:
        node = self.table.get(id)
        if node is None:
            node = TableNode.at(source, self.tick)
            if not self._add(node):
                return
        node.pinged = node.seen = self.tick
        self.table.touch(node)
        if to is not None and (node.sampled == 0 or self.tick - node.sampled >= OLD_TICKS):
            node.to, node.sampled = to, self.tick
            self.sample(to)

    def _add(self, node: TableNode) -> bool:
        if node.id == self.table.id:
            return False
        if self.table.add(node):
            return True
        self._challenge(node)
        return False

    def sample(self, to: Address) -> None:
        """Count one address others see us at."""
        before = self.nat.host, self.nat.port
        self.nat.add(*to)
        if before != (self.nat.host, self.nat.port):
            self.on_nat_update()

    def replace_sampler(self, sampler: NatSampler) -> None:
        """Go on with another sampler, and take bootstrap samples anew."""
        before = self.nat.host, self.nat.port
        self._bootstrap_samples.clear()
        self.nat = sampler
        if before != (sampler.host, sampler.port):
            self.on_nat_update()

    # doubting

    def ping_some(self) -> None:
        """Ping the nodes longest without contact: five, fewer when there is traffic or contact was lately."""
        oldest = self.table.oldest(5)
        if not oldest:
            return
        count = 3 if self._rpc.in_flight > 2 else 5
        if self.tick - oldest[0].pinged < RECENT_TICKS:
            count = 2
        for node in oldest[:count]:
            if node.pinged != self.tick:
                self.check(node)

    def check(self, node: TableNode) -> None:
        """Ping a node and forget it if it does not answer."""
        last_seen = node.seen
        node.pinged = self.tick
        self._checks += 1
        self._ping(node.address, partial(self._checked, node, last_seen))

    def _checked(self, node: TableNode, last_seen: int, answered: bool | None) -> None:
        self._checks -= 1
        # An answer with a good id has set `seen`; one without comes from a node that is no longer persistent.
        if answered is False or (answered and node.seen <= last_seen and node.seen != self.tick):
            self._remove(node)

    def down_hint(self, encoded: bytes) -> None:
        """Take another node's word that one of ours is down as a reason to ping it, within limits."""
        node = self.table.get(hash(encoded[:6]))
        if node is None or self._checks >= MAX_CHECKS:
            return
        if node.pinged < self.tick or node.down_hints == 0:
            node.down_hints += 1
            self.check(node)

    def suspect(self, address: Address) -> None:
        """Ping the node at an address that was slow to answer a query, if it is one of ours."""
        node = self.table.get(node_id(address))
        if node is not None and node.pinged < self.tick and self._checks < MAX_CHECKS:
            self.check(node)

    def forget(self, call: OutgoingRequest) -> None:
        """Remove the node that left a request unanswered, unless everybody is silent: that would be our network."""
        node = self.table.get(node_id(call.to))
        if node is not None and self._rpc.heard_since(call):
            self._remove(node)

    def _remove(self, node: TableNode) -> None:
        if self.table.get(node.id) is node:
            self.table.remove(node.id)

    def _challenge(self, newcomer: TableNode) -> None:
        """The newcomer's row is full: it may have the place of a node that does not answer."""
        if not self.ready or self._swaps >= MAX_SWAPS:
            return
        incumbent = self.table.replaceable(newcomer.id, self.tick)
        if incumbent is None:
            return
        last_seen = incumbent.seen
        incumbent.pinged = self.tick
        self._swaps += 1
        self._ping(incumbent.address, partial(self._challenged, newcomer, incumbent, last_seen))

    def _challenged(self, newcomer: TableNode, incumbent: TableNode, last_seen: int, answered: bool | None) -> None:
        self._swaps -= 1
        if answered is None or (answered and incumbent.seen > last_seen):
            return
        self._remove(incumbent)
        self.table.add(newcomer)

    # asking

    def send_down_hint(self, to: Address, down: Address) -> None:
        """Tell a node that one it named does not answer."""
        if self._down_hints < MAX_DOWN_HINTS:
            self._down_hints += 1
            self._ask(to, InternalCommand.DOWN_HINT, ipv4(down), _ignore)

    def _ping(self, address: Address, done: Callable[[bool | None], None]) -> None:
        self._ask(address, InternalCommand.PING, None, done)

    def _ask(
        self, to: Address, command: InternalCommand, value: bytes | None, done: Callable[[bool | None], None]
    ) -> None:
        """Send a request nobody awaits; `done` learns whether it was answered, None if that cannot be told."""
        try:
            call = self._rpc.start(to, command, internal=True, value=value)
        except HyperDHTError:
            done(None)
            return
        call.future.add_done_callback(partial(self._report, call, done))

    def _report(
        self, call: OutgoingRequest, done: Callable[[bool | None], None], future: "asyncio.Future[Reply]"
    ) -> None:
        if not future.cancelled() and future.exception() is None:
            done(True)
        else:
            silent = not future.cancelled() and isinstance(future.exception(), Timeout)
            done(False if silent and self._rpc.heard_since(call) else None)

    def begin_tick(self, *, woken: bool) -> None:
        """Count a tick; after a sleep so many that everything looks old, and pings follow in two ticks."""
        self._down_hints = 0
        if woken:
            self.tick += WAKEUP_TICKS
            self.tick += 8 - (self.tick & 7) - 2
        else:
            self.tick += 1

    def on_timeout(self, call: OutgoingRequest) -> None:
        """Forget a node that never answered a ping or lookup of ours; relayed commands say nothing about it.

        Nor do the two that ask what a NAT lets in.
        """
        if call.asked.internal and call.asked.command not in (InternalCommand.PING_NAT, InternalCommand.DELAYED_PING):
            self.forget(call)


def _ignore(answered: bool | None) -> None:
    pass


def _nothing() -> None:
    pass
