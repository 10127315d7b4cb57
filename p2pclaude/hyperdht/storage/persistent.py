"""What a persistent node stores and answers for the network (ring 2): announcements, topics, values.

`dht` hands over the commands FIND_PEER to IMMUTABLE_GET. Signatures are checked here, the stores are in `records`,
announced servers go to the router, which also relays to them. Requests that are malformed or wrongly signed get no
answer. Source: hyperdht lib/persistent.js.
"""

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from ..constants import Command, ErrorCode
from ..crypto import NS_ANNOUNCE, NS_MUTABLE_PUT, NS_UNANNOUNCE, announce_signable, hash, verify
from ..encoding import Address, Reader, uint
from ..errors import DecodeError
from ..node.budget import VerifyBudget
from ..node.forwards import Forward
from ..rpc.messages import (
    Announce,
    MutablePut,
    Peer,
    decode_announce,
    decode_mutable_put,
    encode_mutable_get_reply,
    encode_mutable_signable,
    encode_peer,
)
from ..rpc.requests import IncomingRequest
from .records import LOOKUP_RECORDS, ImmutableStore, MutableStore, RecordStore, Refresh, RefreshStore

if TYPE_CHECKING:
    from ..node.node import Node

MAX_STORED_RELAYS: Final = 3


class ForwardTable(Protocol):
    """The router, as far as storage needs it: who serves under a target, and through which address."""

    def get(self, target: bytes, now: float) -> Forward | None:
        """Return what is known of a target."""

    def set(self, target: bytes, relay: Address, record: bytes, now: float) -> object:
        """Store an announcement that came from `relay`."""

    def remove(self, target: bytes) -> object:
        """Forget an announcement."""


class Persistent:
    """The storage commands on one node; an ephemeral node serves none of them."""

    def __init__(
        self, node: "Node", router: ForwardTable, rng: random.Random, *, wall: Callable[[], float] = time.time
    ) -> None:
        self.records = RecordStore()
        self.refreshes = RefreshStore()
        self.mutables = MutableStore()
        self.immutables = ImmutableStore()
        self._node = node
        self._router = router
        self._rng = rng
        self._wall = wall
        self._budget = VerifyBudget()
        self._handlers: dict[int, Callable[[IncomingRequest, bytes, float], None]] = {
            Command.FIND_PEER: self._find_peer,
            Command.LOOKUP: self._lookup,
            Command.ANNOUNCE: self._announce,
            Command.UNANNOUNCE: self._unannounce,
            Command.MUTABLE_PUT: self._mutable_put,
            Command.MUTABLE_GET: self._mutable_get,
            Command.IMMUTABLE_PUT: self._immutable_put,
            Command.IMMUTABLE_GET: self._immutable_get,
        }

    def handle(self, request: IncomingRequest) -> bool:
        """Serve one request; False if it is no storage command, or this node stores nothing."""
        handler = self._handlers.get(request.command)
        if handler is None or self._node.ephemeral:
            return False
        if request.target is not None:
            try:
                handler(request, request.target, asyncio.get_running_loop().time())
            except DecodeError:
                pass
        return True

    def _find_peer(self, request: IncomingRequest, target: bytes, now: float) -> None:
        forward = self._router.get(target, now)
        request.reply(None if forward is None else forward.record)

    # Reply: uint count | that many encoded peers, back to back | uint bump
    def _lookup(self, request: IncomingRequest, target: bytes, now: float) -> None:
        records = self.records.get(target, LOOKUP_RECORDS, self._rng, now)
        forward = self._router.get(target, now)
        if forward is not None and len(records) < LOOKUP_RECORDS:
            records.append(forward.record)
        if not records:
            request.reply(None)
            return
        request.reply(uint(len(records)) + b"".join(records) + uint(self.records.bump(target, now)))

    def _announce(self, request: IncomingRequest, target: bytes, now: float) -> None:
        message = decode_announce(request.value or b"")
        if message.peer is None:
            self._refresh(request, message.refresh, now)
            return
        if not self._is_signed(request, target, message, message.peer, NS_ANNOUNCE, now):
            return
        peer = Peer(message.peer.public_key, message.peer.relay_addresses[:MAX_STORED_RELAYS])
        record, announces_self = encode_peer(peer), hash(peer.public_key) == target
        if not announces_self and message.bump:
            self.records.set_bump(target, message.bump, now, int(self._wall() * 1000))
        self._store(target, record, announces_self, request.source, now)
        if message.refresh is not None:
            self.refreshes.add(message.refresh, Refresh(target, record, announces_self), now)
        _acknowledge(request)

    def _store(self, target: bytes, record: bytes, announces_self: bool, source: Address, now: float) -> None:
        if announces_self:
            # Handshakes reach the server through the address its announcement came from.
            self._router.set(target, source, record, now)
        else:
            self.records.add(target, record[:32], record, now)

    def _refresh(self, request: IncomingRequest, preimage: bytes | None, now: float) -> None:
        if preimage is None or request.token is None:
            return
        stored = self.refreshes.redeem(preimage, now)
        if stored is not None:
            self._store(stored.target, stored.record, stored.announce_self, request.source, now)
            _acknowledge(request)

    def _unannounce(self, request: IncomingRequest, target: bytes, now: float) -> None:
        message = decode_announce(request.value or b"")
        if message.peer is None or not self._is_signed(request, target, message, message.peer, NS_UNANNOUNCE, now):
            return
        self.forget(target, message.peer.public_key)
        _acknowledge(request)

    def forget(self, target: bytes, public_key: bytes) -> None:
        """Forget who announced itself under a target with that key."""
        if hash(public_key) == target:
            self._router.remove(target)
        self.records.remove(target, public_key)

    def _is_signed(
        self, request: IncomingRequest, target: bytes, message: Announce, peer: Peer, namespace: bytes, now: float
    ) -> bool:
        own_id = self._node.id
        if request.token is None or own_id is None or message.signature is None:
            return False
        if not self._budget.take(request.source[0], now):
            return False
        signable = announce_signable(target, own_id, request.token, encode_peer(peer), message.refresh, namespace)
        return verify(peer.public_key, signable, message.signature)

    def _mutable_put(self, request: IncomingRequest, target: bytes, now: float) -> None:
        if request.token is None or request.value is None:
            return
        put = decode_mutable_put(request.value)
        if hash(put.public_key) != target or not self._is_signed_value(request, put, now):
            return
        error = self.mutables.put(target, put.seq, put.value, put.signature, now)
        if error == ErrorCode.NONE:
            request.reply(None)
        else:
            request.error(error)

    def _is_signed_value(self, request: IncomingRequest, put: MutablePut, now: float) -> bool:
        if not self._budget.take(request.source[0], now):
            return False
        signable = NS_MUTABLE_PUT + hash(encode_mutable_signable(put.seq, put.value))
        return verify(put.public_key, signable, put.signature)

    # Request value: uint, the lowest sequence number of interest.
    def _mutable_get(self, request: IncomingRequest, target: bytes, now: float) -> None:
        if request.value is None:
            return
        stored = self.mutables.get(target, Reader(request.value).uint(), now)
        request.reply(None if stored is None else encode_mutable_get_reply(stored))

    def _immutable_put(self, request: IncomingRequest, target: bytes, now: float) -> None:
        if request.token is None or request.value is None:
            return
        if self.immutables.put(target, request.value, now):
            request.reply(None)

    def _immutable_get(self, request: IncomingRequest, target: bytes, now: float) -> None:
        request.reply(self.immutables.get(target, now))


def _acknowledge(request: IncomingRequest) -> None:
    request.reply(None, token=False, closer_nodes=False)
