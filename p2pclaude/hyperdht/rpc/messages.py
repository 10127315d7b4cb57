"""The DHT's messages: requests, responses and stored records (ring 1).

`endpoint` hands every datagram that is no UDX packet to `decode_message`. The values inside requests and responses
have codecs of their own here; those of the connection handshake stand in `peer.setup_messages`.
"""

import struct
from typing import NamedTuple

from ..constants import REQUEST_ID, RESPONSE_ID, ErrorCode
from ..crypto import hash as blake2b
from ..encoding import Address, Reader, array, buffer, fixed, ipv4, string, uint
from ..errors import DecodeError

MAX_CLOSER_NODES = 64  # upstream sends 20
MAX_LOOKUP_PEERS = 64  # upstream sends 20
MAX_RELAY_ADDRESSES = 16  # upstream sends 3

_TID = struct.Struct("<H")


def node_id(address: Address) -> bytes:
    """Return the id (32 bytes) of the DHT node at `address`: BLAKE2b-256 of its 6 encoded bytes."""
    return blake2b(ipv4(address))


class Request(NamedTuple):
    """A request datagram.

    `to` is the destination as the sender addressed it. `id` is set by persistent nodes only and must be checked
    against the datagram's source. `internal` tells `InternalCommand` from `Command`.
    """

    tid: int
    to: Address
    command: int
    internal: bool = False
    id: bytes | None = None
    token: bytes | None = None
    target: bytes | None = None
    value: bytes | None = None


class Response(NamedTuple):
    """A response datagram; `to` is the requester's address as the responder saw it."""

    tid: int
    to: Address
    id: bytes | None = None
    token: bytes | None = None
    closer_nodes: tuple[Address, ...] = ()
    error: int = ErrorCode.NONE
    value: bytes | None = None


# Request, dht-rpc lib/io.js:
#   u8 0x03 | u8 flags: 1 id, 2 token, 4 internal, 8 target, 16 value | u16 tid | ipv4 to
#   [32 id] [32 token] uint command [32 target] [buffer value]
def encode_request(request: Request) -> bytes:
    """Encode a request datagram."""
    flags = (
        (request.id is not None)
        | (request.token is not None) << 1
        | request.internal << 2
        | (request.target is not None) << 3
        | (request.value is not None) << 4
    )
    return b"".join(
        (
            bytes((REQUEST_ID, flags)),
            _TID.pack(request.tid),
            ipv4(request.to),
            _optional_fixed(request.id),
            _optional_fixed(request.token),
            uint(request.command),
            _optional_fixed(request.target),
            b"" if request.value is None else buffer(request.value),
        )
    )


# Response, dht-rpc lib/io.js:
#   u8 0x13 | u8 flags: 1 id, 2 token, 4 closer nodes, 8 error, 16 value | u16 tid | ipv4 to
#   [32 id] [32 token] [array(ipv4) closer nodes] [uint error] [buffer value]
def encode_response(response: Response) -> bytes:
    """Encode a response datagram; an empty list of nodes and error 0 are left out."""
    flags = (
        (response.id is not None)
        | (response.token is not None) << 1
        | bool(response.closer_nodes) << 2
        | (response.error != 0) << 3
        | (response.value is not None) << 4
    )
    return b"".join(
        (
            bytes((RESPONSE_ID, flags)),
            _TID.pack(response.tid),
            ipv4(response.to),
            _optional_fixed(response.id),
            _optional_fixed(response.token),
            array(response.closer_nodes, ipv4) if response.closer_nodes else b"",
            uint(response.error) if response.error else b"",
            b"" if response.value is None else buffer(response.value),
        )
    )


def _optional_fixed(data: bytes | None) -> bytes:
    return b"" if data is None else fixed(data, 32)


def decode_message(data: bytes) -> Request | Response:
    """Decode a request or response datagram; anything else raises `DecodeError`."""
    reader = Reader(data)
    kind = reader.uint8()
    if kind == REQUEST_ID:
        return _decode_request(reader)
    if kind == RESPONSE_ID:
        return _decode_response(reader)
    raise DecodeError("neither a request nor a response")


def _decode_request(reader: Reader) -> Request:
    flags = reader.uint()
    tid, to = reader.uint16(), reader.ipv4()
    node_id = reader.fixed(32) if flags & 1 else None
    token = reader.fixed(32) if flags & 2 else None
    command = reader.uint()
    target = reader.fixed(32) if flags & 8 else None
    value = reader.buffer() if flags & 16 else None
    return Request(tid, to, command, bool(flags & 4), node_id, token, target, value)


def _decode_response(reader: Reader) -> Response:
    flags = reader.uint()
    tid, to = reader.uint16(), reader.ipv4()
    node_id = reader.fixed(32) if flags & 1 else None
    token = reader.fixed(32) if flags & 2 else None
    closer = reader.array(reader.ipv4, MAX_CLOSER_NODES) if flags & 4 else ()
    error = reader.uint() if flags & 8 else 0
    value = reader.buffer() if flags & 16 else None
    return Response(tid, to, node_id, token, closer, error, value)


class Peer(NamedTuple):
    """Who serves under a public key, and over which DHT nodes it can be reached."""

    public_key: bytes
    relay_addresses: tuple[Address, ...] = ()


# Peer, hyperdht lib/messages.js: 32 public key | array(ipv4) relay addresses
def encode_peer(peer: Peer) -> bytes:
    """Encode a peer record."""
    return fixed(peer.public_key, 32) + array(peer.relay_addresses, ipv4)


def decode_peer(data: bytes) -> Peer:
    """Decode a peer record."""
    return _read_peer(Reader(data))


