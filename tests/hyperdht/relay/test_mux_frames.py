"""Protomux frames against those that two real muxes exchanged."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load, unhex

from p2pclaude.hyperdht.encoding import MAX_SAFE_INTEGER, buffer, uint
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.relay.mux_frames import (
    MAX_BATCH,
    ChannelClose,
    ChannelMessage,
    ChannelOpen,
    ChannelReject,
    Frame,
    decode_frames,
    encode_frame,
)

PROPERTY = settings(max_examples=200, derandomize=True, deadline=None)
FRAMES = load("protomux")["frames"]
SINGLE = [frame for frame in FRAMES if frame["name"] != "batch"]


def _frame(v: dict[str, Any]) -> Frame:
    if v["name"] == "open":
        channel_id = None if v["channel_id"] is None else unhex(v["channel_id"])
        return ChannelOpen(v["id"], v["protocol"], channel_id, unhex(v["handshake"]))
    if v["name"] == "message":
        return ChannelMessage(v["id"], v["type"], unhex(v["payload"]))
    return ChannelReject(v["id"]) if v["name"] == "reject" else ChannelClose(v["id"])


@pytest.mark.parametrize("vector", SINGLE, ids=lambda v: v["name"])
def test_golden_frames(vector: dict[str, Any]) -> None:
    assert encode_frame(_frame(vector)).hex() == vector["hex"]
    assert decode_frames(unhex(vector["hex"])) == [_frame(vector)]


def test_golden_batch() -> None:
    [vector] = [frame for frame in FRAMES if frame["name"] == "batch"]
    messages = [ChannelMessage(m["id"], m["type"], unhex(m["payload"])) for m in vector["messages"]]
    assert decode_frames(unhex(vector["hex"])) == [*messages, ChannelClose(vector["close"])]


@pytest.mark.parametrize("vector", FRAMES, ids=lambda v: v["name"])
def test_a_frame_cut_short_gives_fewer_values_or_decode_error(vector: dict[str, Any]) -> None:
    whole = unhex(vector["hex"])
    for size in range(len(whole)):
        try:
            frames = decode_frames(whole[:size])
        except DecodeError:
            continue
        assert frames != decode_frames(whole)


@PROPERTY
@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda rest: b"\x00\x00" + rest))
def test_any_bytes_give_frames_or_decode_error(data: bytes) -> None:
    try:
        decode_frames(data)
    except DecodeError:
        pass


NUMBERS = st.integers(0, MAX_SAFE_INTEGER)
SOME_FRAMES = st.one_of(
    st.builds(ChannelOpen, NUMBERS, st.text(max_size=60), st.none() | st.binary(min_size=1, max_size=40), st.binary()),
    st.builds(ChannelReject, NUMBERS),
    st.builds(ChannelClose, NUMBERS),
    st.builds(ChannelMessage, st.integers(1, MAX_SAFE_INTEGER), NUMBERS, st.binary(max_size=300)),
)


@PROPERTY
@given(SOME_FRAMES)
def test_round_trip(frame: Frame) -> None:
    assert decode_frames(encode_frame(frame)) == [frame]


def test_empty_and_unknown_frames_are_nothing() -> None:
    assert decode_frames(b"") == []
    assert decode_frames(b"\x00\x04anything") == []


def test_a_batch_may_not_hold_a_batch() -> None:
    with pytest.raises(DecodeError):
        decode_frames(b"\x00\x00\x00" + buffer(b"\x00\x01"))


def test_a_batch_has_an_end() -> None:
    head = b"\x00\x00" + uint(1)
    assert len(decode_frames(head + buffer(b"\x00") * MAX_BATCH)) == MAX_BATCH
    with pytest.raises(DecodeError):
        decode_frames(head + buffer(b"\x00") * (MAX_BATCH + 1))


def test_a_long_protocol_name_is_refused() -> None:
    with pytest.raises(DecodeError):
        decode_frames(encode_frame(ChannelOpen(1, "x" * 257)))


def test_the_longest_name_of_a_protocol() -> None:
    def opening(size: int) -> bytes:
        return encode_frame(ChannelOpen(1, "x" * size, None, b""))

    (frame,) = decode_frames(opening(256))
    assert isinstance(frame, ChannelOpen) and frame.protocol == "x" * 256
    with pytest.raises(DecodeError):
        decode_frames(opening(257))
