"""The daemon's presence in the DHT: its announcement kept fresh, its session record kept current.

`daemon` runs one of these while it serves. Three loops: the announcement is refreshed at an interval, and at once when
the host's addresses change; the record is stored whenever the list of sessions has changed, and now and then again,
since the nodes that keep it come and go.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from p2pclaude.host.log import Event, Log
from p2pclaude.protocol.wire import seal

if TYPE_CHECKING:
    from p2pclaude.hyperdht import KeyPair, MutableRecord

ADDRESSES_SECONDS = 10.0
"""How often the host's addresses are looked at."""
ALIVE_SECONDS = 30.0
"""Who has not looked at them for so long hangs."""
RECORD_BYTES = 1000
"""Longest value of a mutable record."""
DEBOUNCE_SECONDS = 0.3
"""Changes of the list of sessions within this time make one record."""
RETRY_SECONDS = 30.0
"""Pause after a record could not be stored."""
REPUBLISH_SECONDS = 1800.0
"""How often an unchanged record is stored again."""


class Node(Protocol):
    """What presence needs of `hyperdht.HyperDHT`."""

    @property
    def local_addresses(self) -> list[str]:
        """Give the host's addresses."""

    async def mutable_put(self, key_pair: "KeyPair", value: bytes, seq: int = 0) -> None:
        """Store a mutable record."""

    async def mutable_get(self, public_key: bytes) -> "MutableRecord | None":
        """Give the newest mutable record under a key."""


class Announcement(Protocol):
    """What presence needs of `hyperdht.Server`."""

    def refresh(self) -> None:
        """Announce anew."""


def encode_record(data_key: bytes, record: Mapping[str, Any], max_bytes: int = RECORD_BYTES) -> bytes:
    """Seal `{sessions, updatedAt}` as a record's value, as ASCII text.

    The sessions come oldest first and are kept newest first. What does not fit is left out, oldest first, and counted
    in `omitted`.
    """
    return _fit(data_key, record, max_bytes)[0]


def _fit(data_key: bytes, record: Mapping[str, Any], max_bytes: int = RECORD_BYTES) -> tuple[bytes, int]:
    """Give what `encode_record` gives, and how many sessions were left out."""
    newest_first = record["sessions"][::-1]  # not by `createdAt`: the clock may have been set back
    for omitted in range(len(newest_first) + 1):
        kept = newest_first[: len(newest_first) - omitted]
        value: dict[str, Any] = {"sessions": kept, "updatedAt": record["updatedAt"]}
        if omitted:
            value["omitted"] = omitted
        sealed = seal(data_key, value).encode()
        if len(sealed) <= max_bytes:
            return sealed, omitted
    raise ValueError("not even an empty record fits")


class Presence:
    """Keeps one daemon's presence while `run` runs. `snapshot` gives the record's content, None for no session yet."""

    def __init__(
        self,
        node: Node,
        announcement: Announcement,
        key_pair: "KeyPair",
        data_key: bytes,
        snapshot: Callable[[], Mapping[str, Any] | None],
        log: Log,
        *,
        refresh_interval: float,
    ) -> None:
        self._node = node
        self._announcement = announcement
        self._key_pair = key_pair
        self._data_key = data_key
        self._snapshot = snapshot
        self._log = log
        self._refresh_interval = refresh_interval
        self._news = asyncio.Event()
        self._news.set()  # what an earlier run left in the DHT is out of date
        self._stored: object = None
        self._seq = 0
        self._knows_last = False
        self._looked_at = asyncio.get_running_loop().time()

    def changed(self) -> None:
        """Say that the list of sessions may have changed."""
        self._news.set()

    @property
    def is_alive(self) -> bool:
        """Tell whether its loops were at work lately."""
        return asyncio.get_running_loop().time() - self._looked_at < ALIVE_SECONDS

    async def run(self) -> None:
        """Keep it up until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._refresh_regularly())
            group.create_task(self._watch_addresses())
            group.create_task(self._keep_record())

    async def store_record(self) -> None:
        """Store the session record now, unless it is the one that was stored last. Raises what the DHT raises."""
        record = self._snapshot() or {"sessions": [], "updatedAt": _now_ms()}
        if record["sessions"] == self._stored:
            return
        self._seq = max(await self._last_seq() + 1, _now_ms())
        value, omitted = _fit(self._data_key, record)
        self._knows_last, self._stored = True, None  # from here on nodes may have this one, whatever we hear
        try:
            await self._node.mutable_put(self._key_pair, value, self._seq)
        except Exception:
            self._knows_last = False  # perhaps refused
            raise
        self._stored = record["sessions"]
        kept = len(record["sessions"]) - omitted
        self._log(Event.RECORD_STORED, seq=self._seq, sessions=kept, omitted=omitted or None)

    async def _last_seq(self) -> int:
        """Give the number to go beyond; that of an earlier run may be ahead of a clock that was set back."""
        if self._knows_last:
            return self._seq
        found = await self._node.mutable_get(self._key_pair.public_key)
        return self._seq if found is None else max(self._seq, found.seq)

    async def _refresh_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_interval)
            self._refresh("interval")

    async def _watch_addresses(self) -> None:
        known = self._addresses()
        while True:
            self._looked_at = asyncio.get_running_loop().time()
            await asyncio.sleep(ADDRESSES_SECONDS)
            addresses = self._addresses() or known
            if addresses != known:
                known = addresses
                self._log(Event.ADDRESSES, addresses=addresses)
                self._refresh("addresses")

    def _addresses(self) -> list[str]:
        try:
            return sorted(self._node.local_addresses)
        except OSError as error:  # interfaces come and go while they are listed
            self._log(Event.WARNING, message=f"the host's addresses cannot be listed: {error}")
            return []

    def _refresh(self, reason: str) -> None:
        try:
            self._announcement.refresh()
        except Exception as error:  # sessions go on, and the next refresh may do better
            self._log(Event.ERROR, where="refresh", error=type(error).__name__)
        else:
            self._log(Event.ANNOUNCED, reason=reason)

    async def _keep_record(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REPUBLISH_SECONDS):
                    await self._news.wait()
                await asyncio.sleep(DEBOUNCE_SECONDS)
            except TimeoutError:
                self._stored = None
            self._news.clear()
            try:
                await self.store_record()
            except Exception as error:  # whatever it is, sessions go on without the record
                self._log(Event.RECORD_FAILED, error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(RETRY_SECONDS)
                self._news.set()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
