"""Hashes, keys, signatures and boxes against hyperdht's and noise-curve-ed's."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import address, load, unhex, unhex_or_none

from p2pclaude.hyperdht import crypto
from p2pclaude.hyperdht.crypto import (
    NS_ANNOUNCE,
    NS_MUTABLE_PUT,
    NS_UNANNOUNCE,
    HolepunchBox,
    KeyPair,
    announce_signable,
    dh,
    keyed_hash,
    sign,
    verify,
)
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.rpc.messages import encode_mutable_signable, node_id

VECTORS = load("crypto")
PROPERTY = settings(max_examples=150, derandomize=True, deadline=None)


class FixedRandom(random.Random):
    """Gives the bytes it was made with, once."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data

    def randbytes(self, n: int) -> bytes:
        taken, self._data = self._data[:n], self._data[n:]
        assert len(taken) == n
        return taken


@pytest.mark.parametrize(("name", "value"), VECTORS["namespaces"])
def test_namespaces(name: str, value: str) -> None:
    assert getattr(crypto, f"NS_{name}").hex() == value


@pytest.mark.parametrize(("data", "digest"), VECTORS["hashes"])
def test_hash(data: str, digest: str) -> None:
    plain = unhex(data)
    assert blake2b(plain).hex() == digest
    assert blake2b(plain[:3], plain[3:5], plain[5:]).hex() == digest


@pytest.mark.parametrize("vector", VECTORS["key_pairs"])
def test_key_pair(vector: dict[str, str]) -> None:
    pair = KeyPair.from_seed(unhex(vector["seed"]))
    assert pair.public_key.hex() == vector["public_key"]
    assert pair.secret_key.hex() == vector["secret_key"]
    assert pair.seed.hex() == vector["seed"]
    assert KeyPair.generate(FixedRandom(pair.seed)) == pair


def test_generated_key_pairs_differ_unless_seeded() -> None:
    assert KeyPair.generate() != KeyPair.generate()
    assert KeyPair.generate(random.Random(7)) == KeyPair.generate(random.Random(7))


def test_a_key_pair_shows_nothing_of_itself() -> None:
    pair = KeyPair.from_seed(bytes(range(32)))
    assert repr(pair) == "KeyPair()"
    assert str(pair.public_key) not in str(pair)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_seed_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        KeyPair.from_seed(bytes(size))
    with pytest.raises(ValueError, match="32 bytes"):
        KeyPair(bytes(size), bytes(64))


@pytest.mark.parametrize("vector", VECTORS["dh"])
def test_dh(vector: dict[str, str]) -> None:
    assert dh(KeyPair.from_seed(unhex(vector["seed"])), unhex(vector["public_key"])).hex() == vector["secret"]


def test_dh_agrees() -> None:
    a, b = KeyPair.from_seed(bytes(32)), KeyPair.from_seed(bytes([1]) * 32)
    assert dh(a, b.public_key) == dh(b, a.public_key)


# Points of small order: 0, 1, -1, and two of order eight (RFC 7748 and its errata list them); then a point with a
# component of order eight added, which is not of small order but outside of the main subgroup.
ORDER_EIGHT = "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"
REFUSED = [*VECTORS["refused_points"], ORDER_EIGHT, "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"]


@pytest.mark.parametrize("point", REFUSED)
def test_dh_refuses_bad_points(point: str) -> None:
    with pytest.raises(DecodeError):
        dh(KeyPair.from_seed(bytes(32)), unhex(point))


def test_dh_refuses_a_point_outside_the_main_subgroup() -> None:
    from nacl.bindings import crypto_core_ed25519_add

    mixed = crypto_core_ed25519_add(KeyPair.from_seed(bytes(32)).public_key, unhex(ORDER_EIGHT))
    with pytest.raises(DecodeError):
        dh(KeyPair.from_seed(bytes([1]) * 32), mixed)


@PROPERTY
@given(st.binary(max_size=40) | st.binary(min_size=32, max_size=32))
def test_dh_takes_any_bytes(point: bytes) -> None:
    try:
        assert len(dh(KeyPair.from_seed(bytes(32)), point)) == 32
    except DecodeError:
        pass


@pytest.mark.parametrize(("text", "expected"), VECTORS["node_ids"])
def test_node_id(text: str, expected: str) -> None:
    assert node_id(address(text)).hex() == expected


