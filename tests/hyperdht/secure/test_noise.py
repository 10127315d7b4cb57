"""The Noise handshake against transcripts of hyperdht's NoiseWrap."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load, unhex

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.secure.noise import MESSAGE_1_OVERHEAD, MESSAGE_2_OVERHEAD, NoiseIK
from p2pclaude.hyperdht.secure.secretstream import stream_id

HANDSHAKES = load("noise")["handshakes"]
PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)


def pair_of(seed: int) -> tuple[NoiseIK, NoiseIK]:
    """Return both sides of a fresh handshake."""
    rng = random.Random(seed)
    client, server = KeyPair.generate(rng), KeyPair.generate(rng)
    initiator = NoiseIK.initiator(client, server.public_key, KeyPair.generate(rng))
    return initiator, NoiseIK.responder(server, KeyPair.generate(rng))


@pytest.mark.parametrize("vector", HANDSHAKES)
def test_transcript(vector: dict[str, str]) -> None:
    client, server = (KeyPair.from_seed(unhex(vector[name])) for name in ("initiator", "responder"))
    first, second = (KeyPair.from_seed(unhex(seed)) for seed in vector["ephemerals"])
    initiator = NoiseIK.initiator(client, server.public_key, first)
    responder = NoiseIK.responder(server, second)

    assert initiator.write_message(unhex(vector["payloads"][0])).hex() == vector["messages"][0]
    assert responder.read_message(unhex(vector["messages"][0])).hex() == vector["payloads"][0]
    assert responder.remote_public_key == client.public_key
    assert responder.write_message(unhex(vector["payloads"][1])).hex() == vector["messages"][1]
    assert initiator.read_message(unhex(vector["messages"][1])).hex() == vector["payloads"][1]

    for side, tx, rx in ((initiator, "tx", "rx"), (responder, "rx", "tx")):
        assert side.complete
        assert side.handshake_hash.hex() == vector["hash"]
        assert (side.tx_key.hex(), side.rx_key.hex()) == (vector[tx], vector[rx])
        assert side.holepunch_secret.hex() == vector["holepunch_secret"]
    assert stream_id(initiator.handshake_hash, False).hex() == vector["remote_id"]


def test_a_damaged_reply_does_not_spoil_the_attempt() -> None:
    initiator, responder = pair_of(1)
    responder.read_message(initiator.write_message(b"hello"))
    reply = responder.write_message(b"answer")
    for i in range(len(reply)):
        with pytest.raises(DecodeError):
            initiator.read_message(reply[:i])
        with pytest.raises(DecodeError):
            initiator.read_message(reply[:i] + bytes([reply[i] ^ 0x40]) + reply[i + 1 :])
    assert not initiator.complete
    assert initiator.read_message(reply) == b"answer"
    assert initiator.tx_key == responder.rx_key


def test_a_damaged_first_message_leaves_the_server_as_it_was() -> None:
    initiator, responder = pair_of(2)
    message = initiator.write_message(b"hello")
    for i in range(len(message)):
        with pytest.raises(DecodeError):
            responder.read_message(message[:i])
        with pytest.raises(DecodeError):
            responder.read_message(message[:i] + bytes([message[i] ^ 1]) + message[i + 1 :])
        assert not hasattr(responder, "remote_public_key")
    assert responder.read_message(message) == b"hello"


def test_a_message_for_another_server_is_refused() -> None:
    initiator, _ = pair_of(3)
    _, other = pair_of(4)
    with pytest.raises(DecodeError):
        other.read_message(initiator.write_message(b"hello"))


def test_copies_are_independent() -> None:
    initiator, responder = pair_of(5)
    message = initiator.write_message(b"hello")
    twin = responder.copy()
    assert responder.read_message(message) == twin.read_message(message) == b"hello"
    reply = responder.write_message(b"one")
    other = twin.write_message(b"two")
    reader = initiator.copy()
    assert (initiator.read_message(reply), reader.read_message(other)) == (b"one", b"two")
    assert initiator.handshake_hash != reader.handshake_hash
    assert initiator.handshake_hash == responder.handshake_hash


def test_an_unusable_server_key_is_refused() -> None:
    client = KeyPair.from_seed(bytes(32))
    for key in (bytes(32), b"\x01" + bytes(31), b"\xff" * 32, b"short"):
        initiator = NoiseIK.initiator(client, key, KeyPair.from_seed(bytes([1]) * 32))
        with pytest.raises(DecodeError):
            initiator.write_message(b"")


def test_turns_are_kept() -> None:
    initiator, responder = pair_of(6)
    for side, call in ((initiator, initiator.read_message), (responder, responder.write_message)):
        with pytest.raises(RuntimeError, match="turn"):
            call(b"")
        assert not side.complete
    message = initiator.write_message(b"")
    assert len(message) == MESSAGE_1_OVERHEAD
    with pytest.raises(RuntimeError, match="turn"):
        initiator.write_message(b"")
    responder.read_message(message)
    reply = responder.write_message(b"")
    assert len(reply) == MESSAGE_2_OVERHEAD
    initiator.read_message(reply)
    for call in (initiator.read_message, initiator.write_message, responder.read_message, responder.write_message):
        with pytest.raises(RuntimeError, match="turn"):
            call(reply)


def test_a_payload_has_a_limit() -> None:
    initiator, _ = pair_of(7)
    with pytest.raises(ValueError, match="too long"):
        initiator.write_message(bytes(65536))
    assert initiator.write_message(b"short")


@PROPERTY
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused(data: bytes, as_reply: bool) -> None:
    initiator, responder = pair_of(8)
    initiator.write_message(b"hello")
    with pytest.raises(DecodeError):
        (initiator if as_reply else responder).read_message(data)


@PROPERTY
@given(st.binary(max_size=900), st.binary(max_size=900), st.integers(0, 10**6))
def test_payloads_pass(hello: bytes, answer: bytes, seed: int) -> None:
    initiator, responder = pair_of(seed)
    assert responder.read_message(initiator.write_message(hello)) == hello
    assert initiator.read_message(responder.write_message(answer)) == answer
    assert (initiator.tx_key, initiator.rx_key) == (responder.rx_key, responder.tx_key)
