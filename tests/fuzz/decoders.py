"""The decoders of ring 1: a value or DecodeError, and a value survives being encoded and decoded again."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, TypeVar

import vectors

from fuzz.target import Script, Target
from p2pclaude.hyperdht.constants import PacketType
from p2pclaude.hyperdht.encoding import Reader, array, buffer, ipv4, ipv6, string, uint
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.peer import setup_messages
from p2pclaude.hyperdht.relay import link_messages as links
from p2pclaude.hyperdht.relay import mux_frames
from p2pclaude.hyperdht.rpc import messages
from p2pclaude.hyperdht.udx import packet

T = TypeVar("T")


def _codec(decode: Callable[[bytes], T], encode: Callable[[T], bytes], data: bytes) -> None:
    try:
        value = decode(data)
    except DecodeError:
        return
    again = decode(encode(value))
    assert again == value, f"{value!r} became {again!r}"


def _hex(entries: Iterable[dict[str, Any]]) -> list[bytes]:
    return [bytes.fromhex(entry["hex"]) for entry in entries]


def _seeds(file: str, *names: str) -> list[bytes]:
    loaded = vectors.load(file)
    return [data for name in names for data in _hex(loaded[name])]


def _encode_message(message: messages.Request | messages.Response) -> bytes:
    if isinstance(message, messages.Request):
        return messages.encode_request(message)
    return messages.encode_response(message)


# -- compact encoding: the first byte is the number of reads, a byte each says which, the rest is read

_READS: Final[tuple[Callable[[Reader], object], ...]] = (
    Reader.uint8, Reader.uint16, Reader.uint32, Reader.uint64, Reader.uint, Reader.buffer, Reader.string,
    Reader.boolean, Reader.ipv4, Reader.ipv6, lambda reader: reader.array(reader.uint, 100),
    lambda reader: reader.array(reader.ipv4, 3), lambda reader: reader.array(reader.buffer, 255),
    lambda reader: reader.fixed(32), lambda reader: reader.fixed(1), Reader.rest,
)  # fmt: skip
_WRITES: Final[dict[int, Callable[[Any], bytes]]] = {
    4: uint, 5: buffer, 6: string, 8: ipv4, 9: ipv6, 10: lambda values: array(values, uint),
    11: lambda values: array(values, ipv4), 12: lambda values: array(values, buffer),
}  # fmt: skip


def _read_values(data: bytes) -> None:
    script = Script(data)
    choices = script.chunk()
    message = script.rest()
    reader = Reader(message)
    for choice in choices:
        before = reader.remaining
        number = choice % len(_READS)
        try:
            value = _READS[number](reader)
        except DecodeError:
            assert 0 <= reader.remaining <= before
            continue
        assert 0 <= reader.remaining <= before, "more was read than there is"
        if number in _WRITES:
            assert _READS[number](Reader(_WRITES[number](value))) == value


def _encoding_seeds() -> list[bytes]:
    found = vectors.load("encoding")
    kinds = {"uint": 4, "buffer": 5, "string": 6, "ipv4": 8, "ipv6": 9, "array": 11}
    inputs = [bytes((1, kind)) + bytes.fromhex(entry[-1]) for name, kind in kinds.items() for entry in found[name]]
    return [*inputs, bytes((3, 4, 4, 5)) + bytes.fromhex("fd0100ff0100000000000000" + "03616263")]


# -- UDX packets


def _read_packet(data: bytes) -> None:
    local_id = packet.local_id_of(data)
    try:
        header = packet.decode_header(data)
    except DecodeError:
        return
    assert local_id == header.stream_id
    assert packet.encode_header(header) == data[: packet.HEADER_BYTES]
    payload = packet.decode_payload(data)
    assert data.endswith(payload)
    if header.type & PacketType.SACK:
        ranges = packet.decode_sack(data)
        assert len(payload) + 8 * len(ranges) <= len(data) - packet.HEADER_BYTES
        assert packet.encode_sack(ranges) == data[packet.HEADER_BYTES :][: 8 * len(ranges)]
    moved = packet.rewrite_stream_id(data, 7)
    assert packet.local_id_of(moved) == 7
    assert len(moved) == len(data)


_PACKETS: Final = """
    ff0101000200000000004000000000000000000068656c6c6f ff01000001000000000040000000000001000000
    ff01080002000000000040000000000000000000
    ff010800020000000000400000000000000000006d7367 ff01200002000000000040000100000000000000
    ff01020002000000000040000100000000000000 ff010300020000000000400065000000000000006c617374
    ff0104000100000000004000000000000200000004000000060000000700000008000000
    ff01100002000000000040000e00000000000000
