"""The record stores over virtual time."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pclaude.hyperdht.constants import ErrorCode
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.node.forwards import ANNOUNCE_LIFETIME, CAPACITY
from p2pclaude.hyperdht.rpc.messages import MutableGetReply
from p2pclaude.hyperdht.storage.records import (
    VALUE_LIFETIME,
    ImmutableStore,
    MutableStore,
    RecordStore,
    Refresh,
    RefreshStore,
    check_mutable_put,
)

PROPERTY = settings(max_examples=100, derandomize=True, deadline=None)
TOPIC, OTHER_TOPIC = bytes(32), bytes([1]) * 32


def key(number: int) -> bytes:
    """Return a public key."""
    return number.to_bytes(32, "big")


# Announcements


def test_announced_records_are_found_and_age() -> None:
    store, rng = RecordStore(), random.Random(1)
    store.add(TOPIC, key(1), b"one", now=0.0)
    store.add(TOPIC, key(2), b"two", now=600.0)
    store.add(OTHER_TOPIC, key(1), b"elsewhere", now=600.0)
    assert sorted(store.get(TOPIC, 20, rng, now=600.0)) == [b"one", b"two"]
    assert store.get(TOPIC, 20, rng, now=ANNOUNCE_LIFETIME) == [b"two"]
    assert store.get(OTHER_TOPIC, 20, rng, now=ANNOUNCE_LIFETIME) == [b"elsewhere"]
    assert store.get(TOPIC, 20, rng, now=600.0 + ANNOUNCE_LIFETIME) == []
    assert len(store) == 0


def test_announcing_again_replaces_the_record_and_renews_it() -> None:
    store, rng = RecordStore(), random.Random(1)
    store.add(TOPIC, key(1), b"old relays", now=0.0)
    store.add(TOPIC, key(1), b"new relays", now=1000.0)
    assert store.get(TOPIC, 20, rng, now=1000.0 + ANNOUNCE_LIFETIME - 1) == [b"new relays"]
    assert len(store) == 1


def test_a_record_can_be_removed() -> None:
    store, rng = RecordStore(), random.Random(1)
    for i in range(5):
        store.add(TOPIC, key(i), b"%d" % i, now=0.0)
    assert store.remove(TOPIC, key(1))
    assert not store.remove(TOPIC, key(1))
    assert not store.remove(OTHER_TOPIC, key(2))
    assert sorted(store.get(TOPIC, 20, rng, now=0.0)) == [b"0", b"2", b"3", b"4"]
    for i in (4, 0, 2, 3):
        assert store.remove(TOPIC, key(i))
    assert store.get(TOPIC, 20, rng, now=0.0) == []


def test_lookups_draw_evenly() -> None:
    store, rng = RecordStore(), random.Random(1)
    for i in range(100):
        store.add(TOPIC, key(i), b"%d" % i, now=0.0)
    draws: Counter[bytes] = Counter()
    for _ in range(500):
        found = store.get(TOPIC, 20, rng, now=0.0)
        assert len(set(found)) == 20
        draws.update(found)
    assert len(draws) == 100
    assert 60 < min(draws.values()) <= max(draws.values()) < 150


def test_records_have_a_bound() -> None:
    store, rng = RecordStore(capacity=10), random.Random(1)
    for i in range(30):
        store.add(key(i % 3), key(i), b"%d" % i, now=float(i))
    assert len(store) == 10
    found = sorted(int(record) for topic in range(3) for record in store.get(key(topic), 20, rng, now=30.0))
    assert found == list(range(20, 30))


def test_the_default_bound_is_held_under_a_flood() -> None:
    store = RecordStore()
    for i in range(CAPACITY + 1000):
        store.add(TOPIC, key(i), b"r", now=0.0)
    assert len(store) == CAPACITY
    assert len(store.get(TOPIC, 20, random.Random(1), now=1.0)) == 20


@PROPERTY
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 6), st.floats(0, 400)), max_size=60))
def test_records_against_a_plain_model(steps: list[tuple[bool, int, int, float]]) -> None:
    store, rng, now = RecordStore(capacity=1000, lifetime=1000.0), random.Random(1), 0.0
    model: dict[tuple[int, int], tuple[float, bytes]] = {}
    for i, (is_add, topic, peer, wait) in enumerate(steps):
        now += wait
        model = {name: entry for name, entry in model.items() if now < entry[0]}
        if is_add:
            store.add(key(topic), key(peer), b"%d" % i, now)
            model[topic, peer] = (now + 1000.0, b"%d" % i)
        else:
            store.remove(key(topic), key(peer))
            model.pop((topic, peer), None)
        for t in range(3):
            expected = sorted(record for name, (_, record) in model.items() if name[0] == t)
            assert sorted(store.get(key(t), 100, rng, now)) == expected
    assert len(store) == len(model)


def test_a_bump_grows_only_and_is_not_from_the_future() -> None:
    store, wall = RecordStore(), 1_700_000_000_000
    assert store.bump(TOPIC, now=0.0) == 0
    assert store.set_bump(TOPIC, wall, now=0.0, wall_ms=wall)
    assert not store.set_bump(TOPIC, wall, now=0.0, wall_ms=wall)
    assert not store.set_bump(TOPIC, wall - 1, now=0.0, wall_ms=wall)
    assert not store.set_bump(TOPIC, wall + 60_001, now=0.0, wall_ms=wall)
    assert store.set_bump(TOPIC, wall + 60_000, now=0.0, wall_ms=wall)
    assert store.bump(TOPIC, now=1.0) == wall + 60_000
    assert store.bump(OTHER_TOPIC, now=1.0) == 0
    assert store.bump(TOPIC, now=ANNOUNCE_LIFETIME) == 0


# Servers, refreshes


def test_a_refresh_is_redeemed_by_its_preimage_once_and_then_by_the_next() -> None:
    store = RefreshStore()
    third = key(3)
    second = blake2b(third)
    first = blake2b(second)
    refresh = Refresh(TOPIC, b"record", True)
    store.add(first, refresh, now=0.0)
    assert store.redeem(first, now=1.0) is None
    assert store.redeem(third, now=1.0) is None
    assert store.redeem(second, now=1000.0) == refresh
    assert store.redeem(second, now=1000.0) is None
    assert store.redeem(third, now=1000.0 + ANNOUNCE_LIFETIME - 1) == refresh
    assert len(store) == 1
    assert store.redeem(third, now=10_000.0) is None


# Values


@pytest.mark.parametrize(
    ("stored", "seq", "value", "error"),
    [
        (None, 0, b"", ErrorCode.NONE),
        (5, 6, b"new", ErrorCode.NONE),
        (5, 5, b"stored", ErrorCode.NONE),
        (5, 5, b"new", ErrorCode.SEQ_REUSED),
        (5, 4, b"stored", ErrorCode.SEQ_TOO_LOW),
        (5, 0, b"new", ErrorCode.SEQ_TOO_LOW),
    ],
)
def test_what_a_put_may_replace(stored: int | None, seq: int, value: bytes, error: ErrorCode) -> None:
    reply = None if stored is None else MutableGetReply(stored, b"stored", bytes(64))
    assert check_mutable_put(reply, seq, value) == error
    store = MutableStore()
    if reply is not None:
        store.put(TOPIC, reply.seq, reply.value, reply.signature, now=0.0)
    assert store.put(TOPIC, seq, value, bytes([1]) * 64, now=1.0) == error
    expected = reply if error else MutableGetReply(seq, value, bytes([1]) * 64)
    assert store.get(TOPIC, 0, now=1.0) == expected


def test_a_mutable_value_is_given_from_its_seq_on() -> None:
    store = MutableStore()
    store.put(TOPIC, 5, b"value", bytes(64), now=0.0)
    assert store.get(TOPIC, 5, now=0.0) == MutableGetReply(5, b"value", bytes(64))
    assert store.get(TOPIC, 6, now=0.0) is None
    assert store.get(OTHER_TOPIC, 0, now=0.0) is None


def test_a_mutable_value_lives_on_when_it_is_put_again() -> None:
    store = MutableStore()
    store.put(TOPIC, 5, b"value", bytes(64), now=0.0)
    assert store.put(TOPIC, 5, b"other", bytes(64), now=1000.0) == ErrorCode.SEQ_REUSED
    assert store.get(TOPIC, 0, now=VALUE_LIFETIME) is None  # the refused put renewed nothing
    store.put(TOPIC, 5, b"value", bytes(64), now=VALUE_LIFETIME - 1)
    assert store.get(TOPIC, 0, now=2 * VALUE_LIFETIME - 2) is not None
    assert store.get(TOPIC, 0, now=2 * VALUE_LIFETIME - 1) is None


def test_an_old_seq_may_return_when_the_value_is_forgotten() -> None:
    store = MutableStore()
    store.put(TOPIC, 5, b"value", bytes(64), now=0.0)
    assert store.put(TOPIC, 1, b"again", bytes(64), now=VALUE_LIFETIME) == ErrorCode.NONE


def test_an_immutable_value_must_hash_to_its_target() -> None:
    store = ImmutableStore()
    assert store.put(blake2b(b"value"), b"value", now=0.0)
    assert not store.put(blake2b(b"value"), b"other", now=0.0)
    assert store.get(blake2b(b"value"), now=VALUE_LIFETIME - 1) == b"value"
    assert store.get(blake2b(b"value"), now=VALUE_LIFETIME) is None
    assert store.get(blake2b(b"other"), now=0.0) is None


def test_values_have_a_bound() -> None:
    mutable, immutable = MutableStore(capacity=5), ImmutableStore(capacity=5)
    values = [b"%d" % i for i in range(20)]
    for value in values:
        mutable.put(blake2b(value), 0, value, bytes(64), now=0.0)
        immutable.put(blake2b(value), value, now=0.0)
    assert len(mutable) == len(immutable) == 5
    assert [immutable.get(blake2b(value), now=0.0) for value in values] == [None] * 15 + values[15:]
    assert mutable.get(blake2b(values[-1]), 0, now=0.0) is not None
    assert mutable.get(blake2b(values[0]), 0, now=0.0) is None
