"""The encryption of a connection: messages to frames on the UDX stream and back (ring 1).

Between `streams`, which carries bytes, and the connection's reader and writer. Keys come from a completed `NoiseIK`.
Source: @hyperswarm/secret-stream index.js, libsodium's crypto_secretstream_xchacha20poly1305.

Frame: u24 length (little-endian) | body. The first frame each way has 56 bytes: stream id of the sender's role (32),
secretstream header (24). The body of every later one is a secretstream message: plaintext + 17 bytes. UDX MESSAGE
packets carry, apart from the stream: counter (8) | XSalsa20-Poly1305 box under nonce counter || 16 zero bytes.
"""

import random
from typing import Final

from nacl import bindings as sodium
from nacl.exceptions import CryptoError

from ..crypto import NS_INITIATOR, NS_RESPONDER, NS_SEND, keyed_hash
from ..errors import DecodeError

FRAME_BYTES: Final = 16384
"""Plaintext of one frame when `encrypt` splits: nothing of a frame can be read before its last byte is there."""
OVERHEAD: Final = sodium.crypto_secretstream_xchacha20poly1305_ABYTES
MAX_FRAME_BYTES: Final = 0xFFFFFF - OVERHEAD
MESSAGE_OVERHEAD: Final = 8 + sodium.crypto_secretbox_MACBYTES

_ID_BYTES: Final = 32
_HEADER_BYTES: Final = sodium.crypto_secretstream_xchacha20poly1305_HEADERBYTES
_COUNTER_LIMIT: Final = 1 << 64
_SCRATCH_BYTES: Final = 1 << 20


def stream_id(handshake_hash: bytes, is_initiator: bool) -> bytes:
    """Return the 32 bytes by which that side opens its direction of the stream."""
    return keyed_hash(NS_INITIATOR if is_initiator else NS_RESPONDER, handshake_hash)


def _message_key(handshake_hash: bytes, is_initiator: bool) -> bytes:
    return keyed_hash((NS_INITIATOR if is_initiator else NS_RESPONDER) + NS_SEND, handshake_hash)


