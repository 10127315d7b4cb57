"""The secret stream against frames that @hyperswarm/secret-stream wrote."""

import random
import time
import tracemalloc
from typing import Any

import pytest
from hyperdht.test_crypto import FixedRandom
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load, unhex

from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.secure.secretstream import FRAME_BYTES, MAX_FRAME_BYTES, OVERHEAD, SecretStream

STREAMS = load("secretstream")["streams"]
PROPERTY = settings(max_examples=80, derandomize=True, deadline=None)
HASH, KEY_1, KEY_2 = bytes(64), bytes([1]) * 32, bytes([2]) * 32


def both_ends(seed: int = 0) -> tuple[SecretStream, SecretStream]:
    """Return an initiator and a responder that know each other's keys."""
    rng = random.Random(seed)
    return SecretStream(True, HASH, KEY_1, KEY_2, rng), SecretStream(False, HASH, KEY_2, KEY_1, rng)


def opened() -> tuple[SecretStream, SecretStream]:
    """Return both ends, the responder with the initiator's header read."""
    sender, receiver = both_ends()
    assert receiver.receive_data(sender.header()) == []
    return sender, receiver


def sides(v: dict[str, Any]) -> tuple[SecretStream, SecretStream]:
    """Return our stand-in for the vector's side and one for its peer."""
    tx, rx, handshake_hash = unhex(v["tx"]), unhex(v["rx"]), unhex(v["hash"])
    rng = FixedRandom(unhex(v["header"]) + unhex(v["counter"]))
    same = SecretStream(v["is_initiator"], handshake_hash, tx, rx, rng)
    # sodium_increment counts as a little-endian number, as we do.
    return same, SecretStream(not v["is_initiator"], handshake_hash, rx, tx)


@pytest.mark.parametrize("vector", STREAMS)
def test_golden_frames(vector: dict[str, Any]) -> None:
    same, peer = sides(vector)
    plaintexts = [unhex(text) for text in vector["plaintexts"]]
    assert [same.header().hex(), *(same.encrypt(text).hex() for text in plaintexts)] == vector["frames"]
    assert peer.receive_data(b"".join(map(unhex, vector["frames"]))) == plaintexts
    assert peer.opened


@pytest.mark.parametrize("vector", STREAMS)
def test_golden_frames_byte_by_byte(vector: dict[str, Any]) -> None:
    _, peer = sides(vector)
    stream = b"".join(map(unhex, vector["frames"]))
    messages = [message for i in range(len(stream)) for message in peer.receive_data(stream[i : i + 1])]
    assert messages == [unhex(text) for text in vector["plaintexts"]]


@pytest.mark.parametrize("vector", STREAMS)
def test_golden_messages(vector: dict[str, Any]) -> None:
    same, peer = sides(vector)
    for plain, sealed in zip(vector["messages"], vector["sealed"], strict=True):
        assert same.encrypt_message(unhex(plain)).hex() == sealed
        assert peer.decrypt_message(unhex(sealed)).hex() == plain


@PROPERTY
@given(st.lists(st.integers(0, 3000), max_size=8), st.integers(1, 4000), st.integers(0, 10**6))
def test_any_chunks_give_the_same_messages(sizes: list[int], largest: int, seed: int) -> None:
    rng = random.Random(seed)
    sender, receiver = both_ends()
    messages = [rng.randbytes(size) for size in sizes]
    stream = sender.header() + b"".join([sender.encrypt(message) for message in messages])
    received = []
    while stream:
        size = rng.randint(0, largest)
        received += receiver.receive_data(stream[:size])
        stream = stream[size:]
    assert received == messages
    assert receiver.buffered == 0


