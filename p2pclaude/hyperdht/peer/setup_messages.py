"""The messages that set up a connection: handshakes and rounds of hole punching (ring 1).

They are the values of PEER_HANDSHAKE and PEER_HOLEPUNCH requests, and what is encrypted inside of those. Source:
hyperdht lib/messages.js.
"""

from typing import NamedTuple

from ..constants import Firewall, HandshakeError, Mode
from ..encoding import Address, Reader, array, buffer, fixed, ipv4, ipv6, uint
from ..errors import DecodeError
from ..rpc.messages import MAX_RELAY_ADDRESSES

MAX_ADDRESSES = 256  # upstream names every interface of a host; a datagram has no room for more
VERSION = 1


class Handshake(NamedTuple):
    """The value of PEER_HANDSHAKE: a Noise message on one leg of its way."""

    mode: int
    noise: bytes
    peer_address: Address | None = None
    relay_address: Address | None = None


# Handshake: uint flags: 1 peer address, 2 relay address | uint mode | buffer noise | [ipv4 peer] [ipv4 relay]
def encode_handshake(message: Handshake) -> bytes:
    """Encode the value of PEER_HANDSHAKE."""
    flags = (message.peer_address is not None) | (message.relay_address is not None) << 1
    return (
        uint(flags)
        + uint(message.mode)
        + buffer(message.noise)
        + _optional_ipv4(message.peer_address)
        + _optional_ipv4(message.relay_address)
    )


def _optional_ipv4(address: Address | None) -> bytes:
    return b"" if address is None else ipv4(address)


def decode_handshake(data: bytes) -> Handshake:
    """Decode the value of PEER_HANDSHAKE."""
    reader = Reader(data)
    flags, mode, noise = reader.uint(), _mode(reader), reader.buffer()
    peer = reader.ipv4() if flags & 1 else None
    return Handshake(mode, noise, peer, reader.ipv4() if flags & 2 else None)


def _mode(reader: Reader) -> int:
    mode = reader.uint()
    if mode > Mode.REPLY:
        raise DecodeError(f"unknown mode {mode}")
    return mode


class RelayedPath(NamedTuple):
    """A relay the server announced itself to, and the server's address as that relay sees it."""

    relay_address: Address
    peer_address: Address


class HolepunchInfo(NamedTuple):
    """How to reach the server for hole punching: its slot's id and the relays."""

    id: int
    relays: tuple[RelayedPath, ...]


class UdxInfo(NamedTuple):
    """The sender's end of the stream to come."""

    reusable_socket: bool
    id: int
    seq: int = 0


class RelayThrough(NamedTuple):
    """A blind relay to meet at, and the token to meet under."""

    public_key: bytes
    token: bytes


class NoisePayload(NamedTuple):
    """What a handshake's Noise message carries; with another `version` than 1 nothing else is set."""

    error: int = HandshakeError.NONE
    firewall: int = Firewall.UNKNOWN
    holepunch: HolepunchInfo | None = None
    addresses4: tuple[Address, ...] = ()
    addresses6: tuple[Address, ...] = ()
    udx: UdxInfo | None = None
    secret_stream: bool = False
    relay_through: RelayThrough | None = None
    relay_addresses: tuple[Address, ...] | None = None
    version: int = VERSION


# Noise payload: uint version=1 | uint flags | uint error | uint firewall, then by flag
#   1 holepunch: uint id | array(ipv4 relay, ipv4 peer)    2 addresses4: array(ipv4)    4 addresses6: array(ipv6)
#   8 udx: uint version | uint features: 1 reusable socket | uint id | uint seq          16 secret stream: uint version
#   32 relay through: uint version | uint flags | 32 public key | 32 token               64 relay addresses: array(ipv4)
def encode_noise_payload(payload: NoisePayload) -> bytes:
    """Encode what goes into a handshake's Noise message."""
    parts = [b"", uint(payload.error), uint(payload.firewall)]
    flags = 0
    if payload.holepunch is not None:
        flags |= 1
        parts.append(uint(payload.holepunch.id) + array(payload.holepunch.relays, _encode_relayed_path))
    if payload.addresses4:
        flags |= 2
        parts.append(array(payload.addresses4, ipv4))
    if payload.addresses6:
        flags |= 4
        parts.append(array(payload.addresses6, ipv6))
    if payload.udx is not None:
        flags |= 8
        udx = payload.udx
        parts.append(b"".join((uint(1), uint(udx.reusable_socket), uint(udx.id), uint(udx.seq))))
    if payload.secret_stream:
        flags |= 16
        parts.append(uint(1))
    if payload.relay_through is not None:
        flags |= 32
        through = payload.relay_through
        parts.append(uint(1) + uint(0) + fixed(through.public_key, 32) + fixed(through.token, 32))
    if payload.relay_addresses is not None:
        flags |= 64
        parts.append(array(payload.relay_addresses, ipv4))
    parts[0] = uint(payload.version) + uint(flags)
    return b"".join(parts)


