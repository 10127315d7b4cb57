"""The DHT's messages against the bytes of dht-rpc and hyperdht."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.codec import damaged, gives_value_or_decode_error, refuses_every_beginning
from vectors import address, addresses, load, unhex, unhex_or_none, versions

from p2pclaude.hyperdht.encoding import MAX_SAFE_INTEGER, uint
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.rpc.messages import (
    Announce,
    LookupReply,
    MutableGetReply,
    MutablePut,
    Peer,
    PeerAddress,
    PluginRequest,
    Request,
    Response,
    decode_announce,
    decode_lookup_reply,
    decode_message,
    decode_mutable_get_reply,
    decode_mutable_put,
    decode_peer,
    decode_peer_address,
    decode_plugin_request,
    encode_announce,
    encode_lookup_reply,
    encode_mutable_get_reply,
    encode_mutable_put,
    encode_mutable_signable,
    encode_peer,
    encode_peer_address,
    encode_plugin_request,
    encode_request,
    encode_response,
)

PROPERTY = settings(max_examples=150, derandomize=True, deadline=None)


def _peer(v: dict[str, Any]) -> Peer:
    return Peer(unhex(v["public_key"]), addresses(v["relay_addresses"]))


def _request(v: dict[str, Any]) -> Request:
    optional = (unhex_or_none(v[name]) for name in ("id", "token", "target", "value"))
    return Request(v["tid"], address(v["to"]), v["command"], v["internal"], *optional)


def _response(v: dict[str, Any]) -> Response:
    node_id, token, value = (unhex_or_none(v[name]) for name in ("id", "token", "value"))
    return Response(v["tid"], address(v["to"]), node_id, token, addresses(v["closer_nodes"]), v["error"], value)


def _announce(v: dict[str, Any]) -> Announce:
    peer = None if v["peer"] is None else _peer(v["peer"])
    return Announce(peer, unhex_or_none(v["refresh"]), unhex_or_none(v["signature"]), v["bump"])


def _lookup_reply(v: dict[str, Any]) -> LookupReply:
    return LookupReply(tuple(map(_peer, v["peers"])), v["bump"])


def _mutable_put(v: dict[str, Any]) -> MutablePut:
    return MutablePut(unhex(v["public_key"]), v["seq"], unhex(v["value"]), unhex(v["signature"]))


def _mutable_get_reply(v: dict[str, Any]) -> MutableGetReply:
    return MutableGetReply(v["seq"], unhex(v["value"]), unhex(v["signature"]))


def _plugin_request(v: dict[str, Any]) -> PluginRequest:
    return PluginRequest(v["plugin"], v["version"], v["command"], unhex_or_none(v["value"]))


def _peer_address(v: dict[str, Any]) -> PeerAddress:
    return PeerAddress(unhex(v["public_key"]), addresses(v["nodes"]))


Codec = tuple[Callable[[dict[str, Any]], Any], Callable[[Any], bytes], Callable[[bytes], Any]]
CODECS: dict[str, Codec] = {
    "requests": (_request, encode_request, decode_message),
    "responses": (_response, encode_response, decode_message),
    "peer": (_peer, encode_peer, decode_peer),
    "announce": (_announce, encode_announce, decode_announce),
    "lookup_reply": (_lookup_reply, encode_lookup_reply, decode_lookup_reply),
    "mutable_put": (_mutable_put, encode_mutable_put, decode_mutable_put),
    "mutable_get_reply": (_mutable_get_reply, encode_mutable_get_reply, decode_mutable_get_reply),
    "plugin_request": (_plugin_request, encode_plugin_request, decode_plugin_request),
    "peer_address": (_peer_address, encode_peer_address, decode_peer_address),
}
VECTORS_DIRECTORY = Path(__file__).parents[2] / "vectors"
VECTORS = load("messages") | load("datagrams")
# Messages whose end may be missing, and what is left when it is.
OPTIONAL_END = {"lookup_reply", "peer_address"}


@pytest.mark.parametrize("path", sorted(VECTORS_DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_the_vectors_are_of_the_pinned_release(path: Path) -> None:
    package = json.loads((VECTORS_DIRECTORY.parent / "interop" / "package.json").read_text())
    assert versions(path.stem)["hyperdht"] == package["dependencies"]["hyperdht"]


@pytest.mark.parametrize("name", CODECS)
def test_golden_vectors(name: str) -> None:
    make, encode, decode = CODECS[name]
    assert VECTORS[name]
    for vector in VECTORS[name]:
        message = make(vector)
        assert encode(message).hex() == vector["hex"]
        assert decode(unhex(vector["hex"])) == message


@pytest.mark.parametrize("name", sorted(CODECS.keys() - OPTIONAL_END))
def test_a_message_cut_short_is_refused_at_every_length(name: str) -> None:
    for vector in VECTORS[name]:
        refuses_every_beginning(CODECS[name][2], unhex(vector["hex"]))


@pytest.mark.parametrize("name", CODECS)
def test_bytes_after_the_end_are_ignored(name: str) -> None:
    make, _, decode = CODECS[name]
    for vector in VECTORS[name]:
        if name not in OPTIONAL_END:
            assert decode(unhex(vector["hex"]) + b"\x00more") == make(vector)


def test_a_lookup_reply_may_lack_its_bump() -> None:
    reply = LookupReply((Peer(bytes(32)),))
    assert reply.bump == 0
    whole = encode_lookup_reply(reply)
    assert decode_lookup_reply(whole[:-1]) == reply
    for size in range(len(whole) - 1):
        with pytest.raises(DecodeError):
            decode_lookup_reply(whole[:size])


def test_a_peer_address_may_be_a_bare_key() -> None:
    assert decode_peer_address(bytes(32)) == PeerAddress(bytes(32))
    with pytest.raises(DecodeError):
        decode_peer_address(bytes(31))


@pytest.mark.parametrize("vector", VECTORS["mutable_signable"])
def test_mutable_signable(vector: dict[str, Any]) -> None:
    assert encode_mutable_signable(vector["seq"], unhex(vector["value"])).hex() == vector["hex"]


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


NUMBERS = st.integers(0, MAX_SAFE_INTEGER)
ADDRESSES = st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535))
KEYS = st.binary(min_size=32, max_size=32)
SIGNATURES = st.binary(min_size=64, max_size=64)
PEERS = st.builds(Peer, KEYS, st.lists(ADDRESSES, max_size=5).map(tuple))
OPTIONAL_KEYS = st.none() | KEYS
MESSAGES: dict[str, st.SearchStrategy[Any]] = {
    "requests": st.builds(
        Request,
        st.integers(0, 65535),
        ADDRESSES,
        NUMBERS,
        st.booleans(),
        OPTIONAL_KEYS,
        OPTIONAL_KEYS,
        OPTIONAL_KEYS,
        st.none() | st.binary(max_size=300),
    ),
    "responses": st.builds(
        Response,
        st.integers(0, 65535),
        ADDRESSES,
        OPTIONAL_KEYS,
        OPTIONAL_KEYS,
        st.lists(ADDRESSES, max_size=20).map(tuple),
        NUMBERS,
        st.none() | st.binary(max_size=300),
    ),
    "peer": PEERS,
    "announce": st.builds(Announce, st.none() | PEERS, OPTIONAL_KEYS, st.none() | SIGNATURES, NUMBERS),
    "lookup_reply": st.builds(LookupReply, st.lists(PEERS, max_size=5).map(tuple), NUMBERS),
    "mutable_put": st.builds(MutablePut, KEYS, NUMBERS, st.binary(max_size=300), SIGNATURES),
    "mutable_get_reply": st.builds(MutableGetReply, NUMBERS, st.binary(max_size=300), SIGNATURES),
    "plugin_request": st.builds(PluginRequest, st.text(), NUMBERS, NUMBERS, st.none() | st.binary(max_size=300)),
    "peer_address": st.builds(PeerAddress, KEYS, st.lists(ADDRESSES, max_size=5).map(tuple)),
}


@pytest.mark.parametrize("name", CODECS)
@PROPERTY
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[name])
    _, encode, decode = CODECS[name]
    assert decode(encode(message)) == message


@pytest.mark.parametrize("first", [0x00, 0x02, 0x12, 0x23, 0xFF])
def test_other_datagrams_are_no_messages(first: int) -> None:
    with pytest.raises(DecodeError):
        decode_message(bytes((first,)) + bytes(60))


def test_a_value_of_no_bytes_is_a_value() -> None:
    request = Request(1, ("10.1.2.3", 5), 0, value=b"")
    decoded = decode_message(encode_request(request))
    assert isinstance(decoded, Request)
    assert decoded.value == b""


@pytest.mark.parametrize("count", [65, 2**20, 2**50])
def test_a_long_list_of_nodes_is_refused(count: int) -> None:
    head = encode_response(Response(1, ("10.1.2.3", 5), closer_nodes=(("1.2.3.4", 5),)))
    with pytest.raises(DecodeError):
        decode_message(head[:10] + uint(count) + bytes(1200))


def test_fields_of_a_wrong_size_are_not_written() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        encode_request(Request(1, ("10.1.2.3", 5), 0, token=bytes(31)))
    with pytest.raises(ValueError, match="64 bytes"):
        encode_mutable_put(MutablePut(bytes(32), 0, b"", bytes(63)))
