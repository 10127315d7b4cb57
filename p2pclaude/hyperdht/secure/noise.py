"""Noise IK over Ed25519: the two handshake messages between client and server (ring 1).

`peer` puts encoded noise payloads in and gets the bytes that PEER_HANDSHAKE carries; when both
messages are through, `secretstream` and `HolepunchBox` take their keys from here. Protocol name
Noise_IK_Ed25519_ChaChaPoly_BLAKE2b; noise-handshake noise.js, noise-curve-ed index.js, hyperdht lib/noise-wrap.js.
"""

import hmac
from copy import copy
from hashlib import blake2b
from typing import Final

from nacl import bindings as sodium
from nacl.exceptions import CryptoError

from ..constants import KEY_BYTES
from ..crypto import NS_PEER_HANDSHAKE, NS_PEER_HOLEPUNCH, KeyPair, dh, keyed_hash
from ..errors import DecodeError

_PROTOCOL: Final = b"Noise_IK_Ed25519_ChaChaPoly_BLAKE2b"
_TAG_BYTES: Final = 16
_SEALED_KEY_BYTES: Final = KEY_BYTES + _TAG_BYTES
_MAX_SEALED_BYTES: Final = 65535  # the Noise specification's limit, which the JavaScript checks by ciphertext
MESSAGE_1_OVERHEAD: Final = KEY_BYTES + _SEALED_KEY_BYTES + _TAG_BYTES
MESSAGE_2_OVERHEAD: Final = KEY_BYTES + _TAG_BYTES


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "blake2b")


def _hkdf(chaining_key: bytes, key_material: bytes) -> tuple[bytes, bytes]:
    """Return two outputs of 64 bytes; noise-handshake hkdf.js."""
    secret = _hmac(chaining_key, key_material)
    first = _hmac(secret, b"\x01")
    return first, _hmac(secret, first + b"\x02")


class _SymmetricState:
    """The running hash, the chaining key and the current cipher: Noise's SymmetricState and CipherState in one.

    All attributes are immutable, so a shallow copy is a copy.
    """

    __slots__ = ("chaining_key", "counter", "hash", "key")

    def __init__(self, responder_public_key: bytes) -> None:
        self.hash = _PROTOCOL.ljust(64, b"\0")
        self.chaining_key = self.hash
        self.key = b""
        self.counter = 0
        self.mix_hash(NS_PEER_HANDSHAKE)
        self.mix_hash(responder_public_key)

    def mix_hash(self, data: bytes) -> None:
        self.hash = blake2b(self.hash + data).digest()

    def mix_key(self, secret: bytes) -> None:
        self.chaining_key, key = _hkdf(self.chaining_key, secret)
        self.key, self.counter = key[:32], 0

    def seal(self, plaintext: bytes) -> bytes:
        sealed = sodium.crypto_aead_chacha20poly1305_ietf_encrypt(plaintext, self.hash, self._nonce(), self.key)
        if len(sealed) > _MAX_SEALED_BYTES:
            raise ValueError("the handshake payload is too long")
        self.mix_hash(sealed)
        return sealed

    def open(self, sealed: bytes) -> bytes:
        if not _TAG_BYTES <= len(sealed) <= _MAX_SEALED_BYTES:
            raise DecodeError("a handshake message of a wrong length")
        try:
            plaintext = sodium.crypto_aead_chacha20poly1305_ietf_decrypt(sealed, self.hash, self._nonce(), self.key)
        except CryptoError as error:
            raise DecodeError("a handshake message that does not open") from error
        self.mix_hash(sealed)
        return plaintext

    def _nonce(self) -> bytes:
        nonce = bytes(4) + self.counter.to_bytes(8, "little")
        self.counter += 1
        return nonce


