"""Hashes, Ed25519 key pairs, signatures and boxes (ring 1).

Stands below everything that proves or hides something: `messages` bytes are signed here, `noise` takes its
Diffie-Hellman from here, `peer.punch_rounds` seals its payloads here. The primitives are libsodium's, through PyNaCl's
thin bindings (one-shot tools start in a fraction of a second: no heavier import here), and hashlib's BLAKE2b.
"""

import random
from hashlib import blake2b, sha512
from typing import Final

from nacl import bindings as sodium
from nacl.exceptions import CryptoError

from .constants import KEY_BYTES, SIGNATURE_BYTES, Command
from .errors import DecodeError

HASH_BYTES: Final = 32
SEED_BYTES: Final = 32


def hash(data: bytes, *more: bytes) -> bytes:
    """Return the unkeyed BLAKE2b-256 (32 bytes) of all arguments joined."""
    state = blake2b(data, digest_size=HASH_BYTES)
    for part in more:
        state.update(part)
    return state.digest()


def keyed_hash(data: bytes, key: bytes) -> bytes:
    """Return the BLAKE2b-256 (32 bytes) of `data` keyed with `key` (64 bytes at most)."""
    return blake2b(data, digest_size=HASH_BYTES, key=key).digest()


def namespace(name: str, number: int) -> bytes:
    """Return the 32 bytes that separate one use of a key from another; hypercore-crypto, namespace()."""
    return hash(hash(name.encode()), bytes([number]))


def _dht_namespace(command: Command) -> bytes:
    return namespace("hyperswarm/dht", command)


# hyperdht lib/constants.js, NS: the namespaces of the DHT bear the numbers of their commands.
NS_PEER_HANDSHAKE: Final = _dht_namespace(Command.PEER_HANDSHAKE)
NS_PEER_HOLEPUNCH: Final = _dht_namespace(Command.PEER_HOLEPUNCH)
NS_ANNOUNCE: Final = _dht_namespace(Command.ANNOUNCE)
NS_UNANNOUNCE: Final = _dht_namespace(Command.UNANNOUNCE)
NS_MUTABLE_PUT: Final = _dht_namespace(Command.MUTABLE_PUT)
NS_PLUGIN: Final = _dht_namespace(Command.PLUGIN)
# @hyperswarm/secret-stream index.js.
NS_INITIATOR: Final = namespace("hyperswarm/secret-stream", 0)
NS_RESPONDER: Final = namespace("hyperswarm/secret-stream", 1)
NS_SEND: Final = namespace("hyperswarm/secret-stream", 2)


class KeyPair:
    """An Ed25519 key pair: `public_key` of 32 bytes, `secret_key` of 64 (seed, then public key).

    Its repr shows neither the secret nor the public key: both would end in logs.
    """

    __slots__ = ("public_key", "secret_key")

    def __init__(self, public_key: bytes, secret_key: bytes) -> None:
        if len(public_key) != KEY_BYTES or len(secret_key) != SEED_BYTES + KEY_BYTES:
            raise ValueError("a public key has 32 bytes, a secret key 64")
        self.public_key: Final = public_key
        self.secret_key: Final = secret_key

    def __repr__(self) -> str:
        return "KeyPair()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyPair) and other.secret_key == self.secret_key

    def __hash__(self) -> int:
        return self.secret_key.__hash__()

    @classmethod
    def from_seed(cls, seed: bytes) -> "KeyPair":
        """Return the key pair of a 32-byte seed; ValueError for another length."""
        if len(seed) != SEED_BYTES:
            raise ValueError("a seed has 32 bytes")
        public_key, secret_key = sodium.crypto_sign_seed_keypair(seed)
        return cls(public_key, secret_key)

    @classmethod
    def generate(cls, rng: random.Random | None = None) -> "KeyPair":
        """Return a fresh key pair, from the system's randomness unless `rng` is given."""
        return cls.from_seed(sodium.randombytes(SEED_BYTES) if rng is None else rng.randbytes(SEED_BYTES))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes the pair was made from."""
        return self.secret_key[:SEED_BYTES]


def sign(key_pair: KeyPair, message: bytes) -> bytes:
    """Return the detached Ed25519 signature (64 bytes) of `message`."""
    return sodium.crypto_sign(message, key_pair.secret_key)[:SIGNATURE_BYTES]


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Tell whether `signature` is that of `message` by `public_key`; False for malformed arguments too."""
    if len(public_key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        sodium.crypto_sign_open(signature + message, public_key)
    except CryptoError:
        return False
    return True


def dh(key_pair: KeyPair, public_key: bytes) -> bytes:
    """Return the Diffie-Hellman secret (32 bytes) of our key pair and a peer's Ed25519 public key.

    The result is the compressed Edwards point, not an X25519 coordinate (noise-curve-ed index.js). Raises
    DecodeError for a point that is not canonical, of small order or outside the main subgroup.
    """
    if len(public_key) != KEY_BYTES:
        raise DecodeError("a public key has 32 bytes")
    scalar = bytearray(sha512(key_pair.seed).digest()[:KEY_BYTES])
    scalar[0] &= 248
    scalar[31] = scalar[31] & 127 | 64
    try:
        return sodium.crypto_scalarmult_ed25519_noclamp(bytes(scalar), public_key)
    except CryptoError as error:
        raise DecodeError("not a usable public key") from error


def announce_signable(
    target: bytes, node_id: bytes, token: bytes, peer_bytes: bytes, refresh: bytes | None, namespace: bytes
) -> bytes:
    """Return the 64 bytes that a server signs to announce or unannounce itself; hyperdht lib/persistent.js.

    `node_id` and `token` are those of the storing node, `peer_bytes` the encoded peer record exactly as sent,
    `namespace` is `NS_ANNOUNCE` or `NS_UNANNOUNCE`.
    """
    return namespace + hash(target, node_id, token, peer_bytes, refresh or b"")


class HolepunchBox:
    """Seals and opens holepunch payloads under one handshake's secret; hyperdht lib/secure-payload.js.

    Layout: nonce (24) | XSalsa20-Poly1305 box (16-byte tag first).
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != sodium.crypto_secretbox_KEYBYTES:
            raise ValueError("a box key has 32 bytes")
        self._key = key

    def seal(self, plaintext: bytes, rng: random.Random) -> bytes:
        """Return `plaintext` sealed under a fresh nonce from `rng`: 40 bytes longer."""
        nonce = rng.randbytes(sodium.crypto_secretbox_NONCEBYTES)
        return nonce + sodium.crypto_secretbox_easy(plaintext, nonce, self._key)

    def open(self, data: bytes) -> bytes:
        """Return the plaintext of `data`; raises DecodeError when it is short or not sealed under our key."""
        nonce, box = data[: sodium.crypto_secretbox_NONCEBYTES], data[sodium.crypto_secretbox_NONCEBYTES :]
        if len(box) < sodium.crypto_secretbox_MACBYTES:
            raise DecodeError("the box is too short")
        try:
            return sodium.crypto_secretbox_open_easy(box, nonce, self._key)
        except CryptoError as error:
            raise DecodeError("the box does not open") from error