def _read_peer(reader: Reader) -> Peer:
    return Peer(reader.fixed(32), reader.array(reader.ipv4, MAX_RELAY_ADDRESSES))


class Announce(NamedTuple):
    """The value of ANNOUNCE and UNANNOUNCE; `bump` (ms since 1970) is outside of the signature."""

    peer: Peer | None = None
    refresh: bytes | None = None
    signature: bytes | None = None
    bump: int = 0


# Announce: uint flags: 1 peer, 2 refresh, 4 signature, 8 bump | [peer] [32 refresh] [64 signature] [uint bump]
def encode_announce(message: Announce) -> bytes:
    """Encode the value of an ANNOUNCE or UNANNOUNCE request."""
    flags = (
        (message.peer is not None)
        | (message.refresh is not None) << 1
        | (message.signature is not None) << 2
        | (message.bump != 0) << 3
    )
    return b"".join(
        (
            uint(flags),
            b"" if message.peer is None else encode_peer(message.peer),
            _optional_fixed(message.refresh),
            b"" if message.signature is None else fixed(message.signature, 64),
            uint(message.bump) if message.bump else b"",
        )
    )


def decode_announce(data: bytes) -> Announce:
    """Decode the value of an ANNOUNCE or UNANNOUNCE request."""
    reader = Reader(data)
    flags = reader.uint()
    return Announce(
        peer=_read_peer(reader) if flags & 1 else None,
        refresh=reader.fixed(32) if flags & 2 else None,
        signature=reader.fixed(64) if flags & 4 else None,
        bump=reader.uint() if flags & 8 else 0,
    )


class LookupReply(NamedTuple):
    """The value of a LOOKUP response."""

    peers: tuple[Peer, ...]
    bump: int = 0


# Lookup reply: uint count | that many peers, back to back, without lengths | uint bump (may be missing)
def encode_lookup_reply(reply: LookupReply) -> bytes:
    """Encode the value of a LOOKUP response."""
    return array(reply.peers, encode_peer) + uint(reply.bump)


def decode_lookup_reply(data: bytes) -> LookupReply:
    """Decode the value of a LOOKUP response."""
    reader = Reader(data)
    peers = reader.array(lambda: _read_peer(reader), MAX_LOOKUP_PEERS)
    return LookupReply(peers, reader.uint() if reader.remaining else 0)


class MutablePut(NamedTuple):
    """The value of a MUTABLE_PUT request."""

    public_key: bytes
    seq: int
    value: bytes
    signature: bytes


class MutableGetReply(NamedTuple):
    """The value of a MUTABLE_GET response."""

    seq: int
    value: bytes
    signature: bytes


# What a mutable record's signature covers, behind the namespace: uint seq | buffer value
def encode_mutable_signable(seq: int, value: bytes) -> bytes:
    """Encode the part of a mutable record that is hashed and signed."""
    return uint(seq) + buffer(value)


# Mutable put: 32 public key | uint seq | buffer value | 64 signature
def encode_mutable_put(put: MutablePut) -> bytes:
    """Encode the value of a MUTABLE_PUT request."""
    return fixed(put.public_key, 32) + uint(put.seq) + buffer(put.value) + fixed(put.signature, 64)


def decode_mutable_put(data: bytes) -> MutablePut:
    """Decode the value of a MUTABLE_PUT request."""
    reader = Reader(data)
    return MutablePut(reader.fixed(32), reader.uint(), reader.buffer(), reader.fixed(64))


# Mutable get reply: uint seq | buffer value | 64 signature
def encode_mutable_get_reply(reply: MutableGetReply) -> bytes:
    """Encode the value of a MUTABLE_GET response."""
    return uint(reply.seq) + buffer(reply.value) + fixed(reply.signature, 64)


def decode_mutable_get_reply(data: bytes) -> MutableGetReply:
    """Decode the value of a MUTABLE_GET response."""
    reader = Reader(data)
    return MutableGetReply(reader.uint(), reader.buffer(), reader.fixed(64))


class PluginRequest(NamedTuple):
    """The value of a PLUGIN request."""

    plugin: str
    version: int
    command: int
    value: bytes | None = None


# Plugin request: string plugin | uint version | uint command | uint flags: 1 value | [buffer value]
def encode_plugin_request(request: PluginRequest) -> bytes:
    """Encode the value of a PLUGIN request."""
    head = string(request.plugin) + uint(request.version) + uint(request.command)
    return head + (b"\x00" if request.value is None else b"\x01" + buffer(request.value))


def decode_plugin_request(data: bytes) -> PluginRequest:
    """Decode the value of a PLUGIN request."""
    reader = Reader(data)
    plugin, version, command = reader.string(), reader.uint(), reader.uint()
    return PluginRequest(plugin, version, command, reader.buffer() if reader.uint() & 1 else None)


class PeerAddress(NamedTuple):
    """A public key with DHT nodes that may know it: what a shared link can carry."""

    public_key: bytes
    nodes: tuple[Address, ...] = ()


# Peer address, npm hyperdht-address: 32 public key | uint flags: 1 nodes (all of it may be missing) | [array(ipv4)]
def encode_peer_address(address: PeerAddress) -> bytes:
    """Encode a public key with DHT nodes."""
    head = fixed(address.public_key, 32)
    return head + (b"\x01" + array(address.nodes, ipv4) if address.nodes else b"\x00")


def decode_peer_address(data: bytes) -> PeerAddress:
    """Decode a public key alone or one with DHT nodes."""
    reader = Reader(data)
    key = reader.fixed(32)
    flags = reader.uint() if reader.remaining else 0
    return PeerAddress(key, reader.array(reader.ipv4, MAX_RELAY_ADDRESSES) if flags & 1 else ())
