"""Keeps a server findable: announces it to the nodes closest to its key, again and again (ring 2).

The nodes that store the announcement become the server's relays: clients find one of them by FIND_PEER and send their
handshake through it. Source: hyperdht lib/announcer.js. Beyond it: the announcement is re-made at once when a pong
shows that our address moved, and failed cycles are retried soon.
"""

import asyncio
import logging
from collections import deque
from typing import Final

from ..constants import Command, InternalCommand
from ..crypto import NS_ANNOUNCE, NS_UNANNOUNCE, KeyPair, announce_signable, sign
from ..crypto import hash as blake2b
from ..encoding import Address
from ..errors import HyperDHTError
from ..node.node import Node
from ..rpc.messages import Announce, Peer, encode_announce, encode_peer
from ..rpc.requests import Reply
from .setup_messages import RelayedPath

log = logging.getLogger(__name__)

RELAYS: Final = 3
PING_INTERVAL: Final = 3.0  # also keeps a NAT's mapping towards the relays open
CYCLE_INTERVAL: Final = 300.0  # nodes forget after 13 minutes at the earliest
CYCLE_TIMEOUT: Final = 60.0
PARTIAL_INTERVAL: Final = 20.0  # until the next cycle when fewer nodes than wanted took the announcement
FORGOTTEN_AFTER: Final = 600.0
MAX_DRIFTS: Final = 3  # announcements because our address moved, in
DRIFT_WINDOW: Final = 30.0
FIRST_RETRY: Final = 1.0
LAST_RETRY: Final = 15.0


