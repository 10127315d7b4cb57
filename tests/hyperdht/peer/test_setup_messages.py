"""Handshake and hole punching messages against the bytes of hyperdht."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.codec import damaged, gives_value_or_decode_error, refuses_every_beginning
from vectors import address, address_or_none, addresses, load, unhex, unhex_or_none

from p2pclaude.hyperdht.encoding import MAX_SAFE_INTEGER, uint
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.peer.setup_messages import (
    Handshake,
    Holepunch,
    HolepunchInfo,
    HolepunchPayload,
    NoisePayload,
    RelayedPath,
    RelayThrough,
    UdxInfo,
    decode_handshake,
    decode_holepunch,
    decode_holepunch_payload,
    decode_noise_payload,
    encode_handshake,
    encode_holepunch,
    encode_holepunch_payload,
    encode_noise_payload,
)

PROPERTY = settings(max_examples=150, derandomize=True, deadline=None)


def _handshake(v: dict[str, Any]) -> Handshake:
    peer, relay = address_or_none(v["peer_address"]), address_or_none(v["relay_address"])
    return Handshake(v["mode"], unhex(v["noise"]), peer, relay)


def _holepunch_info(v: dict[str, Any]) -> HolepunchInfo:
    paths = (RelayedPath(address(relay), address(peer)) for relay, peer in v["relays"])
    return HolepunchInfo(v["id"], tuple(paths))


def _noise_payload(v: dict[str, Any]) -> NoisePayload:
    through = v["relay_through"]
    return NoisePayload(
        error=v["error"],
        firewall=v["firewall"],
        holepunch=None if v["holepunch"] is None else _holepunch_info(v["holepunch"]),
        addresses4=addresses(v["addresses4"]),
        addresses6=tuple((host, port) for host, port in v["addresses6"]),
        udx=None if v["udx"] is None else UdxInfo(*v["udx"]),
        secret_stream=v["secret_stream"],
        relay_through=None if through is None else RelayThrough(*map(unhex, through)),
        relay_addresses=None if v["relay_addresses"] is None else addresses(v["relay_addresses"]),
    )


def _holepunch(v: dict[str, Any]) -> Holepunch:
    return Holepunch(v["mode"], v["id"], unhex(v["payload"]), address_or_none(v["peer_address"]))


def _holepunch_payload(v: dict[str, Any]) -> HolepunchPayload:
    return HolepunchPayload(
        v["error"],
        v["firewall"],
        v["round"],
        v["connected"],
        v["punching"],
        None if v["addresses"] is None else addresses(v["addresses"]),
        address_or_none(v["remote_address"]),
        unhex_or_none(v["token"]),
        unhex_or_none(v["remote_token"]),
    )


Codec = tuple[Callable[[dict[str, Any]], Any], Callable[[Any], bytes], Callable[[bytes], Any]]
CODECS: dict[str, Codec] = {
    "handshake": (_handshake, encode_handshake, decode_handshake),
    "noise_payload": (_noise_payload, encode_noise_payload, decode_noise_payload),
    "holepunch": (_holepunch, encode_holepunch, decode_holepunch),
    "holepunch_payload": (_holepunch_payload, encode_holepunch_payload, decode_holepunch_payload),
}
VECTORS = load("messages")


@pytest.mark.parametrize("name", CODECS)
def test_golden_vectors(name: str) -> None:
    make, encode, decode = CODECS[name]
    assert VECTORS[name]
    for vector in VECTORS[name]:
        message = make(vector)
        assert encode(message).hex() == vector["hex"]
        assert decode(unhex(vector["hex"])) == message
        assert decode(unhex(vector["hex"]) + b"\x00more") == message


@pytest.mark.parametrize("name", CODECS)
def test_a_message_cut_short_is_refused_at_every_length(name: str) -> None:
    for vector in VECTORS[name]:
        refuses_every_beginning(CODECS[name][2], unhex(vector["hex"]))


@pytest.mark.parametrize("name", CODECS)
@PROPERTY
@given(data=st.binary(max_size=300))
def test_any_bytes_give_a_value_or_decode_error(name: str, data: bytes) -> None:
    gives_value_or_decode_error(CODECS[name][2], data)


@pytest.mark.parametrize("name", CODECS)
@PROPERTY
@given(data=st.data())
def test_a_damaged_message_gives_a_value_or_decode_error(name: str, data: st.DataObject) -> None:
    gives_value_or_decode_error(CODECS[name][2], damaged(data, VECTORS[name]))


SMALL = st.integers(0, 3)
MODES = st.integers(0, 4)
NUMBERS = st.integers(0, MAX_SAFE_INTEGER)
UINT32 = st.integers(0, 2**32 - 1)
ADDRESS = st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535))
SOME_ADDRESSES = st.lists(ADDRESS, max_size=5).map(tuple)
ADDRESS6 = st.tuples(st.sampled_from(["::1", "fe80::1", "2001:db8::2:1"]), st.integers(0, 65535))
KEYS = st.binary(min_size=32, max_size=32)
RELAYED_PATHS = st.builds(RelayedPath, ADDRESS, ADDRESS)
MESSAGES: dict[str, st.SearchStrategy[Any]] = {
    "handshake": st.builds(Handshake, MODES, st.binary(max_size=300), st.none() | ADDRESS, st.none() | ADDRESS),
    "noise_payload": st.builds(
        NoisePayload,
        SMALL,
        SMALL,
        st.none() | st.builds(HolepunchInfo, NUMBERS, st.lists(RELAYED_PATHS, max_size=16).map(tuple)),
        SOME_ADDRESSES,
        st.lists(ADDRESS6, max_size=3).map(tuple),
        st.none() | st.builds(UdxInfo, st.booleans(), UINT32, UINT32),
        st.booleans(),
        st.none() | st.builds(RelayThrough, KEYS, KEYS),
        st.none() | SOME_ADDRESSES,
        version=st.just(1),
    ),
    "holepunch": st.builds(Holepunch, MODES, NUMBERS, st.binary(max_size=300), st.none() | ADDRESS),
    "holepunch_payload": st.builds(
        HolepunchPayload,
        SMALL,
        SMALL,
        NUMBERS,
        st.booleans(),
        st.booleans(),
        st.none() | SOME_ADDRESSES,
        st.none() | ADDRESS,
        st.none() | KEYS,
        st.none() | KEYS,
    ),
}


@pytest.mark.parametrize("name", CODECS)
@PROPERTY
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[name])
    _, encode, decode = CODECS[name]
    assert decode(encode(message)) == message


@pytest.mark.parametrize("decode", [decode_handshake, decode_holepunch])
def test_an_unknown_mode_is_refused(decode: Callable[[bytes], object]) -> None:
    with pytest.raises(DecodeError):
        decode(b"\x00\x05" + bytes(40))


def test_another_version_of_the_payload_is_not_read_further() -> None:
    assert decode_noise_payload(uint(2)) == NoisePayload(version=2)
    assert decode_noise_payload(uint(7) + b"\xff" * 9) == NoisePayload(version=7)


@pytest.mark.parametrize(("stream_id", "seq"), [(2**32, 0), (0, 2**32), (2**50, 2**50)])
def test_stream_numbers_over_32_bits_are_refused(stream_id: int, seq: int) -> None:
    udx = NoisePayload(udx=UdxInfo(False, stream_id, seq))
    with pytest.raises(DecodeError):
        decode_noise_payload(encode_noise_payload(udx))


def test_a_host_with_many_interfaces_is_heard() -> None:
    many = tuple((f"10.0.{i}.1", 49737) for i in range(190))
    assert decode_noise_payload(encode_noise_payload(NoisePayload(addresses4=many))).addresses4 == many


def test_what_a_payload_says_when_nothing_is_said() -> None:
    payload, round_one = NoisePayload(), HolepunchPayload()
    assert payload.secret_stream is False and payload.udx is None and payload.version == 1
    assert (round_one.connected, round_one.punching, round_one.round) == (False, False, 0)
    assert UdxInfo(False, 7).seq == 0
