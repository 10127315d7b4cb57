"""Protomux frames: several channels over one secret stream, as blind relays speak it (ring 1).

`mux` puts the bytes made here into secret-stream messages and reads the peer's with `decode_frames`. Which side may
use which channel number is for the session to know; here stands the format. Source: protomux index.js.

A channel number is always that of the sender. Numbers from 1 on carry messages; 0 carries what is listed below.
"""

from dataclasses import dataclass
from typing import Final

from ..encoding import Reader, buffer, string, uint
from ..errors import DecodeError

MAX_BATCH: Final = 4096  # messages in one batch; replies to a blind relay's messages are batches of a few
MAX_PROTOCOL_BYTES: Final = 256
_BATCH, _OPEN, _REJECT, _CLOSE = range(4)


@dataclass(frozen=True, slots=True)
class ChannelOpen:
    """The sender opens its channel `id` (1 or more) for a protocol; `channel_id` tells channels of one apart."""

    id: int
    protocol: str
    channel_id: bytes | None = None
    handshake: bytes = b""


@dataclass(frozen=True, slots=True)
class ChannelReject:
    """The sender does not open the channel that the receiver opened as `id`."""

    id: int


@dataclass(frozen=True, slots=True)
class ChannelClose:
    """The sender closes its channel `id`."""

    id: int


@dataclass(frozen=True, slots=True)
class ChannelMessage:
    """A message of the sender's channel `id`; `type` counts the message kinds of the channel's protocol."""

    id: int
    type: int
    payload: bytes


Frame = ChannelOpen | ChannelReject | ChannelClose | ChannelMessage


# Open: 00 01 | uint id | string protocol | buffer channel id (empty: none) | handshake (the rest)
# Reject: 00 02 | uint id      Close: 00 03 | uint id      Message: uint id | uint type | payload (the rest)
def encode_frame(frame: Frame) -> bytes:
    """Encode one frame: the contents of one secret-stream message."""
    match frame:
        case ChannelOpen(id, protocol, channel_id, handshake):
            return bytes((0, _OPEN)) + uint(id) + string(protocol) + buffer(channel_id or b"") + handshake
        case ChannelReject(id):
            return bytes((0, _REJECT)) + uint(id)
        case ChannelClose(id):
            return bytes((0, _CLOSE)) + uint(id)
        case ChannelMessage(id, kind, payload):
            return uint(id) + uint(kind) + payload


def decode_frames(data: bytes) -> list[Frame]:
    """Decode one secret-stream message: mostly one frame, none if it is empty or of an unknown kind, or a batch.

    Raises DecodeError for what is cut short, and for a batch inside a batch.
    """
    if not data:
        return []
    reader = Reader(data)
    channel, kind = reader.uint(), reader.uint()
    if channel == 0 and kind == _BATCH:
        return _decode_batch(reader)
    return _decode_one(channel, kind, reader)


# Batch: 00 00 | uint channel | any number of: buffer (uint type | payload), or 00 | uint other channel
def _decode_batch(reader: Reader) -> list[Frame]:
    frames: list[Frame] = []
    channel = reader.uint()
    while reader.remaining:
        inner = Reader(reader.buffer())
        if not inner.remaining:
            channel = reader.uint()
            continue
        kind = inner.uint()
        if (channel == 0 and kind == _BATCH) or len(frames) >= MAX_BATCH:
            raise DecodeError("a batch that is too large or holds another")
        frames += _decode_one(channel, kind, inner)
    return frames


def _decode_one(channel: int, kind: int, reader: Reader) -> list[Frame]:
    if channel > 0:
        return [ChannelMessage(channel, kind, reader.rest())]
    if kind == _OPEN:
        return [_decode_open(reader)]
    if kind == _REJECT:
        return [ChannelReject(reader.uint())]
    return [ChannelClose(reader.uint())] if kind == _CLOSE else []


def _decode_open(reader: Reader) -> ChannelOpen:
    id, protocol = reader.uint(), reader.string()
    if len(protocol) > MAX_PROTOCOL_BYTES:
        raise DecodeError("the name of a protocol is too long")
    return ChannelOpen(id, protocol, reader.buffer() or None, reader.rest())