class SecretStream:
    """Both directions of one encrypted connection.

    Send `header()` first, then what `encrypt` returns, in that order; give `receive_data` the peer's bytes in order,
    however they are cut. Holds one unfinished frame at most, and of it only what has arrived.
    """

    def __init__(
        self, is_initiator: bool, handshake_hash: bytes, tx_key: bytes, rx_key: bytes, rng: random.Random | None = None
    ) -> None:
        self.opened = False
        """Whether the peer's header has arrived and was right."""
        self.max_frame_bytes = MAX_FRAME_BYTES
        """Plaintext of the largest frame that is taken: what an unfinished one may keep in memory."""
        random_bytes = sodium.randombytes if rng is None else rng.randbytes
        self._header = stream_id(handshake_hash, is_initiator) + random_bytes(_HEADER_BYTES)
        self._header_sent = False
        # libsodium's init_push draws the header itself and is otherwise the same as init_pull.
        self._push = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(self._push, self._header[_ID_BYTES:], tx_key)
        self._pull = sodium.crypto_secretstream_xchacha20poly1305_state()
        self._rx_key = rx_key
        self._remote_id = stream_id(handshake_hash, not is_initiator)
        self._buffer = bytearray()
        self._failed = False
        self._send_key = _message_key(handshake_hash, is_initiator)
        self._receive_key = _message_key(handshake_hash, not is_initiator)
        self._counter = int.from_bytes(random_bytes(8), "little")
        self._counters_left = _COUNTER_LIMIT - 1

    @property
    def buffered(self) -> int:
        """The number of received bytes that wait for the rest of their frame."""
        return len(self._buffer)

    def forget(self) -> None:
        """Drop all that takes room: the stream is over, though its object may still be kept."""
        self._buffer = bytearray()
        self._push.rawbuf = self._pull.rawbuf = None
        self._failed = True

    def header(self) -> bytes:
        """Return the frame that opens our direction; RuntimeError the second time."""
        if self._header_sent:
            raise RuntimeError("the header was sent already")
        self._header_sent = True
        return _frame(self._header)

    def encrypt(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        """Return `plaintext` as frames of up to `FRAME_BYTES` each; empty plaintext is one empty frame.

        The peer gets the same bytes, in other portions: where portions matter use `encrypt_frame`.
        """
        if len(plaintext) <= FRAME_BYTES:
            return self.encrypt_frame(bytes(plaintext))
        view = memoryview(plaintext)
        starts = range(0, len(view), FRAME_BYTES)
        return b"".join([self.encrypt_frame(bytes(view[start : start + FRAME_BYTES])) for start in starts])

    def encrypt_frame(self, plaintext: bytes) -> bytes:
        """Return `plaintext` as one frame; ValueError over `MAX_FRAME_BYTES`, RuntimeError before `header`."""
        if not self._header_sent:
            raise RuntimeError("the header comes first")
        if len(plaintext) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame holds {MAX_FRAME_BYTES} bytes at most")
        body = sodium.crypto_secretstream_xchacha20poly1305_push(self._push, plaintext)
        _free_scratch(self._push, len(body))
        return _frame(body)

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Take bytes from the peer and return the messages they complete, empty ones (keep-alives) included.

        Raises DecodeError for a wrong header, length or tag, and at every call after that.
        """
        if self._failed:
            raise DecodeError("the stream is broken")
        try:
            return self._take_messages(data)
        except DecodeError:
            self._failed = True
            self._buffer.clear()
            raise

    def _take_messages(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        messages = []
        buffer: bytes | bytearray | memoryview = data  # most packets begin with a frame, and need no copy
        if self._buffer:
            self._buffer += data
            buffer = self._buffer
        start = 0
        while len(buffer) - start >= 3:
            size = buffer[start] | buffer[start + 1] << 8 | buffer[start + 2] << 16
            self._check_size(size)
            end = start + 3 + size
            if end > len(buffer):
                break
            body = bytes(buffer[start + 3 : end])
            if self.opened:
                messages.append(self._decrypt(body))
            else:
                self._open(body)
            start = end
        if self._buffer:
            del self._buffer[:start]  # costs nothing: CPython moves the beginning, not the bytes
        elif start < len(data):
            self._buffer += data[start:]
        return messages

    def _check_size(self, size: int) -> None:
        """Refuse an impossible length as soon as it is announced."""
        if size < OVERHEAD if self.opened else size != _ID_BYTES + _HEADER_BYTES:
            raise DecodeError("a frame of an impossible length")
        if self.opened and size > self.max_frame_bytes + OVERHEAD:
            raise DecodeError("a frame that is too large")

    def _open(self, body: bytes) -> None:
        if body[:_ID_BYTES] != self._remote_id:
            raise DecodeError("the stream is not the one of this handshake")
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(self._pull, body[_ID_BYTES:], self._rx_key)
        self.opened = True

    def _decrypt(self, body: bytes) -> bytes:
        try:
            message, _tag = sodium.crypto_secretstream_xchacha20poly1305_pull(self._pull, body)
        except CryptoError as error:
            raise DecodeError("a frame that does not decrypt") from error
        _free_scratch(self._pull, len(body))
        return message

    def encrypt_message(self, plaintext: bytes) -> bytes:
        """Return `plaintext` sealed for one UDX MESSAGE packet: may be lost, repeated or late. 24 bytes longer."""
        if self._counters_left == 0:
            raise RuntimeError("all message counters are used up")
        self._counters_left -= 1
        self._counter = (self._counter + 1) % _COUNTER_LIMIT
        counter = self._counter.to_bytes(8, "little")
        return counter + sodium.crypto_secretbox_easy(plaintext, counter + bytes(16), self._send_key)

    def decrypt_message(self, data: bytes) -> bytes:
        """Open the contents of a UDX MESSAGE packet; DecodeError for others, which harm nothing."""
        if len(data) < MESSAGE_OVERHEAD:
            raise DecodeError("the message is too short")
        try:
            return sodium.crypto_secretbox_open_easy(data[8:], data[:8] + bytes(16), self._receive_key)
        except CryptoError as error:
            raise DecodeError("the message does not open") from error


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(3, "little") + body


def _free_scratch(state: sodium.crypto_secretstream_xchacha20poly1305_state, size: int) -> None:
    """Drop the buffer that PyNaCl keeps with the state when a rare big frame has made it big."""
    if size > _SCRATCH_BYTES:
        state.rawbuf = None