class Announcer:
    """The announcements of one key pair."""

    def __init__(self, node: Node, key_pair: KeyPair) -> None:
        self._node = node
        self._key_pair = key_pair
        self._target = blake2b(key_pair.public_key)
        self.record = encode_peer(Peer(key_pair.public_key))
        """What nodes store: the key without relays, as those travel in the handshake."""
        self.relays: tuple[RelayedPath, ...] = ()
        """The nodes that store the announcement, each with our address as it sees us."""
        self._former: tuple[Address, ...] = ()  # relays of the last cycles: still known to some clients
        self._closest: tuple[Address, ...] = ()
        self._asked: tuple[Address, ...] = ()  # by the last cycle, which may have been cut short
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._drifts: deque[float] = deque(maxlen=MAX_DRIFTS)
        self._announced_at: dict[Address, float] = {}  # of the nodes in `relays`
        self._partial = False
        self.has_succeeded = False
        """Whether the last attempt did."""

    @property
    def relay_addresses(self) -> tuple[Address, ...]:
        """Where clients should ask first: ourselves when open, then the relays; three at most."""
        own = self._node.remote_address()
        first = () if own is None else (own,)
        return (first + tuple(path.relay_address for path in self.relays))[:RELAYS]

    def is_relay(self, address: Address) -> bool:
        """Tell whether a node stores one of our last announcements."""
        return any(path.relay_address == address for path in self.relays) or address in self._former

    async def start(self) -> None:
        """Announce and go on doing so until `stop`; returns after the first attempt, whether it succeeded or not."""
        attempted = asyncio.Event()
        if self._task is not None:  # a `suspend` that was cancelled had not come to `stop`
            self._task.cancel()
        self._task = asyncio.create_task(self._run(attempted))
        self._task.add_done_callback(lambda _: attempted.set())  # `stop` ends the waiting too
        await attempted.wait()

    def refresh(self) -> None:
        """Announce anew as soon as possible."""
        self._wanted.set()

    async def stop(self) -> None:
        """Stop announcing and take back what the relays store, those included whose answer is not here yet."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        told = dict.fromkeys((*(path.relay_address for path in self.relays), *self._asked))
        self.relays = self._asked = ()
        self.has_succeeded = False
        await asyncio.gather(*map(self._unannounce, told))

    async def _run(self, attempted: asyncio.Event) -> None:
        self._wanted.clear()
        self.has_succeeded = await self._guarded_cycle()
        attempted.set()
        retry = FIRST_RETRY
        while not self._node.destroyed:  # as `stop` may not have been called
            if self.has_succeeded:
                retry = FIRST_RETRY
                await self._keep_alive()
            else:
                await self._pause(retry)
                retry = min(2 * retry, LAST_RETRY)
            self._wanted.clear()
            self.has_succeeded = await self._guarded_cycle()

    async def _pause(self, seconds: float) -> None:
        """Wait, or until a refresh is wanted."""
        try:
            async with asyncio.timeout(seconds):
                await self._wanted.wait()
        except TimeoutError:
            pass

    async def _keep_alive(self) -> None:
        """Ping the relays until the announcement is old, some of them are gone, or our address moved."""
        loop = asyncio.get_running_loop()
        until = loop.time() + (PARTIAL_INTERVAL if self._partial else CYCLE_INTERVAL)
        while loop.time() < until and not self._wanted.is_set():
            await self._pause(PING_INTERVAL)
            pongs = await asyncio.gather(*(self._ping(path) for path in self.relays))
            moved = any(seen not in (None, path.peer_address) for seen, path in zip(pongs, self.relays, strict=True))
            if None in pongs or (moved and self._may_follow_drift()):
                return

    async def _ping(self, path: RelayedPath) -> Address | None:
        """Return where a relay sees us, to which handshakes must be sent; None if it does not answer any more."""
        try:
            reply = await self._node.rpc.request(path.relay_address, InternalCommand.PING, internal=True)
        except HyperDHTError:
            return None
        return reply.to

    def _may_follow_drift(self) -> bool:
        # A NAT that changes the mapping with every packet must not keep us announcing.
        now = asyncio.get_running_loop().time()
        if len(self._drifts) == MAX_DRIFTS and now - self._drifts[0] < DRIFT_WINDOW:
            return False
        self._drifts.append(now)
        return True

    async def _guarded_cycle(self) -> bool:
        try:
            async with asyncio.timeout(CYCLE_TIMEOUT):
                return await self._cycle()
        except (HyperDHTError, TimeoutError, OSError) as error:
            log.debug("announcing failed: %s", error)
        except Exception:  # this loop must outlive any bug below it
            log.exception("announcing failed")
        return False

    async def _cycle(self) -> bool:
        query = self._node.query(Command.FIND_PEER, self._target, nodes=self._closest or None)
        await query.finished()
        replies = [reply for reply in query.closest_replies if reply.token is not None]
        self._closest = tuple(reply.source for reply in replies)
        self._asked = tuple(reply.source for reply in replies[:RELAYS])
        announced = await asyncio.gather(*(self._announce(reply) for reply in replies[:RELAYS]))
        fresh = tuple(path for path in announced if path is not None)
        self._partial = len(fresh) < min(RELAYS, len(replies))
        relays = self._with_silent_ones(fresh)
        gone = {path.relay_address for path in self.relays} - {path.relay_address for path in relays}
        self._former = (*gone, *self._former)[: 2 * RELAYS]
        self.relays = relays
        await asyncio.gather(*(self._unannounce(address) for address in gone))
        # In a network of our own there is nobody to announce to; whoever asks us directly is answered all the same.
        is_in_vain = len(self._node.bootstrap) > 0 and not query.was_answered
        return bool(fresh) or not (self._node.firewalled or is_in_vain)

    def _with_silent_ones(self, fresh: tuple[RelayedPath, ...]) -> tuple[RelayedPath, ...]:
        """Return these relays, and former ones in the place of those that are missing.

        A node that does not answer now may be there all the same, with what it was told the last time.
        """
        now = asyncio.get_running_loop().time()
        taken = {path.relay_address for path in fresh}
        silent = [
            path
            for path in self.relays
            if path.relay_address not in taken and now - self._announced_at[path.relay_address] < FORGOTTEN_AFTER
        ]
        relays = (*fresh, *silent)[:RELAYS]
        known = self._announced_at | dict.fromkeys(taken, now)
        self._announced_at = {path.relay_address: known[path.relay_address] for path in relays}
        return relays

    async def _announce(self, reply: Reply) -> RelayedPath | None:
        try:
            answer = await self._node.rpc.request(
                reply.source,
                Command.ANNOUNCE,
                target=self._target,
                token=reply.token,
                value=lambda token: self._signed(NS_ANNOUNCE, reply.id, token),
            )
        except HyperDHTError:
            return None
        if answer.error:
            return None
        path = RelayedPath(reply.source, answer.to)
        self._use_early(path)
        return path

    def _use_early(self, path: RelayedPath) -> None:
        """Name a relay before the others have answered if there are too few: clients come through it already."""
        if len(self.relays) < RELAYS and all(other.relay_address != path.relay_address for other in self.relays):
            self._announced_at[path.relay_address] = asyncio.get_running_loop().time()
            self.relays += (path,)

    async def _unannounce(self, address: Address) -> None:
        try:
            reply = await self._node.rpc.request(address, Command.FIND_PEER, target=self._target, retries=1)
            if reply.token is not None and reply.id is not None and reply.value is not None:
                await self._node.rpc.request(
                    address,
                    Command.UNANNOUNCE,
                    target=self._target,
                    token=reply.token,
                    value=lambda token: self._signed(NS_UNANNOUNCE, reply.id, token),
                    retries=1,
                )
        except HyperDHTError:
            pass  # it will forget us by itself

    def _signed(self, namespace: bytes, node_id: bytes | None, token: bytes) -> bytes:
        signable = announce_signable(self._target, node_id or b"", token, self.record, None, namespace)
        return encode_announce(Announce(Peer(self._key_pair.public_key), signature=sign(self._key_pair, signable)))
