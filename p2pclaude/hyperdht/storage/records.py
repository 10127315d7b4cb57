"""What a persistent node keeps for others: announcements, mutable and immutable values (ring 1).

`node` answers FIND_PEER, LOOKUP, ANNOUNCE and the puts and gets from these stores. Signatures are the caller's to
check. Times are `now` in seconds of any steady clock. Every store is bounded and forgets honestly: an entry lives its
lifetime from the last put, and the oldest goes first when there is no room. Sources: hyperdht lib/persistent.js and
index.js (defaultCacheOpts).
"""

import random
from typing import Final, NamedTuple

from ..constants import ErrorCode
from ..crypto import hash
from ..expiring import ExpiringMap
from ..node.forwards import ANNOUNCE_LIFETIME, CAPACITY
from ..rpc.messages import MutableGetReply

VALUE_LIFETIME: Final = 48 * 3600.0
MAX_BUMP_DRIFT_MS: Final = 60_000
LOOKUP_RECORDS: Final = 20


class _Topic:
    """The records of one topic: a list, to draw from by chance, and each key's place in it."""

    __slots__ = ("_places", "_records")

    def __init__(self) -> None:
        self._records: list[tuple[bytes, bytes]] = []
        self._places: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._records)

    def set(self, public_key: bytes, record: bytes) -> None:
        place = self._places.setdefault(public_key, len(self._records))
        self._records[place : place + 1] = [(public_key, record)]

    def remove(self, public_key: bytes) -> None:
        place = self._places.pop(public_key)
        last = self._records.pop()
        if place < len(self._records):
            self._records[place] = last
            self._places[last[0]] = place

    def sample(self, n: int, rng: random.Random) -> list[bytes]:
        return [record for _, record in rng.sample(self._records, min(n, len(self._records)))]


class RecordStore:
    """Who announced itself under which topic, and each topic's bump.

    A record announced again replaces the former one at once: changed relays are visible (upstream waits until
    the old one has aged).
    """

    def __init__(self, capacity: int = CAPACITY, lifetime: float = ANNOUNCE_LIFETIME) -> None:
        self._topics: dict[bytes, _Topic] = {}
        self._ages: ExpiringMap[tuple[bytes, bytes], None] = ExpiringMap(capacity, lifetime, self._forget)
        self._bumps: ExpiringMap[bytes, int] = ExpiringMap(capacity, lifetime)

    def __len__(self) -> int:
        return len(self._ages)

    def add(self, topic: bytes, public_key: bytes, record: bytes, now: float) -> None:
        """Store the encoded peer `record` of `public_key`."""
        self._topics.setdefault(topic, _Topic()).set(public_key, record)
        self._ages.set((topic, public_key), None, now)

    def remove(self, topic: bytes, public_key: bytes) -> bool:
        """Forget the record of `public_key`; False if there was none."""
        if not self._ages.delete((topic, public_key)):
            return False
        self._forget((topic, public_key))
        return True

    def get(self, topic: bytes, n: int, rng: random.Random, now: float) -> list[bytes]:
        """Return up to `n` records of a topic, drawn by chance."""
        self._ages.expire(now)
        found = self._topics.get(topic)
        return found.sample(n, rng) if found is not None else []

    def set_bump(self, topic: bytes, bump: int, now: float, wall_ms: int) -> bool:
        """Accept a topic's bump if it grows and is not from the future; `wall_ms` is Unix time."""
        if bump <= self.bump(topic, now) or bump > wall_ms + MAX_BUMP_DRIFT_MS:
            return False
        self._bumps.set(topic, bump, now)
        return True

    def bump(self, topic: bytes, now: float) -> int:
        """Return a topic's bump, 0 if it has none."""
        return self._bumps.get(topic, now) or 0

    def _forget(self, key: tuple[bytes, bytes]) -> None:
        topic, public_key = key
        self._topics[topic].remove(public_key)
        if not self._topics[topic]:
            del self._topics[topic]


class Refresh(NamedTuple):
    """An announcement that a later request can renew without a signature."""

    target: bytes
    record: bytes
    announce_self: bool


class RefreshStore:
    """Announcements by refresh token; a token is renewed by revealing what it is the hash of."""

    def __init__(self, capacity: int = CAPACITY, lifetime: float = ANNOUNCE_LIFETIME) -> None:
        self._refreshes: ExpiringMap[bytes, Refresh] = ExpiringMap(capacity, lifetime)

    def __len__(self) -> int:
        return len(self._refreshes)

    def add(self, token: bytes, refresh: Refresh, now: float) -> None:
        """Store an announcement under its 32-byte token."""
        self._refreshes.set(token, refresh, now)

    def redeem(self, preimage: bytes, now: float) -> Refresh | None:
        """Return the announcement whose token is the hash of `preimage`, which becomes its next token."""
        token = hash(preimage)
        refresh = self._refreshes.get(token, now)
        if refresh is not None:
            self._refreshes.delete(token)
            self._refreshes.set(preimage, refresh, now)
        return refresh


def check_mutable_put(stored: MutableGetReply | None, seq: int, value: bytes) -> ErrorCode:
    """Tell whether a record may replace the stored one.

    SEQ_TOO_LOW for an older one, SEQ_REUSED for another value under the same number, else NONE: the same record
    again is welcome, it renews the lifetime. hyperdht lib/persistent.js, onmutableput.
    """
    if stored is None or seq > stored.seq:
        return ErrorCode.NONE
    if seq < stored.seq:
        return ErrorCode.SEQ_TOO_LOW
    return ErrorCode.NONE if value == stored.value else ErrorCode.SEQ_REUSED


class MutableStore:
    """Signed values under the hash of their owner's public key."""

    def __init__(self, capacity: int = CAPACITY // 2, lifetime: float = VALUE_LIFETIME) -> None:
        self._values: ExpiringMap[bytes, MutableGetReply] = ExpiringMap(capacity, lifetime)

    def __len__(self) -> int:
        return len(self._values)

    def put(self, target: bytes, seq: int, value: bytes, signature: bytes, now: float) -> ErrorCode:
        """Store a record whose signature the caller has checked, unless `check_mutable_put` objects."""
        error = check_mutable_put(self._values.get(target, now), seq, value)
        if error == ErrorCode.NONE:
            self._values.set(target, MutableGetReply(seq, value, signature), now)
        return error

    def get(self, target: bytes, min_seq: int, now: float) -> MutableGetReply | None:
        """Return the record of a target if its sequence number is at least `min_seq`."""
        stored = self._values.get(target, now)
        return stored if stored is not None and stored.seq >= min_seq else None


class ImmutableStore:
    """Values under their own hash."""

    def __init__(self, capacity: int = CAPACITY // 2, lifetime: float = VALUE_LIFETIME) -> None:
        self._values: ExpiringMap[bytes, bytes] = ExpiringMap(capacity, lifetime)

    def __len__(self) -> int:
        return len(self._values)

    def put(self, target: bytes, value: bytes, now: float) -> bool:
        """Store a value; False, and nothing stored, if `target` is not its hash."""
        if hash(value) != target:
            return False
        self._values.set(target, value, now)
        return True

    def get(self, target: bytes, now: float) -> bytes | None:
        """Return the value of that hash."""
        return self._values.get(target, now)
