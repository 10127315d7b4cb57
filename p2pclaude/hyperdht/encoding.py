"""Compact encoding, the binary format of every HyperDHT message (ring 1).

Writers are functions that return bytes; `Reader` walks over received bytes and raises `DecodeError` when they end
early. All integers are little-endian. Source: the npm packages compact-encoding and compact-encoding-net.
"""

import struct
from collections.abc import Callable, Sequence
from socket import AF_INET6, inet_aton, inet_ntoa, inet_ntop, inet_pton
from typing import Final, TypeVar

from .errors import DecodeError

Address = tuple[str, int]
"""An IPv4 host in dotted form and a port."""

T = TypeVar("T")

MAX_SAFE_INTEGER: Final = 2**53 - 1  # JavaScript's; larger ones are refused on both sides
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def uint(n: int) -> bytes:
    """Encode an unsigned integer: 1 byte up to 0xfc, else fd+u16, fe+u32 or ff+u64."""
    if 0 <= n <= 0xFC:
        return bytes((n,))
    if n < 0 or n > MAX_SAFE_INTEGER:
        raise ValueError(f"not encodable as an unsigned integer: {n}")
    if n <= 0xFFFF:
        return b"\xfd" + _U16.pack(n)
    if n <= 0xFFFFFFFF:
        return b"\xfe" + _U32.pack(n)
    return b"\xff" + _U64.pack(n)


def buffer(data: bytes) -> bytes:
    """Encode bytes behind their length."""
    return uint(len(data)) + data


def string(text: str) -> bytes:
    """Encode text as UTF-8 behind its length in bytes."""
    return buffer(text.encode())


def ipv4(address: Address) -> bytes:
    """Encode an IPv4 address: four octets, then the port as u16 (little-endian, not network order)."""
    return inet_aton(address[0]) + _U16.pack(address[1])


def ipv4_number(host: str) -> int:
    """Return a dotted IPv4 host as the number it stands for."""
    return int.from_bytes(inet_aton(host))


def ipv6(address: Address) -> bytes:
    """Encode an IPv6 address: sixteen octets in network order, then the port as little-endian u16."""
    return inet_pton(AF_INET6, address[0]) + _U16.pack(address[1])


def array(items: Sequence[T], encode_one: Callable[[T], bytes]) -> bytes:
    """Encode a count and the items."""
    return uint(len(items)) + b"".join(map(encode_one, items))


def fixed(data: bytes, size: int) -> bytes:
    """Check that `data` has the `size` its field demands and return it."""
    if len(data) != size:
        raise ValueError(f"{size} bytes are needed here, not {len(data)}")
    return data


class Reader:
    """A cursor over received bytes; every method takes one value and raises `DecodeError` if it is not there.

    Bytes left over at the end are the caller's choice to ignore: upstream does, for forward compatibility.
    """

    __slots__ = ("_data", "_end", "_pos")

    def __init__(self, data: bytes, start: int = 0) -> None:
        self._data = data
        self._pos = start
        self._end = len(data)

    @property
    def remaining(self) -> int:
        """The number of bytes not read yet."""
        return self._end - self._pos

    def _advance(self, size: int) -> int:
        start = self._pos
        if size > self._end - start:
            raise DecodeError("the message ends early")
        self._pos = start + size
        return start

    def uint8(self) -> int:
        """Read one byte as a number."""
        return self._data[self._advance(1)]

    def uint16(self) -> int:
        """Read a fixed two-byte number."""
        value: int = _U16.unpack_from(self._data, self._advance(2))[0]
        return value

    def uint32(self) -> int:
        """Read a fixed four-byte number."""
        value: int = _U32.unpack_from(self._data, self._advance(4))[0]
        return value

    def uint64(self) -> int:
        """Read a fixed eight-byte number, at most `MAX_SAFE_INTEGER`."""
        value: int = _U64.unpack_from(self._data, self._advance(8))[0]
        if value > MAX_SAFE_INTEGER:
            raise DecodeError("a number is too large")
        return value

    def uint(self) -> int:
        """Read a variable-length number; longer forms than needed are accepted, as upstream does."""
        first = self.uint8()
        if first <= 0xFC:
            return first
        if first == 0xFD:
            return self.uint16()
        return self.uint32() if first == 0xFE else self.uint64()

    def stream_number(self) -> int:
        """Read a variable-length number that fits 32 bits, as UDX's stream ids and sequence numbers do."""
        value = self.uint()
        if value > 0xFFFFFFFF:
            raise DecodeError("a stream id or sequence number over 32 bits")
        return value

    def fixed(self, size: int) -> bytes:
        """Read exactly `size` bytes."""
        start = self._advance(size)
        return self._data[start : start + size]

    def buffer(self) -> bytes:
        """Read bytes behind their length."""
        return self.fixed(self.uint())

    def string(self) -> str:
        """Read UTF-8 text behind its length."""
        try:
            return self.buffer().decode()
        except UnicodeDecodeError as error:
            raise DecodeError("text that is not UTF-8") from error

    def boolean(self) -> bool:
        """Read one byte; only 1 is true."""
        return self.uint8() == 1

    def ipv4(self) -> Address:
        """Read an IPv4 address (6 bytes)."""
        start = self._advance(6)
        return inet_ntoa(self._data[start : start + 4]), _U16.unpack_from(self._data, start + 4)[0]

    def ipv6(self) -> Address:
        """Read an IPv6 address (18 bytes)."""
        start = self._advance(18)
        return inet_ntop(AF_INET6, self._data[start : start + 16]), _U16.unpack_from(self._data, start + 16)[0]

    def array(self, read_one: Callable[[], T], cap: int) -> tuple[T, ...]:
        """Read a count and that many items; a count over `cap` is refused before anything is kept."""
        count = self.uint()
        if count > cap:
            raise DecodeError(f"a list of {count} items where at most {cap} may stand")
        return tuple([read_one() for _ in range(count)])

    def rest(self) -> bytes:
        """Take all bytes that are left."""
        return self.fixed(self.remaining)