@pytest.mark.parametrize("vector", VECTORS["announces"])
def test_announce_signatures(vector: dict[str, Any]) -> None:
    pair = KeyPair.from_seed(unhex(vector["seed"]))
    target, token, stored_at, peer = (unhex(vector[name]) for name in ("target", "token", "node_id", "peer"))
    for name, namespace in (("announce", NS_ANNOUNCE), ("unannounce", NS_UNANNOUNCE)):
        signable = announce_signable(target, stored_at, token, peer, unhex_or_none(vector["refresh"]), namespace)
        assert len(signable) == 64
        assert sign(pair, signable).hex() == vector[name]
        assert verify(pair.public_key, signable, unhex(vector[name]))


@pytest.mark.parametrize("vector", VECTORS["mutables"])
def test_mutable_signatures(vector: dict[str, Any]) -> None:
    pair = KeyPair.from_seed(unhex(vector["seed"]))
    signable = NS_MUTABLE_PUT + blake2b(encode_mutable_signable(vector["seq"], unhex(vector["value"])))
    assert sign(pair, signable).hex() == vector["signature"]
    assert verify(pair.public_key, signable, unhex(vector["signature"]))


def test_verify_sees_every_changed_bit() -> None:
    pair = KeyPair.from_seed(bytes(32))
    signature = sign(pair, b"message")
    for bit in range(512):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        assert not verify(pair.public_key, b"message", bytes(changed))
    assert not verify(pair.public_key, b"messagf", signature)
    assert not verify(KeyPair.from_seed(bytes([1]) * 32).public_key, b"message", signature)


@PROPERTY
@given(st.binary(max_size=64), st.binary(max_size=20), st.binary(max_size=70))
def test_verify_never_raises(public_key: bytes, message: bytes, signature: bytes) -> None:
    assert not verify(public_key, message, signature)


@pytest.mark.parametrize("point", REFUSED)
def test_verify_refuses_bad_points(point: str) -> None:
    assert not verify(unhex(point), b"", bytes(64))


@pytest.mark.parametrize("vector", VECTORS["boxes"])
def test_holepunch_box(vector: dict[str, str]) -> None:
    box, sealed = HolepunchBox(unhex(vector["key"])), unhex(vector["box"])
    assert box.open(sealed).hex() == vector["plaintext"]
    assert box.seal(unhex(vector["plaintext"]), FixedRandom(sealed[:24])) == sealed
    assert keyed_hash(vector["host"].encode(), unhex(vector["local_secret"])).hex() == vector["token"]


def test_a_damaged_box_does_not_open() -> None:
    box = HolepunchBox(bytes(32))
    sealed = box.seal(b"plaintext", random.Random(1))
    for i in range(len(sealed)):
        with pytest.raises(DecodeError):
            box.open(sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :])
        with pytest.raises(DecodeError):
            box.open(sealed[:i])
    with pytest.raises(DecodeError):
        HolepunchBox(bytes([1]) * 32).open(sealed)


@PROPERTY
@given(st.binary(max_size=100), st.integers())
def test_box_round_trip(plaintext: bytes, seed: int) -> None:
    box, rng = HolepunchBox(bytes(32)), random.Random(seed)
    first, second = box.seal(plaintext, rng), box.seal(plaintext, rng)
    assert first != second
    assert box.open(first) == box.open(second) == plaintext


def test_a_key_pair_is_its_secret_key() -> None:
    pair, same, other = KeyPair.from_seed(bytes(32)), KeyPair.from_seed(bytes(32)), KeyPair.from_seed(b"\x01" * 32)
    assert pair == same and hash(pair) == hash(same) and len({pair, same, other}) == 2


@pytest.mark.parametrize(("key_bytes", "signature_bytes"), [(31, 64), (32, 63), (33, 64), (32, 65), (31, 63)])
def test_keys_and_signatures_of_another_length_verify_nothing(key_bytes: int, signature_bytes: int) -> None:
    pair = KeyPair.from_seed(bytes(32))
    signature = sign(pair, b"message")
    key = (pair.public_key + bytes(1))[:key_bytes]
    assert not verify(key, b"message", (signature + bytes(1))[:signature_bytes])