class NoiseIK:
    """One side of one handshake.

    The initiator calls `write_message`, then `read_message`; the responder the reverse; `complete` is true after
    that, and the keys are there. A message that does not read leaves the object as it was: the same object may
    read the next reply, so that no relay can spoil an attempt with a bad one. `copy` is for whoever wants to
    read two good ones.
    """

    __slots__ = (
        "_ephemeral",
        "_key_pair",
        "_messages",
        "_remote_ephemeral",
        "_symmetric",
        "complete",
        "handshake_hash",
        "holepunch_secret",
        "is_initiator",
        "remote_public_key",
        "rx_key",
        "tx_key",
    )

    is_initiator: bool
    complete: bool
    remote_public_key: bytes
    """The peer's static key, 32 bytes; not set on the responder's side before it has read message 1."""
    handshake_hash: bytes
    """64 bytes that bind everything to this handshake; set when complete."""
    tx_key: bytes
    """32 bytes, the key of what we send; set when complete."""
    rx_key: bytes
    """32 bytes, the key of what we receive; set when complete."""
    holepunch_secret: bytes
    """32 bytes, the key of the holepunch payloads' box; set when complete."""

    def __init__(self, is_initiator: bool, key_pair: KeyPair, ephemeral: KeyPair, responder_key: bytes) -> None:
        self.is_initiator = is_initiator
        self.complete = False
        self._key_pair = key_pair
        self._ephemeral = ephemeral
        self._remote_ephemeral = b""
        self._messages = 0
        self._symmetric = _SymmetricState(responder_key)

    @classmethod
    def initiator(cls, key_pair: KeyPair, remote_public_key: bytes, ephemeral: KeyPair) -> "NoiseIK":
        """Return the client's side; `ephemeral` is a fresh key pair, used for this one handshake."""
        noise = cls(True, key_pair, ephemeral, remote_public_key)
        noise.remote_public_key = remote_public_key
        return noise

    @classmethod
    def responder(cls, key_pair: KeyPair, ephemeral: KeyPair) -> "NoiseIK":
        """Return the server's side; `ephemeral` is a fresh key pair, used for this one handshake."""
        return cls(False, key_pair, ephemeral, key_pair.public_key)

    def copy(self) -> "NoiseIK":
        """Return an independent handshake in the same state."""
        return copy(self)  # a step replaces attributes and never changes what they hold

    def write_message(self, payload: bytes) -> bytes:
        """Return our handshake message with `payload` sealed in it.

        Raises DecodeError for a peer key that is no usable point, RuntimeError out of turn.
        """
        self._check_turn(writing=True)
        symmetric = copy(self._symmetric)  # committed by _advance when all went well
        message = (self._write_1 if self.is_initiator else self._write_2)(symmetric, payload)
        self._advance(symmetric)
        return message

    def read_message(self, data: bytes) -> bytes:
        """Return the payload of the peer's handshake message.

        Raises DecodeError for anything that is not the peer's message, and then is as before; RuntimeError out
        of turn.
        """
        self._check_turn(writing=False)
        symmetric = copy(self._symmetric)
        payload = (self._read_2 if self.is_initiator else self._read_1)(symmetric, data)
        self._advance(symmetric)
        return payload

    # Message 1: e (32) | sealed s (48) | sealed payload (n + 16)
    # Message 2: e (32) | sealed payload (n + 16)

    def _write_1(self, symmetric: _SymmetricState, payload: bytes) -> bytes:
        symmetric.mix_hash(self._ephemeral.public_key)
        symmetric.mix_key(dh(self._ephemeral, self.remote_public_key))
        sealed_key = symmetric.seal(self._key_pair.public_key)
        symmetric.mix_key(dh(self._key_pair, self.remote_public_key))
        return self._ephemeral.public_key + sealed_key + symmetric.seal(payload)

    def _read_1(self, symmetric: _SymmetricState, data: bytes) -> bytes:
        if len(data) < MESSAGE_1_OVERHEAD:
            raise DecodeError("the first handshake message is too short")
        ephemeral, rest = data[:KEY_BYTES], data[KEY_BYTES:]
        symmetric.mix_hash(ephemeral)
        symmetric.mix_key(dh(self._key_pair, ephemeral))
        remote_public_key = symmetric.open(rest[:_SEALED_KEY_BYTES])
        symmetric.mix_key(dh(self._key_pair, remote_public_key))
        payload = symmetric.open(rest[_SEALED_KEY_BYTES:])
        self._remote_ephemeral, self.remote_public_key = ephemeral, remote_public_key
        return payload

    def _write_2(self, symmetric: _SymmetricState, payload: bytes) -> bytes:
        symmetric.mix_hash(self._ephemeral.public_key)
        symmetric.mix_key(dh(self._ephemeral, self._remote_ephemeral))
        symmetric.mix_key(dh(self._ephemeral, self.remote_public_key))
        return self._ephemeral.public_key + symmetric.seal(payload)

    def _read_2(self, symmetric: _SymmetricState, data: bytes) -> bytes:
        if len(data) < MESSAGE_2_OVERHEAD:
            raise DecodeError("the second handshake message is too short")
        ephemeral, rest = data[:KEY_BYTES], data[KEY_BYTES:]
        symmetric.mix_hash(ephemeral)
        symmetric.mix_key(dh(self._ephemeral, ephemeral))
        symmetric.mix_key(dh(self._key_pair, ephemeral))
        return symmetric.open(rest)

    def _check_turn(self, writing: bool) -> None:
        ours = (self._messages == 0) == self.is_initiator
        if self.complete or ours != writing:
            raise RuntimeError("not this side's turn in the handshake")

    def _advance(self, symmetric: _SymmetricState) -> None:
        self._symmetric = symmetric
        self._messages += 1
        if self._messages < 2:
            return
        first, second = (key[:32] for key in _hkdf(symmetric.chaining_key, b""))
        self.tx_key, self.rx_key = (first, second) if self.is_initiator else (second, first)
        self.handshake_hash = symmetric.hash
        self.holepunch_secret = keyed_hash(NS_PEER_HOLEPUNCH, symmetric.hash)
        self.complete = True