def _encode_relayed_path(path: RelayedPath) -> bytes:
    return ipv4(path.relay_address) + ipv4(path.peer_address)


def decode_noise_payload(data: bytes) -> NoisePayload:
    """Decode what a handshake's Noise message carries."""
    reader = Reader(data)
    version = reader.uint()
    if version != VERSION:
        return NoisePayload(version=version)
    flags, error, firewall = reader.uint(), reader.uint(), reader.uint()
    return NoisePayload(
        error=error,
        firewall=firewall,
        holepunch=_read_holepunch_info(reader) if flags & 1 else None,
        addresses4=reader.array(reader.ipv4, MAX_ADDRESSES) if flags & 2 else (),
        addresses6=reader.array(reader.ipv6, MAX_ADDRESSES) if flags & 4 else (),
        udx=_read_udx(reader) if flags & 8 else None,
        secret_stream=flags & 16 != 0 and reader.uint() > 0,
        relay_through=_read_relay_through(reader) if flags & 32 else None,
        relay_addresses=reader.array(reader.ipv4, MAX_RELAY_ADDRESSES) if flags & 64 else None,
    )


def _read_holepunch_info(reader: Reader) -> HolepunchInfo:
    holepunch_id = reader.uint()
    return HolepunchInfo(
        holepunch_id,
        reader.array(lambda: RelayedPath(reader.ipv4(), reader.ipv4()), MAX_RELAY_ADDRESSES),
    )


def _read_udx(reader: Reader) -> UdxInfo:
    reader.uint()  # version: upstream reads it and goes on
    return UdxInfo(bool(reader.uint() & 1), reader.stream_number(), reader.stream_number())


def _read_relay_through(reader: Reader) -> RelayThrough:
    reader.uint()  # version
    reader.uint()  # flags
    return RelayThrough(reader.fixed(32), reader.fixed(32))


class Holepunch(NamedTuple):
    """The value of PEER_HOLEPUNCH: an encrypted `HolepunchPayload` on one leg of its way."""

    mode: int
    id: int
    payload: bytes
    peer_address: Address | None = None


# Holepunch: uint flags: 1 peer address | uint mode | uint id | buffer payload | [ipv4 peer]
def encode_holepunch(message: Holepunch) -> bytes:
    """Encode the value of PEER_HOLEPUNCH."""
    flags = uint(message.peer_address is not None)
    head = flags + uint(message.mode) + uint(message.id)
    return head + buffer(message.payload) + _optional_ipv4(message.peer_address)


def decode_holepunch(data: bytes) -> Holepunch:
    """Decode the value of PEER_HOLEPUNCH."""
    reader = Reader(data)
    flags, mode = reader.uint(), _mode(reader)
    return Holepunch(mode, reader.uint(), reader.buffer(), reader.ipv4() if flags & 1 else None)


class HolepunchPayload(NamedTuple):
    """One round of hole punching: what a side knows of its own NAT and of the other's address."""

    error: int = HandshakeError.NONE
    firewall: int = Firewall.UNKNOWN
    round: int = 0
    connected: bool = False
    punching: bool = False
    addresses: tuple[Address, ...] | None = None
    remote_address: Address | None = None
    token: bytes | None = None
    remote_token: bytes | None = None


# Holepunch payload: uint flags: 1 connected, 2 punching (no bytes of their own), 4 addresses, 8 remote address,
#   16 token, 32 remote token | uint error | uint firewall | uint round
#   [array(ipv4) addresses] [ipv4 remote address] [32 token] [32 remote token]
def encode_holepunch_payload(payload: HolepunchPayload) -> bytes:
    """Encode the plaintext of a hole punching round."""
    flags = (
        payload.connected
        | payload.punching << 1
        | (payload.addresses is not None) << 2
        | (payload.remote_address is not None) << 3
        | (payload.token is not None) << 4
        | (payload.remote_token is not None) << 5
    )
    return b"".join(
        (
            uint(flags),
            uint(payload.error),
            uint(payload.firewall),
            uint(payload.round),
            b"" if payload.addresses is None else array(payload.addresses, ipv4),
            _optional_ipv4(payload.remote_address),
            b"" if payload.token is None else fixed(payload.token, 32),
            b"" if payload.remote_token is None else fixed(payload.remote_token, 32),
        )
    )


def decode_holepunch_payload(data: bytes) -> HolepunchPayload:
    """Decode the plaintext of a hole punching round."""
    reader = Reader(data)
    flags, error, firewall, number = reader.uint(), reader.uint(), reader.uint(), reader.uint()
    return HolepunchPayload(
        error=error,
        firewall=firewall,
        round=number,
        connected=bool(flags & 1),
        punching=bool(flags & 2),
        addresses=reader.array(reader.ipv4, MAX_ADDRESSES) if flags & 4 else None,
        remote_address=reader.ipv4() if flags & 8 else None,
        token=reader.fixed(32) if flags & 16 else None,
        remote_token=reader.fixed(32) if flags & 32 else None,
    )
