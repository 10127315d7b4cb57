"""Finds out whether strangers can reach this node, and makes it a persistent one if they can (ring 2).

`node` asks at the start, after twenty quiet minutes, and when the network may have changed. A node that is reachable
uses one socket for everything and is "open" to peers; a persistent one also has an id, stands in other nodes' tables
and stores for them. Source: dht-rpc index.js (_bootstrap, _updateNetworkState, _checkIfFirewalled); beyond it, a node
that moved to another network notices, and a forced persistent node tries until it succeeds.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

from ..constants import InternalCommand
from ..encoding import Address
from ..errors import HyperDHTError
from ..rpc.messages import node_id
from ..rpc.requests import OutgoingRequest, Reply
from .nat import NatSampler
from .query import Contacts, Query

STABLE_TICKS: Final = 240  # 20 min without a sleep: worth a look whether we can be persistent
MORE_STABLE_TICKS: Final = 3 * STABLE_TICKS
FORCED_RETRY_TICKS: Final = 2  # for who insists; the first attempt may have come before the network
PROBE_GRACE: Final = 0.05
CHECKED_NODES: Final = 5
NEEDED_OF_MANY: Final = 3
NEEDED_OF_FEW: Final = 1


class NodeActions(NamedTuple):
    """What the verdict makes a node do, and how it gets there."""

    walk: Callable[[bytes, int], Query]
    """Make a walk towards an id that asks so many nodes at a time."""
    refresh: Callable[[], None]
    """Fill the table, where the network may be another one."""
    set_identity: Callable[[bytes | None], None]
    """Become persistent under an id, or ephemeral again."""
    spawn: Callable[[Coroutine[Any, Any, None]], object]
    """Do something in the background, until the node ends."""


class Reachability:
    """The verdict on one node. `ephemeral` is None for a node that shall decide by itself."""

    def __init__(
        self,
        contacts: Contacts,
        actions: NodeActions,
        bootstrapped: asyncio.Event,
        *,
        ephemeral: bool | None,
        firewalled: bool,
    ) -> None:
        self._contacts = contacts
        self._own = contacts.rpc.own
        self._actions = actions
        self._bootstrapped = bootstrapped
        self._adaptive = ephemeral is None
        self._forced = ephemeral is False
        self._assume_open = not firewalled
        self._probe_due = firewalled and not self._forced
        self._probe_answered = False
        self._probe_call: OutgoingRequest | None = None
        self._probe_rtt = 0.0
        self._ticks_left = STABLE_TICKS if self._adaptive else FORCED_RETRY_TICKS
        self._last_host: str | None = None
        self._busy = False

    # the start

    async def bootstrap(self) -> None:
        """Walk towards our own id, test the firewall, and once persistent walk towards the id we then have."""
        for _ in range(2):
            query = self._actions.walk(self._contacts.table.id, 10)
            self.watch(query)
            await query.finished()
            await self._await_probe()
            if not self._probe_answered and not self._forced:
                return
            if not await self.update(only_firewall=not self._forced):
                return

    async def _await_probe(self) -> None:
        # A small network is walked through before the probe can be back. If it is let in, it takes one round trip.
        probe, self._probe_call = self._probe_call, None
        if probe is not None:
            await asyncio.wait([probe.future], timeout=PROBE_GRACE + 2 * self._probe_rtt)
            await asyncio.sleep(0)  # `_probed` runs

    def watch(self, query: Query) -> None:
        """Let the first node that answers a query probe our server socket, if that was not done yet."""
        if self._probe_due:
            query.on_reply = self._probe

    def _probe(self, reply: Reply) -> None:
        # One node that gets through is no proof, but reason enough for the real test.
        if not self._probe_due:
            return
        self._probe_due = False
        try:
            call = self._contacts.rpc.start(
                reply.source, InternalCommand.PING_NAT, internal=True, value=self._port_value()
            )
        except HyperDHTError:
            return  # suspended since the reply came
        self._probe_call, self._probe_rtt = call, reply.rtt
        call.future.add_done_callback(self._probed)

    def _probed(self, future: "asyncio.Future[Reply]") -> None:
        if future.cancelled() or future.exception() is not None:
            return
        if future.result().socket is not self._own.server_socket:
            return
        self._probe_answered = True
        if self._bootstrapped.is_set():
            self._actions.spawn(self._update_in_background(only_firewall=not self._forced))

    def _port_value(self) -> bytes:
        socket = self._own.server_socket
        assert socket is not None  # bound before anything is sent
        return socket.address[1].to_bytes(2, "little")

    # later

    def tick(self) -> None:
        """Count one tick of a node that is not persistent but may become so."""
        if self._own.identity is None and (self._adaptive or self._forced):
            self._count_tick()

    def _count_tick(self) -> None:
        self._ticks_left -= 1
        if self._ticks_left > 0:
            return
        if self._adaptive and self._last_host == self._contacts.upkeep.nat.host:
            self._ticks_left = MORE_STABLE_TICKS  # the same network as at the last attempt
        else:
            self._actions.spawn(self._update_in_background(only_firewall=False))

    def reconsider(self) -> None:
        """Look again after a sleep or a change of the network; an adaptive node is ephemeral until it is proven."""
        self._last_host = None
        self._ticks_left = MORE_STABLE_TICKS if self._adaptive else FORCED_RETRY_TICKS
        if self._adaptive:
            self._actions.set_identity(None)
        if not self._assume_open:
            self._actions.spawn(self._recheck())

    async def _recheck(self) -> None:
        own, upkeep, sampler = self._own, self._contacts.upkeep, NatSampler()
        if not own.firewalled and not await self._is_firewalled(sampler):
            return
        own.firewalled = True
        self._actions.set_identity(None)
        upkeep.replace_sampler(NatSampler())  # the old samples are of another network
        for known in self._contacts.table:
            known.sampled = 0
        self._probe_due, self._probe_answered = not self._forced, False
        self._actions.refresh()

    # the verdict

    async def _update_in_background(self, *, only_firewall: bool) -> None:
        # The bootstrap walk looks at the outcome, a tick does not.
        try:
            await self.update(only_firewall=only_firewall)
        except HyperDHTError:
            pass

    async def update(self, *, only_firewall: bool) -> bool:
        """Test whether we are reachable and act on it; True if something changed.

        With `only_firewall` the node learns that it is open, but stays ephemeral. Raises Suspended or Destroyed.
        """
        own = self._own
        if self._busy or own.identity is not None or (only_firewall and not own.firewalled):
            return False
        self._busy = True
        try:
            return await self._update(only_firewall)
        finally:
            self._busy = False

    async def _update(self, only_firewall: bool) -> bool:
        own, upkeep = self._own, self._contacts.upkeep
        host, port = upkeep.nat.host, upkeep.nat.port
        if not only_firewall:
            self._ticks_left = FORCED_RETRY_TICKS if self._forced else MORE_STABLE_TICKS
            self._last_host = host
        if host is None or port == 0:
            return False
        sampler = upkeep.nat
        if own.firewalled:
            sampler = NatSampler()
            if await self._is_firewalled(sampler):
                return False
        # What we compare with may have changed while we waited.
        if (host, port) != (upkeep.nat.host, upkeep.nat.port) or sampler.host != host or sampler.port == 0:
            return False
        own.firewalled = False
        if sampler is not upkeep.nat:
            upkeep.replace_sampler(sampler)
        if not only_firewall:
            self._actions.set_identity(node_id((host, sampler.port)))
        return True

    async def _is_firewalled(self, sampler: NatSampler) -> bool:
        """Have several nodes answer to our server socket, which did not ask them; feed what they see to `sampler`."""
        own, rpc = self._own, self._contacts.rpc
        asked = self._choose()
        calls = [
            # From the client socket whatever we use otherwise: the server socket's own question would open the door.
            rpc.request(
                address, InternalCommand.PING_NAT, internal=True, value=self._port_value(), socket=own.client_socket
            )
            for address in asked
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        pongs = [o for o in outcomes if isinstance(o, Reply) and o.socket is own.server_socket]
        for pong in pongs:
            sampler.add(*pong.to)
        if len(pongs) < (NEEDED_OF_MANY if len(asked) >= CHECKED_NODES else NEEDED_OF_FEW):
            return True
        server, host = own.server_socket, self._contacts.upkeep.nat.host
        # A server socket behind a NAT that gives it another port is as good as closed.
        return sampler.host is None or sampler.host != host or server is None or sampler.port != server.address[1]

    def _choose(self) -> list[Address]:
        addresses = [known.address for known in self._contacts.table.latest(CHECKED_NODES)]
        if len(addresses) < CHECKED_NODES:
            addresses += [a for a in self._contacts.bootstrap.known() if a not in addresses]
        return addresses