"""


def packet_seeds() -> list[bytes]:
    """Return one packet of each kind, as libudx sends them."""
    return [bytes.fromhex(word) for word in _PACKETS.split()]


# -- protomux: every frame read can be written again


def _read_frames(data: bytes) -> None:
    try:
        frames = mux_frames.decode_frames(data)
    except DecodeError:
        return
    assert len(frames) <= mux_frames.MAX_BATCH
    for frame in frames:
        assert mux_frames.decode_frames(mux_frames.encode_frame(frame)) == [frame]


def frame_seeds() -> list[bytes]:
    """Return the frames of the golden vectors, and batches of them."""
    single = _seeds("protomux", "frames")
    inner = b"".join(buffer(frame[1:]) for frame in single if frame[:1] == b"\x00")
    return [*single, b"\x00\x00\x00" + inner, b"\x00\x00\x01" + buffer(b"\x00ab") + b"\x00\x05" + buffer(b"\x01cd")]


def _codec_target(name: str, decode: Callable[[bytes], T], encode: Callable[[T], bytes], *seeds: str) -> Target:
    return Target(name, partial(_codec, decode, encode), seeds=partial(_seeds, *seeds))


TARGETS: Final = (
    Target("encoding", _read_values, max_bytes=300, seeds=_encoding_seeds),
    _codec_target("message", messages.decode_message, _encode_message, "datagrams", "requests", "responses"),
    _codec_target("peer", messages.decode_peer, messages.encode_peer, "messages", "peer"),
    _codec_target("announce", messages.decode_announce, messages.encode_announce, "messages", "announce"),
    _codec_target(
        "lookup_reply", messages.decode_lookup_reply, messages.encode_lookup_reply, "messages", "lookup_reply"
    ),
    _codec_target("mutable_put", messages.decode_mutable_put, messages.encode_mutable_put, "messages", "mutable_put"),
    _codec_target(
        "mutable_get_reply",
        messages.decode_mutable_get_reply,
        messages.encode_mutable_get_reply,
        "messages",
        "mutable_get_reply",
    ),
    _codec_target(
        "plugin_request", messages.decode_plugin_request, messages.encode_plugin_request, "messages", "plugin_request"
    ),
    _codec_target(
        "peer_address", messages.decode_peer_address, messages.encode_peer_address, "messages", "peer_address"
    ),
    _codec_target(
        "handshake", setup_messages.decode_handshake, setup_messages.encode_handshake, "messages", "handshake"
    ),
    _codec_target(
        "noise_payload",
        setup_messages.decode_noise_payload,
        setup_messages.encode_noise_payload,
        "messages",
        "noise_payload",
    ),
    _codec_target(
        "holepunch", setup_messages.decode_holepunch, setup_messages.encode_holepunch, "messages", "holepunch"
    ),
    _codec_target(
        "holepunch_payload",
        setup_messages.decode_holepunch_payload,
        setup_messages.encode_holepunch_payload,
        "messages",
        "holepunch_payload",
    ),
    _codec_target("relay_pair", links.decode_relay_pair, links.encode_relay_pair, "protomux", "pair"),
    _codec_target("relay_unpair", links.decode_relay_unpair, links.encode_relay_unpair, "protomux", "unpair"),
    Target("protomux", _read_frames, max_bytes=400, seeds=frame_seeds),
    Target("udx_packet", _read_packet, seeds=packet_seeds),
)
