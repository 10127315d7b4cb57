"""A bounded dictionary that forgets (ring 1): for all that strangers can make a node remember.

An entry lives its lifetime from when it was last set, and the oldest goes first when there is no room. Times are `now`
in seconds of any steady clock.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class ExpiringMap(Generic[Key, Value]):
    """A bounded dictionary whose entries live `lifetime` seconds from when they were last set.

    `on_drop(key)` is called for entries that expire or make room, not for deleted or overwritten ones. As all
    live equally long, the dictionary's order is that of expiry.
    """

    def __init__(self, capacity: int, lifetime: float, on_drop: Callable[[Key], None] | None = None) -> None:
        self.capacity = capacity
        self.lifetime = lifetime
        self._on_drop = on_drop
        self._entries: OrderedDict[Key, tuple[float, Value]] = OrderedDict()  # finds its first entry in no time

    def __len__(self) -> int:
        return len(self._entries)

    def set(self, key: Key, value: Value, now: float) -> None:
        """Store or overwrite an entry; its life begins anew."""
        self._entries[key] = now + self.lifetime, value
        self._entries.move_to_end(key)
        self.expire(now)
        while len(self._entries) > self.capacity:
            self._drop(next(iter(self._entries)))

    def get(self, key: Key, now: float) -> Value | None:
        """Return the entry's value, None if it is missing or too old."""
        expires, value = self._entries.get(key, (now, None))
        return value if now < expires else None

    def delete(self, key: Key) -> bool:
        """Remove an entry; False if there was none."""
        return self._entries.pop(key, None) is not None

    def clear(self) -> None:
        """Drop all entries, silently."""
        self._entries.clear()

    def expire(self, now: float) -> None:
        """Drop all entries that are too old: call it now and then, `set` does."""
        while self._entries:
            key = next(iter(self._entries))
            if now < self._entries[key][0]:
                break
            self._drop(key)

    def _drop(self, key: Key) -> None:
        del self._entries[key]
        if self._on_drop is not None:
            self._on_drop(key)
