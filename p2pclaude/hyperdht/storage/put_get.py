"""Puts, gets and announcements: what the DHT's storage looks like from a client (ring 2).

Every call walks to the nodes closest to its target; what stores something then asks each of them with the token its
reply carried. Source: hyperdht index.js. Beyond it: a refused put raises, and a node that stores for others stores for
itself too, so that a network of one node works.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from ..constants import MAX_VALUE_BYTES, Command, ErrorCode
from ..crypto import NS_ANNOUNCE, NS_MUTABLE_PUT, NS_UNANNOUNCE, KeyPair, announce_signable, sign, verify
from ..crypto import hash as blake2b
from ..encoding import Address, uint
from ..errors import DecodeError, HyperDHTError, RemoteError, TooFewNodes
from ..node.node import Node
from ..node.query import Query
from ..rpc.messages import (
    Announce,
    MutableGetReply,
    MutablePut,
    Peer,
    decode_lookup_reply,
    decode_mutable_get_reply,
    decode_peer,
    encode_announce,
    encode_mutable_put,
    encode_mutable_signable,
    encode_peer,
)
from ..rpc.requests import Reply, Value
from .persistent import Persistent
from .records import LOOKUP_RECORDS, check_mutable_put


class MutableRecord(NamedTuple):
    """A value signed by the holder of a key, with its sequence number."""

    seq: int
    value: bytes


class LookupResult(NamedTuple):
    """What one node knows of a topic."""

    source: Address
    peers: tuple[Peer, ...]
    bump: int


class Storage:
    """The storage calls of one node."""

    def __init__(self, node: Node, own: Persistent) -> None:
        self._node = node
        self._own = own

    async def mutable_put(self, key_pair: KeyPair, value: bytes, seq: int) -> None:
        """Store a signed value on the nodes closest to the key.

        Raises ValueError for a value over `MAX_VALUE_BYTES`, RemoteError (SEQ_REUSED, SEQ_TOO_LOW) when a node holds a
        newer record or every node refused, TooFewNodes when there was none.
        """
        _check_size(value)
        target = blake2b(key_pair.public_key)
        signature = sign(key_pair, NS_MUTABLE_PUT + blake2b(encode_mutable_signable(seq, value)))
        put = MutablePut(key_pair.public_key, seq, value, signature)
        query = self._node.query(Command.MUTABLE_GET, target, value=uint(0))
        error = ErrorCode.NONE
        if not self._node.ephemeral:
            error = self._own.mutables.put(target, seq, value, signature, _now())
        refusers = await self._store(query, Command.MUTABLE_PUT, target, encode_mutable_put(put))
        # One node that holds a newer record is enough: readers will prefer that.
        errors = (error, *await asyncio.gather(*(self._conflict_at(refuser, target, put) for refuser in refusers)))
        if conflict := max(errors):
            raise RemoteError(conflict)

    async def _conflict_at(self, refuser: Address, target: bytes, put: MutablePut) -> ErrorCode:
        """Ask a node that refused a record for the one it prefers: its word alone would let it spoil every put."""
        try:
            reply = await self._node.rpc.request(refuser, Command.MUTABLE_GET, target=target, value=uint(put.seq))
        except HyperDHTError:
            return ErrorCode.NONE
        found = _valid_mutable(put.public_key, reply)
        stored = None if found is None else MutableGetReply(*found, b"")
        return check_mutable_put(stored, put.seq, put.value)

    async def mutable_get(self, public_key: bytes, seq: int, latest: bool) -> MutableRecord | None:
        """Return the newest valid record of a key (`latest`), or the first one found; None if there is none."""
        target = blake2b(public_key)
        best = self._own_mutable(target, seq)
        if best is not None and not latest:
            return best
        async with self._node.query(Command.MUTABLE_GET, target, value=uint(seq)) as query:
            async for reply in query:
                found = _valid_mutable(public_key, reply)
                if found is None or found.seq < seq or (best is not None and found.seq <= best.seq):
                    continue
                best = found
                if not latest:
                    break
        return best

    def _own_mutable(self, target: bytes, seq: int) -> MutableRecord | None:
        stored = None if self._node.ephemeral else self._own.mutables.get(target, seq, _now())
        return None if stored is None else MutableRecord(stored.seq, stored.value)

    async def immutable_put(self, value: bytes) -> bytes:
        """Store a value under its hash, which is returned. Raises as `mutable_put` does."""
        _check_size(value)
        target = blake2b(value)
        query = self._node.query(Command.IMMUTABLE_GET, target)
        if not self._node.ephemeral:
            self._own.immutables.put(target, value, _now())
        await self._store(query, Command.IMMUTABLE_PUT, target, value)
        return target

    async def immutable_get(self, target: bytes) -> bytes | None:
        """Return the value with that hash, None if no node has it."""
        own = None if self._node.ephemeral else self._own.immutables.get(target, _now())
        if own is not None:
            return own
        async with self._node.query(Command.IMMUTABLE_GET, target) as query:
            async for reply in query:
                if reply.value is not None and blake2b(reply.value) == target:
                    return reply.value
        return None

    async def lookup(self, target: bytes) -> AsyncIterator[LookupResult]:
        """Yield what each node on the way to a topic knows of it."""
        async with self._node.query(Command.LOOKUP, target) as query:
            async for reply in query:
                try:
                    found = None if not reply.value else decode_lookup_reply(reply.value)
                except DecodeError:
                    continue
                if found is not None:
                    yield LookupResult(reply.source, found.peers, found.bump)

    async def find_peer(self, public_key: bytes) -> AsyncIterator[Reply]:
        """Yield the reply of each node that can lead to a server."""
        async with self._node.query(Command.FIND_PEER, blake2b(public_key)) as query:
            async for reply in query:
                try:
                    if reply.value is not None and decode_peer(reply.value).public_key == public_key:
                        yield reply
                except DecodeError:
                    continue

    async def announce(self, target: bytes, key_pair: KeyPair, relay_addresses: tuple[Address, ...], bump: int) -> None:
        """Announce a key under a topic on the closest nodes. Raises TooFewNodes or the last RemoteError."""
        peer = Peer(key_pair.public_key, relay_addresses)

        def signed(reply: Reply) -> Value:
            return _announcement(key_pair, target, reply, peer, NS_ANNOUNCE, bump)

        await self._commit(self._node.query(Command.LOOKUP, target), Command.ANNOUNCE, target, signed)

    async def unannounce(self, target: bytes, key_pair: KeyPair) -> None:
        """Take an announcement back from every node on the way to the topic that shows it, and from this one."""
        self._own.forget(target, key_pair.public_key)
        peer = Peer(key_pair.public_key)
        holders = [
            reply
            async for reply in self._node.query(Command.LOOKUP, target)
            if reply.token is not None and _may_hold(reply, key_pair.public_key)
        ]
        await asyncio.gather(
            *(
                self._node.rpc.request(
                    reply.source,
                    Command.UNANNOUNCE,
                    target=target,
                    token=reply.token,
                    value=_announcement(key_pair, target, reply, peer, NS_UNANNOUNCE, 0),
                )
                for reply in holders
            ),
            return_exceptions=True,  # who does not answer now will forget it by itself
        )

    async def _store(self, query: Query, command: Command, target: bytes, value: bytes) -> list[Address]:
        """Store a value where a walk ends; give the nodes that refused it."""
        try:
            return await self._commit(query, command, target, lambda reply: value)
        except TooFewNodes:
            if self._node.ephemeral:
                raise
            return []

    async def _commit(
        self, query: Query, command: Command, target: bytes, value_of: Callable[[Reply], Value]
    ) -> list[Address]:
        refusers: list[Address] = []

        async def ask(reply: Reply) -> None:
            answer = await self._node.rpc.request(
                reply.source, command, target=target, value=value_of(reply), token=reply.token
            )
            if answer.error != ErrorCode.NONE:
                refusers.append(reply.source)
                raise RemoteError(answer.error)

        await query.commit(ask)
        return refusers


def _now() -> float:
    return asyncio.get_running_loop().time()


def _announcement(key_pair: KeyPair, target: bytes, reply: Reply, peer: Peer, namespace: bytes, bump: int) -> Value:
    def sign_for(token: bytes) -> bytes:
        signable = announce_signable(target, reply.id or b"", token, encode_peer(peer), None, namespace)
        return encode_announce(Announce(peer, signature=sign(key_pair, signable), bump=bump))

    return sign_for


def _may_hold(reply: Reply, public_key: bytes) -> bool:
    """Tell whether a LOOKUP reply shows the key, or is full and may have left it out."""
    try:
        peers = decode_lookup_reply(reply.value).peers if reply.value else ()
    except DecodeError:
        return False
    return len(peers) >= LOOKUP_RECORDS or any(peer.public_key == public_key for peer in peers)


def _valid_mutable(public_key: bytes, reply: Reply) -> MutableRecord | None:
    if not reply.value:
        return None
    try:
        found = decode_mutable_get_reply(reply.value)
    except DecodeError:
        return None
    signable = NS_MUTABLE_PUT + blake2b(encode_mutable_signable(found.seq, found.value))
    return MutableRecord(found.seq, found.value) if verify(public_key, signable, found.signature) else None


def _check_size(value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"a value of {len(value)} bytes; at most {MAX_VALUE_BYTES} fit a datagram on every path")