@pytest.mark.parametrize("size", [FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 5 * FRAME_BYTES, 10**6])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_big_plaintext_is_split(size: int, kind: type) -> None:
    sender, receiver = opened()
    plaintext = random.Random(size).randbytes(size)
    messages = receiver.receive_data(sender.encrypt(kind(plaintext)))
    assert b"".join(messages) == plaintext
    assert all(0 < len(message) <= FRAME_BYTES for message in messages)
    assert len(messages) == -(-size // FRAME_BYTES)


def test_one_frame_can_be_as_big_as_the_format_allows() -> None:
    sender, receiver = opened()
    stream = sender.encrypt_frame(bytes(MAX_FRAME_BYTES))
    assert stream[:3] == b"\xff\xff\xff"
    assert receiver.receive_data(stream[:-1]) == []
    assert receiver.receive_data(stream[-1:]) == [bytes(MAX_FRAME_BYTES)]
    assert receiver.receive_data(sender.encrypt(b"after")) == [b"after"]
    with pytest.raises(ValueError, match="at most"):
        sender.encrypt_frame(bytes(MAX_FRAME_BYTES + 1))


def test_frames_can_be_limited() -> None:
    sender, receiver = opened()
    receiver.max_frame_bytes = 100
    assert receiver.receive_data(sender.encrypt_frame(bytes(100))) == [bytes(100)]
    with pytest.raises(DecodeError, match="too large"):
        receiver.receive_data(sender.encrypt_frame(bytes(101))[:3])


def test_an_announced_length_takes_no_memory() -> None:
    _, receiver = opened()
    tracemalloc.start()
    try:
        assert receiver.receive_data(b"\xff\xff\xff" + bytes(1000)) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert receiver.buffered == 1003


def test_small_chunks_do_not_move_what_is_buffered() -> None:
    # A frame of 16 MiB is the worst case: moved at each chunk it would be 100 GB, many seconds instead of 0.1.
    sender, receiver = opened()
    stream = memoryview(sender.encrypt_frame(bytes(MAX_FRAME_BYTES)))
    began = time.process_time()
    received = [m for i in range(0, len(stream), 1152) for m in receiver.receive_data(stream[i : i + 1152])]
    assert [len(message) for message in received] == [MAX_FRAME_BYTES]
    assert time.process_time() - began < 3


def test_a_big_frame_leaves_no_memory_behind() -> None:
    sender, receiver = opened()
    receiver.receive_data(sender.encrypt_frame(bytes(4 << 20)))
    # PyNaCl's scratch buffers, which no Python tool can see, would stay with the states.
    assert sender._push.rawbuf is None
    assert receiver._pull.rawbuf is None
    assert receiver.receive_data(sender.encrypt(b"after")) == [b"after"]


def test_bulk_arrives_whole() -> None:
    sender, receiver = opened()
    plaintext = random.Random(3).randbytes(8 << 20)
    stream = memoryview(sender.encrypt(plaintext))
    received = [m for i in range(0, len(stream), 1152) for m in receiver.receive_data(stream[i : i + 1152])]
    assert b"".join(received) == plaintext
    assert receiver.buffered == 0


def refuse(receiver: SecretStream, data: bytes) -> None:
    """Expect that these bytes break the stream for good."""
    with pytest.raises(DecodeError):
        receiver.receive_data(data)
    with pytest.raises(DecodeError):
        receiver.receive_data(b"")
    assert receiver.buffered == 0


def test_every_changed_byte_breaks_the_stream() -> None:
    sender, _ = both_ends()
    header, frame = sender.header(), sender.encrypt(b"message")
    for i in range(len(frame)):
        _, receiver = both_ends()
        receiver.receive_data(header)
        # A changed length may announce more than there is: the next frame then completes the wrong one.
        changed = frame[:i] + bytes([frame[i] ^ 1]) + frame[i + 1 :]
        refuse(receiver, changed + bytes(70000))
    for i in range(3 + 32):
        _, receiver = both_ends()
        refuse(receiver, header[:i] + bytes([header[i] ^ 1]) + header[i + 1 :])


def test_a_changed_header_shows_in_the_first_frame() -> None:
    sender, receiver = both_ends()
    header = bytearray(sender.header())
    header[-1] ^= 1
    receiver.receive_data(header)
    refuse(receiver, sender.encrypt(b"message"))


@pytest.mark.parametrize("size", [0, 1, 55, 57, 0xFFFFFF])
def test_a_header_of_another_length_is_refused_at_once(size: int) -> None:
    _, receiver = both_ends()
    refuse(receiver, size.to_bytes(3, "little"))


@pytest.mark.parametrize("size", [0, 1, OVERHEAD - 1])
def test_a_frame_too_short_is_refused_at_once(size: int) -> None:
    _, receiver = opened()
    refuse(receiver, size.to_bytes(3, "little"))


def test_our_own_header_is_not_the_peers() -> None:
    sender, _ = both_ends()
    refuse(sender, sender.header())


def test_frames_out_of_order_repeated_or_missing_are_refused() -> None:
    for order in ((1, 0), (0, 0), (0, 2)):
        sender, receiver = opened()
        frames = [sender.encrypt(bytes([i])) for i in range(3)]
        refuse(receiver, frames[order[0]] + frames[order[1]])


def test_the_header_goes_first_and_once() -> None:
    sender, _ = both_ends()
    with pytest.raises(RuntimeError, match="first"):
        sender.encrypt(b"early")
    sender.header()
    with pytest.raises(RuntimeError, match="already"):
        sender.header()


def test_streams_without_rng_differ() -> None:
    first, second = (SecretStream(True, HASH, KEY_1, KEY_2) for _ in range(2))
    assert first.header() != second.header()
    assert first.encrypt_message(b"x") != second.encrypt_message(b"x")


@PROPERTY
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_messages_or_decode_error(data: bytes, with_header: bool) -> None:
    _, receiver = opened() if with_header else both_ends()
    try:
        assert receiver.receive_data(data) == []
    except DecodeError:
        pass


@PROPERTY
@given(st.binary(max_size=100))
def test_any_message_is_refused(data: bytes) -> None:
    _, receiver = both_ends()
    with pytest.raises(DecodeError):
        receiver.decrypt_message(data)


def test_messages_pass_in_any_order_and_again() -> None:
    sender, receiver = both_ends()
    sealed = [sender.encrypt_message(bytes([i])) for i in range(5)]
    assert [receiver.decrypt_message(sealed[i]) for i in (4, 0, 0, 2)] == [b"\x04", b"\x00", b"\x00", b"\x02"]
    with pytest.raises(DecodeError):
        sender.decrypt_message(sealed[0])


def test_a_bad_message_harms_nothing() -> None:
    sender, receiver = opened()
    with pytest.raises(DecodeError):
        receiver.decrypt_message(bytes(40))
    assert receiver.receive_data(sender.encrypt(b"fine")) == [b"fine"]


def test_the_message_counter_wraps() -> None:
    sender = SecretStream(True, HASH, KEY_1, KEY_2, FixedRandom(bytes(24) + b"\xff" * 8))
    assert sender.encrypt_message(b"")[:8] == bytes(8)
    assert sender.encrypt_message(b"")[:8] == b"\x01" + bytes(7)


def test_who_forgot_the_stream_reads_no_more() -> None:
    sender, receiver = opened()
    receiver.forget()
    with pytest.raises(DecodeError):
        receiver.receive_data(sender.encrypt(b"late"))
    assert receiver.buffered == 0


def test_a_stream_has_as_many_message_counters_as_fit_in_eight_bytes() -> None:
    sender = SecretStream(True, HASH, KEY_1, KEY_2, FixedRandom(bytes(32)))
    sender.encrypt_message(b"")
    assert sender._counters_left == 2**64 - 2
    sender._counters_left = 1
    sender.encrypt_message(b"")
    with pytest.raises(RuntimeError):
        sender.encrypt_message(b"")
