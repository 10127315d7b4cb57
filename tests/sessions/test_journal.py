"""The journal on the loop: shown when synced, many appends a sync, syncs that fail, readers that wait for nobody."""

import asyncio
import contextlib
import errno
import json
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from p2pclaude.sessions import journal as journal_module
from p2pclaude.sessions.journal import MAX_UNSYNCED_BYTES, Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a journal to be."""
    return tmp_path / "journal.jsonl"


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    asyncio.run(bounded())


def contents(path: Path) -> bytes:
    return path.read_bytes()


class Disk:
    """Stands in for fdatasync: counts, waits while it is told to, fails on demand, and then drops what it should write.

    `waits` tells whether a sync is under way that waits.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.syncs = 0
        self.waits = False
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self.errors: list[int] = []
        self.durable = b""  # what a power cut leaves
        self._sync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, descriptor: int) -> None:
        """Sync, or fail as a disk does that has lost what was in its cache."""
        self.waits = not self._may_go_on.is_set()
        assert self._may_go_on.wait(20), "nobody lets the disk go on"
        self.waits = False
        self.syncs += 1
        if self.errors:
            os.ftruncate(descriptor, len(self.durable))
            raise OSError(self.errors.pop(0), "the disk")
        self._sync(descriptor)
        self.durable = os.pread(descriptor, 1 << 26, 0)

    def hold(self) -> None:
        """Let each sync wait from now on."""
        self._may_go_on.clear()

    def go_on(self) -> None:
        """Let syncs be done."""
        self._may_go_on.set()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_an_envelope_is_shown_when_it_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def main() -> None:
        journal = await Journal.open(path)
        disk.hold()
        assert journal.append_output(b"{}") == 1
        await until(lambda: disk.waits)
        assert (journal.last_seq, journal.read(0).lines) == (0, [])
        assert b'"seq":1' in contents(path)  # the end of the daemon would not lose it
        waiting = asyncio.create_task(journal.wait_change(20))
        await asyncio.sleep(0)
        disk.go_on()
        await journal.synced(1)
        assert await waiting
        assert journal.last_seq == 1
        assert disk.durable == contents(path)
        journal.close()

    run(main)


def test_many_appends_share_a_sync_and_nothing_is_held_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def main() -> None:
        journal = await Journal.open(path)
        before = disk.syncs
        disk.hold()

        async def append(number: int) -> None:
            if number:
                await until(lambda: disk.waits)
            await journal.synced(journal.append("message", {"n": number}))

        appends = [asyncio.create_task(append(number)) for number in range(500)]
        await until(lambda: journal._file.written == 500)  # the loop goes on during a sync
        assert journal.last_seq == 0 and not any(task.done() for task in appends)
        disk.go_on()
        await asyncio.gather(*appends)
        assert disk.syncs - before == 2  # of the first, and of all that came meanwhile
        assert [json.loads(line)["seq"] for line in journal.read(0).lines] == list(range(1, 501))
        journal.close()

    run(main)


def test_a_sync_that_failed_is_no_success_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "RETRY_SECONDS", 0.01)
    disk = Disk(monkeypatch)
    troubles: list[str | None] = []

    async def main() -> None:
        journal = await Journal.open(path, on_trouble=troubles.append)
        await journal.synced(journal.append("message", {"n": 1}))
        disk.errors = [errno.ENOSPC, errno.ENOSPC]
        first = asyncio.create_task(journal.synced(journal.append("message", {"n": 2})))
        await asyncio.sleep(0.005)
        assert journal.append("message", {"n": 3}) == 3
        await first
        await journal.synced()
        assert [troubles[0], troubles[-1]] == ["no space left on the disk for the session's output", None]
        # What the failed syncs lost was written again: not in the cache alone.
        assert [json.loads(line)["n"] for line in disk.durable.splitlines()] == [1, 2, 3]
        assert [json.loads(line)["n"] for line in journal.read(0).lines] == [1, 2, 3]
        journal.close()

    run(main)


def test_a_broken_disk_shows_and_acknowledges_nothing_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def main() -> None:
        journal = await Journal.open(path)
        await journal.synced(journal.append("message", {"n": 1}))
        disk.errors = [errno.EIO]
        lost = journal.append("message", {"n": 2})
        with pytest.raises(OSError, match="the disk"):
            await journal.synced(lost)
        with pytest.raises(OSError, match="the disk"):
            journal.append("message", {"n": 3})
        assert journal.last_seq == 1
        journal.close()
        again = await Journal.open(path)
        assert again.append("message", {"n": 4}) == lost  # which nobody had seen
        await again.synced()
        again.close()

    run(main)


def test_what_is_unsynced_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def main() -> None:
        journal = await Journal.open(path)
        disk.hold()
        most, line, waited = 0, json.dumps("x" * 100_000).encode(), 0
        for _ in range(200):
            room = asyncio.create_task(journal.room())
            for _ in range(3):
                await asyncio.sleep(0)
            if not room.done():
                waited += 1
                disk.go_on()
                await room
                disk.hold()
            journal.append_output(line)
            most = max(most, journal._file.unsynced_bytes)
        assert MAX_UNSYNCED_BYTES < most <= MAX_UNSYNCED_BYTES + 2 * len(line)
        assert waited
        disk.go_on()
        await journal.synced()
        assert (journal.last_seq, journal._file.unsynced_bytes) == (200, 0)
        journal.close()

    run(main)


def test_closing_waits_for_the_sync_that_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def main() -> None:
        journal = await Journal.open(path)
        disk.hold()
        journal.append_output(b"{}")
        await until(lambda: disk.waits)
        journal.close()
        assert journal._file._file != -1
        disk.go_on()
        await until(lambda: journal._file._file == -1)
        again = await Journal.open(path)
        assert again.last_seq == 1
        again.close()

    run(main)


def test_closing_leaves_nobody_waiting_for_a_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def main() -> None:
        for errors in ([], [errno.ENOSPC] * 9):
            journal = await Journal.open(path)
            disk.errors = errors
            disk.hold()
            journal.append_output(b"{}")
            await until(lambda: disk.waits)
            waiting = asyncio.create_task(journal.synced(journal.append_output(b"{}")))
            await asyncio.sleep(0)
            journal.close()
            disk.go_on()
            with pytest.raises(OSError, match="the disk") if errors else contextlib.nullcontext():
                await waiting
            assert journal._file._file == -1

    run(main)


def test_readers_wait_until_there_is_something(path: Path) -> None:
    async def main() -> None:
        journal = await Journal.open(path)
        assert not await journal.wait_change(0.001)
        waiting = [asyncio.create_task(journal.wait_change(20)) for _ in range(3)]
        await asyncio.sleep(0)
        assert journal.is_awaited
        waiting[0].cancel()
        await asyncio.sleep(0)
        journal.append_output(b"{}")
        assert await waiting[1]
        assert await waiting[2]
        await asyncio.sleep(0)
        assert not journal.is_awaited
        last = asyncio.create_task(journal.wait_change(20))
        await asyncio.sleep(0)
        journal.close()
        assert await last

    run(main)
