"""UDX packets on the wire: the header, selective acknowledgements and cheap demultiplexing (ring 1).

`streams` finds a packet's stream with `local_id_of`; `stream` unpacks headers in its receive loop with `HEADER`
directly; everything else goes through the functions here.

Layout, little-endian (libudx include/udx.h and src/udx.c, `udx_write_header`):

    0   u8   ff           magic
    1   u8   01           version
    2   u8   type         `PacketType` bits; 0 is a bare acknowledgement
    3   u8   data offset  bytes between header and payload: padding of an MTU probe, or the length of the SACK ranges
    4   u32  stream id    the receiver's
    8   u32  window       bytes the sender of this packet is willing to buffer beyond `ack`
    12  u32  seq          of this packet; packets are counted, not bytes
    16  u32  ack          the next seq expected
    20  ...  SACK ranges or padding, then payload

A SACK range is u32 start, u32 end (exclusive). With the SACK bit the ranges fill `data offset` bytes if that is more
than zero and less than all there is, else everything after the header: that is how libudx sends and reads them.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..constants import PacketType
from ..errors import DecodeError

HEADER: Final = struct.Struct("<HBBIIII")
HEADER_BYTES: Final = 20
PREFIX: Final = b"\xff\x01"  # magic and version
MAGIC: Final = 0x01FF  # the same, read as one little-endian number
OVERHEAD_BYTES: Final = 48  # IPv4, UDP and UDX headers: what an MTU loses before payload; libudx UDX_IPV4_HEADER_SIZE
DATAGRAM_OVERHEAD_BYTES: Final = 28  # IPv4 and UDP headers
MAX_PADDING: Final = 255  # data offset is one byte
SEQ_MASK: Final = 0xFFFFFFFF

# Plain ints for the hot path: IntFlag arithmetic is many times slower.
DATA: Final = int(PacketType.DATA)
END: Final = int(PacketType.END)
SACK: Final = int(PacketType.SACK)
MESSAGE: Final = int(PacketType.MESSAGE)
DESTROY: Final = int(PacketType.DESTROY)
HEARTBEAT: Final = int(PacketType.HEARTBEAT)

_RANGE = struct.Struct("<II")
_ID = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Header:
    """A decoded packet header; numbers as they stand on the wire."""

    type: PacketType
    data_offset: int
    stream_id: int
    window: int
    seq: int
    ack: int


def encode_header(header: Header) -> bytes:
    """Encode a header, 20 bytes."""
    return HEADER.pack(MAGIC, header.type, header.data_offset, header.stream_id, header.window, header.seq, header.ack)


def decode_header(data: bytes) -> Header:
    """Decode the header in front of a packet; raises `DecodeError`."""
    if len(data) < HEADER_BYTES:
        raise DecodeError("a UDX packet has at least 20 bytes")
    magic, kind, offset, stream_id, window, seq, ack = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DecodeError("not a UDX packet")
    if not kind & SACK and offset > len(data) - HEADER_BYTES:
        raise DecodeError("the data offset points behind the packet")
    return Header(PacketType(kind), offset, stream_id, window, seq, ack)


def decode_payload(data: bytes) -> bytes:
    """Return a packet's payload, without padding and SACK ranges; raises `DecodeError`."""
    header = decode_header(data)
    return data[HEADER_BYTES + sack_length(header.type, header.data_offset, len(data)) :]


def sack_length(kind: int, data_offset: int, packet_length: int) -> int:
    """Return how many bytes lie between header and payload (ranges or padding)."""
    rest = packet_length - HEADER_BYTES
    if kind & SACK and not 0 < data_offset < rest:
        return rest
    return data_offset


def encode_sack(ranges: Iterable[tuple[int, int]]) -> bytes:
    """Encode ranges of received packets, each (start, end) with an exclusive end; any integers, cut to 32 bits."""
    edges = [edge & SEQ_MASK for both in ranges for edge in both]
    return struct.pack(f"<{len(edges)}I", *edges)


def decode_sack(data: bytes) -> list[tuple[int, int]]:
    """Return the ranges of a packet with the SACK bit, as they stand on the wire; raises `DecodeError`."""
    if len(data) < HEADER_BYTES or data[:2] != PREFIX or not data[2] & SACK:
        raise DecodeError("not a UDX packet with the SACK bit")
    length = sack_length(data[2], data[3], len(data)) & ~7
    return list(_RANGE.iter_unpack(data[HEADER_BYTES : HEADER_BYTES + length]))


def local_id_of(data: bytes) -> int | None:
    """Return the stream id of a UDX packet, `None` for anything else (ff 01 and at least 20 bytes make one)."""
    if len(data) < HEADER_BYTES or data[0] != 0xFF or data[1] != 0x01:
        return None
    stream_id: int = _ID.unpack_from(data, 4)[0]
    return stream_id


def rewrite_stream_id(data: bytes, remote_id: int) -> bytes:
    """Return the packet addressed to another stream id and otherwise as it is (blind relaying)."""
    return data[:4] + _ID.pack(remote_id) + data[8:]


def unwrap(wire: int, near: int) -> int:
    """Return the unbounded sequence number nearest to `near` whose low 32 bits are `wire`.

    Inside a stream sequence numbers never wrap; only the wire's 32 bits do.
    """
    return near + ((wire - near + 0x80000000) & SEQ_MASK) - 0x80000000
