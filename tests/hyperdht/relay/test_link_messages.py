"""Pair and unpair messages against the bytes of blind-relay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.codec import damaged, gives_value_or_decode_error, refuses_every_beginning
from vectors import load, unhex

from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.relay.link_messages import (
    RelayPair,
    decode_relay_pair,
    decode_relay_unpair,
    encode_relay_pair,
    encode_relay_unpair,
)

PROPERTY = settings(max_examples=150, derandomize=True, deadline=None)
VECTORS = load("protomux")
KEYS = st.binary(min_size=32, max_size=32)
UINT32 = st.integers(0, 2**32 - 1)
DECODERS = pytest.mark.parametrize(
    ("name", "decode"), [("pair", decode_relay_pair), ("unpair", decode_relay_unpair)], ids=["pair", "unpair"]
)


def test_pair_golden_vectors() -> None:
    assert VECTORS["pair"]
    for vector in VECTORS["pair"]:
        message = RelayPair(vector["is_initiator"], unhex(vector["token"]), vector["id"], vector["seq"])
        assert encode_relay_pair(message).hex() == vector["hex"]
        assert decode_relay_pair(unhex(vector["hex"]) + b"\x00more") == message


def test_unpair_golden_vectors() -> None:
    assert VECTORS["unpair"]
    for vector in VECTORS["unpair"]:
        assert encode_relay_unpair(unhex(vector["token"])).hex() == vector["hex"]
        assert decode_relay_unpair(unhex(vector["hex"]) + b"\x00more") == unhex(vector["token"])


@DECODERS
def test_a_message_cut_short_is_refused_at_every_length(name: str, decode: "object") -> None:
    assert callable(decode)
    for vector in VECTORS[name]:
        refuses_every_beginning(decode, unhex(vector["hex"]))


@DECODERS
@PROPERTY
@given(data=st.data())
def test_any_bytes_and_damaged_ones_give_a_value_or_decode_error(
    name: str, decode: "object", data: st.DataObject
) -> None:
    assert callable(decode)
    gives_value_or_decode_error(decode, data.draw(st.binary(max_size=300)))
    gives_value_or_decode_error(decode, damaged(data, VECTORS[name]))


@PROPERTY
@given(message=st.builds(RelayPair, st.booleans(), KEYS, UINT32, UINT32))
def test_round_trip(message: RelayPair) -> None:
    assert decode_relay_pair(encode_relay_pair(message)) == message
    assert decode_relay_unpair(encode_relay_unpair(message.token)) == message.token


@pytest.mark.parametrize(("stream_id", "seq"), [(2**32, 0), (0, 2**32), (2**50, 2**50)])
def test_stream_numbers_over_32_bits_are_refused(stream_id: int, seq: int) -> None:
    with pytest.raises(DecodeError):
        decode_relay_pair(encode_relay_pair(RelayPair(True, bytes(32), stream_id, seq)))


def test_a_stream_begins_with_number_nought_unless_it_says_otherwise() -> None:
    assert RelayPair(True, bytes(32), 7).seq == 0
