"""Compact encoding against the bytes of compact-encoding and compact-encoding-net."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import address, addresses, load, unhex

from p2pclaude.hyperdht.encoding import (
    MAX_SAFE_INTEGER,
    Reader,
    array,
    buffer,
    fixed,
    ipv4,
    ipv4_number,
    ipv6,
    string,
    uint,
)
from p2pclaude.hyperdht.errors import DecodeError

VECTORS = load("encoding")
PROPERTY = settings(max_examples=200, derandomize=True, deadline=None)


@pytest.mark.parametrize(("number", "encoded"), VECTORS["uint"])
def test_uint(number: int, encoded: str) -> None:
    assert uint(number).hex() == encoded
    assert Reader(unhex(encoded)).uint() == number


@pytest.mark.parametrize(("encoded", "number"), VECTORS["nonminimal"])
def test_longer_forms_are_read(encoded: str, number: int) -> None:
    assert Reader(unhex(encoded)).uint() == number


@pytest.mark.parametrize(("plain", "encoded"), VECTORS["buffer"])
def test_buffer(plain: str, encoded: str) -> None:
    assert buffer(unhex(plain)).hex() == encoded
    assert Reader(unhex(encoded)).buffer().hex() == plain


@pytest.mark.parametrize(("plain", "encoded"), VECTORS["string"])
def test_string(plain: str, encoded: str) -> None:
    assert string(plain).hex() == encoded
    assert Reader(unhex(encoded)).string() == plain


@pytest.mark.parametrize(("plain", "encoded"), VECTORS["ipv4"])
def test_ipv4(plain: str, encoded: str) -> None:
    assert ipv4(address(plain)).hex() == encoded
    assert Reader(unhex(encoded)).ipv4() == address(plain)


@pytest.mark.parametrize(("host", "port", "encoded"), VECTORS["ipv6"])
def test_ipv6(host: str, port: int, encoded: str) -> None:
    assert ipv6((host, port)).hex() == encoded
    assert Reader(unhex(encoded)).ipv6() == (host, port)


@pytest.mark.parametrize(("plain", "encoded"), VECTORS["array"])
def test_array(plain: list[str], encoded: str) -> None:
    assert array(addresses(plain), ipv4).hex() == encoded
    reader = Reader(unhex(encoded))
    assert reader.array(reader.ipv4, 8) == addresses(plain)


READS: dict[str, tuple[Callable[[Reader], object], bytes]] = {
    "uint8": (Reader.uint8, b"\x05"),
    "uint16": (Reader.uint16, b"\x05\x01"),
    "uint32": (Reader.uint32, bytes(4)),
    "uint64": (Reader.uint64, bytes(8)),
    "uint in 3": (Reader.uint, uint(0xFFFF)),
    "uint in 5": (Reader.uint, uint(0x10000)),
    "uint in 9": (Reader.uint, uint(MAX_SAFE_INTEGER)),
    "fixed": (lambda r: r.fixed(32), bytes(32)),
    "buffer": (Reader.buffer, buffer(bytes(300))),
    "string": (Reader.string, string("text")),
    "boolean": (Reader.boolean, b"\x01"),
    "ipv4": (Reader.ipv4, bytes(6)),
    "ipv6": (Reader.ipv6, bytes(18)),
    "array": (lambda r: r.array(r.ipv4, 9), array([("1.2.3.4", 5)] * 3, ipv4)),
}


@pytest.mark.parametrize("name", READS)
def test_a_value_cut_short_is_refused_at_every_length(name: str) -> None:
    read, whole = READS[name]
    for size in range(len(whole)):
        with pytest.raises(DecodeError):
            read(Reader(whole[:size]))
    reader = Reader(whole + b"more")
    read(reader)
    assert reader.rest() == b"more"
    assert reader.remaining == 0


@pytest.mark.parametrize("name", READS)
@PROPERTY
@given(data=st.binary(max_size=64))
def test_any_bytes_give_a_value_or_decode_error(name: str, data: bytes) -> None:
    try:
        READS[name][0](Reader(data))
    except DecodeError:
        pass


@PROPERTY
@given(st.integers(0, MAX_SAFE_INTEGER))
def test_uint_round_trip(number: int) -> None:
    assert Reader(uint(number)).uint() == number
    assert len(uint(number)) == (1 if number < 253 else 3 if number < 2**16 else 5 if number < 2**32 else 9)


@pytest.mark.parametrize("number", [-1, MAX_SAFE_INTEGER + 1, 2**64])
def test_numbers_that_javascript_cannot_hold_are_not_written(number: int) -> None:
    with pytest.raises(ValueError, match="not encodable"):
        uint(number)


@pytest.mark.parametrize("encoded", ["ff" + "ff" * 8, "ff" + (2**53).to_bytes(8, "little").hex()])
def test_numbers_that_javascript_cannot_hold_are_not_read(encoded: str) -> None:
    with pytest.raises(DecodeError):
        Reader(unhex(encoded)).uint()


def test_a_list_over_its_cap_is_refused_before_it_is_read() -> None:
    reader = Reader(uint(2**40) + bytes(60))
    with pytest.raises(DecodeError):
        reader.array(reader.ipv4, 10)
    assert reader.remaining == 60


def test_a_length_beyond_the_end_is_refused() -> None:
    with pytest.raises(DecodeError):
        Reader(uint(MAX_SAFE_INTEGER) + b"x").buffer()


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(DecodeError):
        Reader(buffer(b"\xff\xfe")).string()


def test_only_one_is_true() -> None:
    assert [Reader(bytes((n,))).boolean() for n in (0, 1, 2, 255)] == [False, True, False, False]


def test_fixed_fields_are_checked_when_written() -> None:
    assert fixed(bytes(32), 32) == bytes(32)
    with pytest.raises(ValueError, match="32 bytes"):
        fixed(bytes(31), 32)


def test_reading_may_begin_inside() -> None:
    assert Reader(b"\x01\x02\x03", 1).rest() == b"\x02\x03"


def test_addresses_as_numbers() -> None:
    assert ipv4_number("0.0.0.0") == 0 and ipv4_number("1.2.3.4") == 0x01020304
    assert ipv4_number("255.255.255.255") == 2**32 - 1
