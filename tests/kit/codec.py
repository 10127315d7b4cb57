"""What must hold for every codec of a message, whatever the message is."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from vectors import unhex

from p2pclaude.hyperdht.errors import DecodeError

Decode = Callable[[bytes], Any]


def gives_value_or_decode_error(decode: Decode, data: bytes) -> None:
    """Fail when bytes raise anything but the one error."""
    try:
        decode(data)
    except DecodeError:
        pass


def refuses_every_beginning(decode: Decode, whole: bytes) -> None:
    """Fail when a message is taken though its end is missing."""
    for size in range(len(whole)):
        try:
            decode(whole[:size])
        except DecodeError:
            continue
        raise AssertionError(f"{size} of {len(whole)} bytes were taken for a message")


def damaged(data: st.DataObject, vectors: list[dict[str, Any]]) -> bytes:
    """Draw one of the vectors' messages, with a few bytes that are wrong."""
    whole = bytearray(unhex(data.draw(st.sampled_from(vectors))["hex"]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    return bytes(whole)
