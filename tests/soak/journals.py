"""One journal of a hundred megabytes: how long until an append is durable, how fast it fills, opens, and is read?

Usage: tests/soak/journals [--bytes SIZE] [--directory DIR]

Memory is the process's own, before and at its highest. Exit status 1 if more than 64 MiB were needed beside it.
"""

import argparse
import asyncio
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from soak.sizes import parse_size

from p2pclaude.sessions.journal import Journal
from p2pclaude.sessions.journalfile import JournalFile

LINE: Final = b'{"type":"assistant","text":"' + b"x" * 2000 + b'"}'
APPENDS: Final = 500
WRITERS: Final = 50
MOST_MEMORY: Final = 64 << 20


def highest() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


async def latencies(journal: Journal, writers: int) -> list[float]:
    """Append and wait for the disk, so many at a time; give the milliseconds each took, sorted."""
    found: list[float] = []

    async def write() -> None:
        for _ in range(APPENDS // writers):
            began = time.perf_counter()
            await journal.synced(journal.append_output(LINE))
            found.append((time.perf_counter() - began) * 1000)

    await asyncio.gather(*(write() for _ in range(writers)))
    return sorted(found)


async def fill(path: Path, size: int) -> None:
    """Measure appends one by one, fifty at once, and as fast as they go until the journal has its size."""
    journal = await Journal.open(path)
    for writers in (1, WRITERS):
        ms = await latencies(journal, writers)
        high = ms[len(ms) * 99 // 100]
        print(f"durable, {writers} at once: {statistics.median(ms):.1f} ms median, {high:.1f} ms at 99 %")
    began, count = time.perf_counter(), size // len(LINE)
    for _ in range(count):
        await journal.room()
        journal.append_output(LINE)
    await journal.synced()
    seconds = time.perf_counter() - began
    print(f"{count} envelopes, {size / 1e6:.0f} MB: {size / seconds / 1e6:.0f} MB/s durable")
    journal.close()


def timed(text: str, work: Callable[[], object]) -> None:
    """Do something and say how long it took."""
    began = time.perf_counter()
    work()
    print(f"{text}: {(time.perf_counter() - began) * 1000:.1f} ms")


def read_all(journal: JournalFile) -> None:
    """Read everything, page by page."""
    after = 0
    while (page := journal.read(after)).lines:
        after = page.next


def read_back(path: Path) -> None:
    """Open with and without the index, find the end, and read it all."""
    timed("open with its index", lambda: JournalFile.open(path).close())
    path.with_suffix(".index").unlink()
    timed("open without one", lambda: JournalFile.open(path).close())
    journal = JournalFile.open(path)
    timed("the last 10 objects", lambda: journal.read(journal.start_of_last(10)))
    timed("after the middle, 100 at most", lambda: journal.read(journal.last_seq // 2, limit=100))
    timed("all of it, in pages, checked", lambda: read_all(journal))
    journal.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it as a command."""
    parser = argparse.ArgumentParser(prog="tests/soak/journals", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--bytes", type=parse_size, default=100_000_000)
    parser.add_argument("--directory", type=Path, help="where: another file system than the temporary files'")
    options = parser.parse_args(argv)
    before = highest()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        path = Path(directory) / "journal.jsonl"
        asyncio.run(fill(path, options.bytes))
        read_back(path)
    used = highest() - before
    print(f"memory: {before / 1e6:.0f} MB before, {used / 1e6:.0f} MB more at the most, process {os.getpid()}")
    return 1 if used > MOST_MEMORY else 0


if __name__ == "__main__":
    sys.exit(main())
