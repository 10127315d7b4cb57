"""UDX packets: the captured ones of udx-native 1.21.3, and any bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pclaude.hyperdht.constants import PacketType
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.udx.packet import (
    Header,
    decode_header,
    decode_payload,
    decode_sack,
    encode_header,
    encode_sack,
    local_id_of,
    rewrite_stream_id,
    sack_length,
    unwrap,
)

WINDOW = 4194304

# name, header bytes, header, payload
CAPTURED = [
    ("data", "ff01010002000000000040000000000000000000", Header(PacketType.DATA, 0, 2, WINDOW, 0, 0), b"hello"),
    ("ack", "ff01000001000000000040000000000001000000", Header(PacketType(0), 0, 1, WINDOW, 0, 1), b""),
    ("message", "ff01080002000000000040000000000000000000", Header(PacketType.MESSAGE, 0, 2, WINDOW, 0, 0), b"msg"),
    ("empty", "ff01080002000000000040000000000000000000", Header(PacketType.MESSAGE, 0, 2, WINDOW, 0, 0), b""),
    ("heart", "ff01200002000000000040000100000000000000", Header(PacketType.HEARTBEAT, 0, 2, WINDOW, 1, 0), b""),
    ("end", "ff01020002000000000040000100000000000000", Header(PacketType.END, 0, 2, WINDOW, 1, 0), b""),
    (
        "data and end",
        "ff01030002000000000040006500000000000000",
        Header(PacketType.DATA | PacketType.END, 0, 2, WINDOW, 101, 0),
        b"last",
    ),
    ("destroy", "ff01100002000000000040000e00000000000000", Header(PacketType.DESTROY, 0, 2, WINDOW, 14, 0), b""),
]
SACK = bytes.fromhex("ff0104000100000000004000000000000200000004000000060000000700000008000000")
PROBE = bytes.fromhex("ff01012002000000000040000800000000000000") + bytes(32) + b"x" * 1152


@pytest.mark.parametrize(("name", "packet", "header", "payload"), CAPTURED)
def test_captured_packets(name: str, packet: str, header: Header, payload: bytes) -> None:
    data = bytes.fromhex(packet) + payload
    assert decode_header(data) == header
    assert decode_payload(data) == payload
    assert encode_header(header) + payload == data


def test_captured_sack_has_offset_zero_and_ranges_behind_the_header() -> None:
    header = Header(PacketType.SACK, 0, 1, WINDOW, 0, 2)
    assert decode_header(SACK) == header
    assert decode_sack(SACK) == [(4, 6), (7, 8)]
    assert decode_payload(SACK) == b""
    assert encode_header(header) + encode_sack([(4, 6), (7, 8)]) == SACK


def test_sack_with_an_offset_is_followed_by_data() -> None:
    header = encode_header(Header(PacketType.SACK | PacketType.DATA, 8, 1, WINDOW, 0, 2))
    data = header + encode_sack([(4, 6)]) + b"data"
    assert decode_sack(data) == [(4, 6)]
    assert decode_payload(data) == b"data"


def test_captured_mtu_probe_is_padded_in_front_of_its_data() -> None:
    assert decode_header(PROBE) == Header(PacketType.DATA, 32, 2, WINDOW, 8, 0)
    assert decode_payload(PROBE) == b"x" * 1152


def test_padding_beyond_the_packet_is_refused() -> None:
    with pytest.raises(DecodeError):
        decode_payload(encode_header(Header(PacketType.DATA, 6, 1, 0, 0, 0)) + b"short")


@pytest.mark.parametrize("data", [b"", SACK[:19], b"\xff\x02" + SACK[2:], b"\x00\x01" + SACK[2:]])
def test_other_datagrams_are_not_udx(data: bytes) -> None:
    assert local_id_of(data) is None
    with pytest.raises(DecodeError):
        decode_header(data)


def test_relaying_changes_the_id_only() -> None:
    rewritten = rewrite_stream_id(PROBE, 0xFFFFFFFE)
    assert local_id_of(rewritten) == 0xFFFFFFFE
    assert (rewritten[:4], rewritten[8:]) == (PROBE[:4], PROBE[8:])


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_decode_or_raise_decode_error(data: bytes, is_udx: bool) -> None:
    if is_udx:
        data = b"\xff\x01" + data
    for decode in (decode_header, decode_payload, decode_sack):
        try:
            decode(data)
        except DecodeError:
            continue


@given(st.integers(0, 2**70), st.integers(-(2**31), 2**31 - 1))
def test_unwrapped_numbers_are_the_nearest(near: int, distance: int) -> None:
    value = near + distance
    assert unwrap(value & 0xFFFFFFFF, near) == value


@pytest.mark.parametrize(
    ("first", "second", "size", "known"), [(255, 1, 20, 7), (255, 2, 20, None), (254, 1, 20, None), (255, 1, 19, None)]
)
def test_the_id_of_a_packet_of_any_kind(first: int, second: int, size: int, known: int | None) -> None:
    data = bytes([first, second, 4, 0, 7, 0, 0, 0]).ljust(size, b"\0")[:size]
    assert local_id_of(data) == known


@pytest.mark.parametrize(
    ("offset", "size", "length"), [(0, 36, 16), (1, 36, 1), (8, 36, 8), (15, 36, 15), (16, 36, 16), (17, 36, 16)]
)
def test_what_lies_between_header_and_payload(offset: int, size: int, length: int) -> None:
    assert sack_length(PacketType.SACK, offset, size) == length
    assert sack_length(PacketType.DATA, offset, size) == offset


def test_a_number_half_way_round_is_behind() -> None:
    assert unwrap(0, 2**31) == 0 and unwrap(2**31 - 1, 0) == 2**31 - 1 and unwrap(2**31, 0) == -(2**31)
    assert unwrap(5, 2**32) == 2**32 + 5 and unwrap(2**32 - 1, 2**32) == 2**32 - 1
