"""A client's handshake: through nodes that know the server, or with the server itself (ring 2).

`dial` makes a `Handshaking` for each attempt. The same Noise message goes to the nodes remembered from before and to
those a search finds, all at once; the first valid answer wins. A server at a remembered address answers by itself, one
round trip away. Source: hyperdht lib/connect.js.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from ..constants import Command, HandshakeError, Mode
from ..crypto import hash as blake2b
from ..encoding import Address
from ..errors import (
    DecodeError,
    Destroyed,
    HandshakeFailed,
    HyperDHTError,
    PeerConnectionFailed,
    PeerNotFound,
    Suspended,
    Timeout,
    TooFewNodes,
)
from ..net.sockets import Socket
from ..node.node import Node
from ..node.query import Query
from ..rpc.messages import decode_peer
from ..rpc.requests import RELAYED_RETRIES, Reply
from ..secure.noise import NoiseIK
from ..tasks import cancel_all
from .setup_messages import Handshake, NoisePayload, decode_handshake, decode_noise_payload, encode_handshake

PARALLEL_HANDSHAKES: Final = 3
MAX_HINTS: Final = 8  # nodes remembered, asked beside those
HINT_GRACE: Final = 1.0  # seconds for a remembered node to answer when the search found nobody
HANDSHAKES: Final = 3  # through all relays, while answers get lost
LOOKUPS: Final = 3  # while answers get lost
ENOUGH_RELAYS: Final = 3  # as many as a server has
ENOUGH_SILENCE: Final = 2  # walks that nobody answered, times the nodes asked: then there is no network


class Shaken(NamedTuple):
    """A handshake that is through."""

    noise: NoiseIK
    payload: NoisePayload
    relay_address: Address
    server_address: Address
    client_address: Address
    socket: Socket

    @property
    def relayed(self) -> bool:
        """Whether another node passed the handshake on."""
        return self.server_address != self.relay_address


class RelaySearch:
    """Finds the nodes that know a peer; the search begins with the first `next`."""

    def __init__(self, node: Node, target: bytes) -> None:
        self._node = node
        self._target = target
        self._found: set[Address] = set()
        self._lookups = 1
        self._silence = 0
        self._query = self._look_up()

    @property
    def is_lossy(self) -> bool:
        """Whether an answer of the last lookup got lost."""
        return self._query.resends > 0

    @property
    def is_in_vain(self) -> bool:
        """Whether there were nodes to ask, and none of them answered the last lookup."""
        return len(self._node.bootstrap) > 0 and not self._query.was_answered

    def _look_up(self) -> Query:
        return self._node.query(Command.FIND_PEER, self._target, retries=3)

    async def next(self) -> Address | None:
        """Return another node that knows the peer, None when there is none.

        Looks again when answers got lost: nodes that know the peer are few, and theirs may be among them.
        """
        while True:
            async for reply in self._query:
                if self._names_peer(reply) and reply.source not in self._found:
                    self._found.add(reply.source)
                    return reply.source
            if not self._query.was_answered:
                self._silence += self._query.errors
            if not self._query.resends or len(self._found) >= ENOUGH_RELAYS:
                return None
            if self._lookups == LOOKUPS or self._silence >= ENOUGH_SILENCE:
                return None
            self._lookups += 1
            self._query = self._look_up()

    def _names_peer(self, reply: Reply) -> bool:
        # A node that lies would hold one of the few places for handshakes; the key is unknown to who has only its hash.
        try:
            return reply.value is not None and blake2b(decode_peer(reply.value).public_key) == self._target
        except DecodeError:
            return False

    def cancel(self) -> None:
        """End the search."""
        self._query.cancel()


class Handshaking:
    """One Noise message on all its ways; `run` it once.

    `hints` are nodes that may know the server, or be it; those in `avoid` are asked when no other is to be had.
    """

    def __init__(
        self, node: Node, public_key: bytes, noise: NoiseIK, hints: Sequence[Address], avoid: set[Address]
    ) -> None:
        self._node = node
        self._target = blake2b(public_key)
        self._noise = noise
        self._avoid = avoid
        self._message = b""
        self._hints = hints
        self._tried: set[Address] = set()
        self._waiting: list[Address] = []
        self._running: dict[Address, asyncio.Task[Shaken]] = {}  # in order, so that a simulation replays
        self._hinted: dict[Address, asyncio.Task[Shaken]] = {}
        self._finding: asyncio.Task[Address | None] | None = None
        self._failures: list[HyperDHTError] = []
        self._refusals: list[HandshakeFailed] = []

    async def run(self, payload: bytes) -> Shaken:
        """Return the first valid handshake.

        Raises HandshakeFailed, PeerConnectionFailed, PeerNotFound, or TooFewNodes if no node answers at all.
        """
        self._message = self._noise.write_message(payload)
        for _ in range(HANDSHAKES):
            search = RelaySearch(self._node, self._target)
            if (shaken := await self._ask_all(search)) is not None:
                return shaken
            failures = self._failures
            if not search.is_lossy or not failures or not all(isinstance(failure, Timeout) for failure in failures):
                break
        if self._refusals:
            raise self._refusals[0]
        if self._failures:
            raise PeerConnectionFailed("the peer is announced but did not answer its handshake") from self._failures[-1]
        if search.is_in_vain:
            raise TooFewNodes("no node of the DHT answers")
        raise PeerNotFound("no node of the DHT knows the peer")

    async def _ask_all(self, search: RelaySearch) -> Shaken | None:
        """Shake hands with all hints, and through all that a search finds."""
        self._tried.clear()
        fresh = [address for address in dict.fromkeys(self._hints) if address not in self._avoid]
        self._waiting = [*fresh[MAX_HINTS:], *(address for address in self._hints if address in self._avoid)]
        self._hinted = {address: self._begin(address) for address in fresh[:MAX_HINTS]}
        self._finding = asyncio.create_task(search.next())
        try:
            return await self._race(search)
        finally:
            search.cancel()
            finding = () if self._finding is None else (self._finding,)
            cancel_all((*self._hinted.values(), *self._running.values(), *finding))
            self._running = {}

    async def _race(self, search: RelaySearch) -> Shaken | None:
        """Shake hands with all hints and with found nodes, a few of these at a time, until one succeeds."""
        while True:
            self._ask_waiting()
            found = [*self._running.values(), *(() if self._finding is None else (self._finding,))]
            pending = [*self._hinted.values(), *found]
            if not pending:
                return None
            done, _ = await asyncio.wait(
                pending, return_when=asyncio.FIRST_COMPLETED, timeout=None if found else HINT_GRACE
            )
            if not done:
                return None
            if self._finding is not None and self._finding.done():
                self._take_found(search, self._finding.result())
            shaken = self._take_done(self._hinted) or self._take_done(self._running)
            if shaken is not None:
                return shaken

    def _ask_waiting(self) -> None:
        # A relay that led nowhere before is asked when no other one is to be had.
        waiting = self._waiting
        while waiting and len(self._running) < PARALLEL_HANDSHAKES:
            if waiting[0] in self._avoid and self._finding is not None:
                return
            relay = waiting.pop(0)
            if relay in self._hinted:  # it is no mere hint any more
                self._running[relay] = self._hinted.pop(relay)
            elif relay not in self._tried:
                self._running[relay] = self._begin(relay)

    def _begin(self, relay: Address) -> asyncio.Task[Shaken]:
        self._tried.add(relay)
        return asyncio.create_task(self._shake_hands_through(relay))

    def _take_found(self, search: RelaySearch, found: Address | None) -> None:
        if found is None:
            self._finding = None
            return
        self._finding = asyncio.create_task(search.next())
        self._waiting.append(found)
        self._waiting.sort(key=self._avoid.__contains__)

    def _take_done(self, tasks: dict[Address, asyncio.Task[Shaken]]) -> Shaken | None:
        """Return a handshake that is through; what has failed is taken out. A hint that fails was only old."""
        for relay, task in [(relay, task) for relay, task in tasks.items() if task.done()]:
            del tasks[relay]
            if (error := task.exception()) is None:
                return task.result()
            if isinstance(error, Suspended | Destroyed) or not isinstance(error, HyperDHTError):
                raise error
            if isinstance(error, HandshakeFailed):
                self._refusals.append(error)
            if tasks is self._running:
                self._failures.append(error)
            else:
                self._tried.discard(relay)  # it may be found yet
        return None

    async def _shake_hands_through(self, relay: Address) -> Shaken:
        reply = await self._node.rpc.request(
            relay,
            Command.PEER_HANDSHAKE,
            target=self._target,
            value=encode_handshake(Handshake(Mode.FROM_CLIENT, self._message)),
            retries=RELAYED_RETRIES,
        )
        try:
            answer = decode_handshake(reply.value or b"")
            if answer.mode != Mode.REPLY:
                raise DecodeError("not a handshake's reply")
            noise = self._noise.copy()  # a bad reply must not spoil the attempt for the good one
            payload = decode_noise_payload(noise.read_message(answer.noise))
        except DecodeError as error:
            raise PeerConnectionFailed("a node brought back no valid handshake") from error
        if payload.version != 1:
            raise HandshakeFailed(f"the peer speaks version {payload.version} of the handshake")
        if payload.error != HandshakeError.NONE or payload.udx is None:
            raise HandshakeFailed(f"the peer refused the handshake (error {payload.error})")
        return Shaken(noise, payload, relay, answer.peer_address or relay, reply.to, reply.socket)
