"""A session's journal: everything Claude printed and every accepted message, append-only, in one file.

`session` appends; every reader, live or reconnecting, reads pages from here, so that a slow one holds nobody up. The
file itself is `journalfile`.

What survives: an appended envelope is with the operating system at once, so it survives the daemon's end. It is shown,
and acknowledged, when a sync off the event loop has covered it, so what anybody has seen survives a power cut too, and
no seq ever names another envelope later. Many appends share one sync.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from p2pclaude.protocol.permissions import History
from p2pclaude.protocol.wire import OUTPUT
from p2pclaude.sessions.inbox import Inbox, Recovery
from p2pclaude.sessions.journalfile import PAGE_BYTES, DiskFull, JournalFile, Page, is_full

__all__ = ["MAX_UNSYNCED_BYTES", "PAGE_BYTES", "RETRY_SECONDS", "DiskFull", "Journal", "Page", "recover"]

MAX_UNSYNCED_BYTES = 4 * 1024 * 1024
"""What may be written before a sync has covered it; `room` waits."""
RETRY_SECONDS = 1.0
"""Pause between attempts to sync to a full disk."""


class Journal:
    """One open journal on the running event loop. `on_trouble` gets a text when the disk is full, None when it is not.

    A sync that failed proves nothing about what it should have covered, not even when the next one succeeds: that is
    written again first.
    """

    def __init__(self, file: JournalFile, on_trouble: Callable[[str | None], None] = lambda _: None) -> None:
        self._file = file
        self._on_trouble = on_trouble
        self._waiting: set[asyncio.Future[None]] = set()
        self._unsynced: dict[asyncio.Future[None], int] = {}  # who waits for which seq
        self._sync: asyncio.Task[None] | None = None
        self._broken: OSError | None = None
        self._closed = False

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        on_other: Callable[[int, bytes], None] | None = None,
        on_trouble: Callable[[str | None], None] = lambda _: None,
    ) -> Self:
        """Open or create a journal; see `JournalFile.open`."""
        return cls(await asyncio.to_thread(JournalFile.open, path, on_other=on_other), on_trouble)

    @property
    def cut(self) -> int:
        """Give the bytes of a torn last line that were cut off when it was opened."""
        return self._file.cut

    @property
    def last_seq(self) -> int:
        """Give the seq of the newest envelope that is shown, 0 when there is none."""
        return self._file.last_seq

    @property
    def is_awaited(self) -> bool:
        """Tell whether somebody waits for a change."""
        return bool(self._waiting)

    @property
    def is_broken(self) -> bool:
        """Tell whether the disk has failed: nothing more is taken, and what was shown can be read."""
        return self._broken is not None

    def append_output(self, data: bytes, kind: str = OUTPUT) -> int:
        """Append what Claude printed, one line of JSON, as a `kind`. Gives the seq. Raises DiskFull or OSError."""
        self._check()
        seq = self._file.append_output(data, kind)
        self._start_sync()
        return seq

    def append(self, kind: str, fields: Mapping[str, object]) -> int:
        """Append an envelope of another type. Gives the seq. Raises DiskFull or OSError."""
        self._check()
        seq = self._file.append(kind, fields)
        self._start_sync()
        return seq

    async def synced(self, seq: int | None = None) -> None:
        """Wait until the envelope, by default the newest, survives a power cut and is shown. Raises OSError."""
        seq = self._file.written if seq is None else seq
        if self._file.last_seq >= seq:
            return
        self._check()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unsynced[future] = seq
        try:
            await future
        finally:
            self._unsynced.pop(future, None)

    async def room(self) -> None:
        """Wait while much is written and not synced. Raises OSError."""
        while self._file.unsynced_bytes > MAX_UNSYNCED_BYTES:
            await self.synced(self._file.last_seq + 1)

    def read(
        self, after: int, *, limit: int | None = None, max_bytes: int = PAGE_BYTES, outputs_only: bool = False
    ) -> Page:
        """Give the envelopes after a seq; see `JournalFile.read`."""
        return self._file.read(after, limit=limit, max_bytes=max_bytes, outputs_only=outputs_only)

    def start_of_last(self, count: int, *, after: int = 0, max_bytes: int | None = None) -> int:
        """Give the seq after which the newest `count` outputs stand; see `JournalFile.start_of_last`."""
        return self._file.start_of_last(count, after=after, max_bytes=max_bytes)

    async def wait_change(self, timeout: float) -> bool:
        """Wait for the next envelope or `wake`; tell whether one came within `timeout` seconds."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            done, _ = await asyncio.wait([future], timeout=timeout)
            return bool(done)
        finally:
            self._waiting.discard(future)
            future.cancel()

    def wake(self) -> None:
        """Wake all who wait, after a change of the session that is not an envelope."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    def close(self) -> None:
        """Close the file, if need be after the syncs that are waited for; the journal is of no use afterwards."""
        self._closed = True
        if self._sync is None:
            self._file.close()
        self.wake()

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _start_sync(self) -> None:
        if self._sync is None:
            self._sync = asyncio.get_running_loop().create_task(self._sync_all())

    async def _sync_all(self) -> None:
        try:
            while self._file.last_seq < self._file.written and (self._unsynced or not self._closed):
                await self._sync_some()
        except OSError as error:
            self._broken = error
            self._file.drop_unsynced()
            for future in self._unsynced:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._sync = None
            if self._closed:
                self._file.close()

    async def _sync_some(self) -> None:
        """Sync once what is written by now, and show it."""
        seq = self._file.written
        try:
            await asyncio.shield(asyncio.to_thread(self._file.flush))
        except OSError as error:
            await self._mend(error)
            return
        self._file.show(seq)
        for future, wanted in self._unsynced.items():
            if wanted <= seq and not future.done():
                future.set_result(None)
        self.wake()

    async def _mend(self, error: OSError) -> None:
        """Wait for room on a full disk and write everything again that no sync has covered. Raises OSError."""
        if not is_full(error):
            raise error
        self._on_trouble("no space left on the disk for the session's output")
        while not self._closed:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                self._file.rewrite()
                await asyncio.shield(asyncio.to_thread(self._file.flush))
            except (DiskFull, OSError) as again:
                if not isinstance(again, DiskFull) and not is_full(again):
                    raise
                continue
            self._on_trouble(None)
            return
        if self._unsynced:  # nobody waits for room any more, and so nobody for a sync
            raise error


def recover(path: Path) -> tuple[JournalFile, Inbox, History]:
    """Open a journal and learn what it says of messages and permission requests; it belongs in a thread."""
    recovery, asked = Recovery(), History()

    def learn(seq: int, line: bytes) -> None:
        recovery.learn(seq, line)
        asked.learn(line)

    file = JournalFile.open(path, on_other=learn)
    try:
        return file, recovery.finish(lambda seq: file.read(seq - 1, limit=1).lines[0], file.last_seq), asked
    except BaseException:
        file.close()
        raise
