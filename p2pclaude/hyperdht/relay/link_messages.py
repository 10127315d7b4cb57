"""What a blind relay and its clients say to each other: link me with whoever names this token, or no longer (ring 1).

`mux` carries them on the channel that both sides open. Source: blind-relay lib/messages.js.
"""

from typing import NamedTuple

from ..encoding import Reader, fixed, uint


class RelayPair(NamedTuple):
    """Blind relay: link the stream `id` with whoever names the same `token`."""

    is_initiator: bool
    token: bytes
    id: int
    seq: int = 0


# Relay pair, blind-relay lib/messages.js: u8 flags: 1 initiator | 32 token | uint id | uint seq
def encode_relay_pair(message: RelayPair) -> bytes:
    """Encode a blind relay's pair message."""
    return bytes((message.is_initiator,)) + fixed(message.token, 32) + uint(message.id) + uint(message.seq)


def decode_relay_pair(data: bytes) -> RelayPair:
    """Decode a blind relay's pair message."""
    reader = Reader(data)
    return RelayPair(bool(reader.uint() & 1), reader.fixed(32), reader.stream_number(), reader.stream_number())


# Relay unpair: u8 flags, none in use | 32 token
def encode_relay_unpair(token: bytes) -> bytes:
    """Encode a blind relay's unpair message."""
    return b"\x00" + fixed(token, 32)


def decode_relay_unpair(data: bytes) -> bytes:
    """Decode a blind relay's unpair message and return its token."""
    reader = Reader(data)
    reader.uint()
    return reader.fixed(32)
