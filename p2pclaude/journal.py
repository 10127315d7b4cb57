"""A session's journal: everything Claude printed and every accepted message, append-only, in one file.

    journal.jsonl   one envelope a line, the first fields always in this order:
                    {"type":TYPE,"seq":N,"timestamp":MS, …, "data":…}      seq from 1 without gaps

`sessions` appends; every reader, live or reconnecting, reads pages from here, so that a slow one holds nobody up. An
envelope is handed to the operating system before anyone can read it: it survives the daemon's end, not a power cut.
A last line without its newline is one that a crash tore; it was never visible and is cut when the file is opened.
"""

import asyncio
import errno
import os
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from p2pclaude.errors import TryAgain
from p2pclaude.wire import OUTPUT, dump_json

PAGE_BYTES = 1024 * 1024
"""A page of envelopes ends before it is longer than this, but has one at least."""

_CHUNK = 1024 * 1024
_OUTPUT_START = b'{"type":"' + OUTPUT.encode() + b'"'


class DiskFull(TryAgain):
    """There is no room for an envelope; nothing of it was kept, and the same append may be tried again."""


@dataclass(frozen=True, slots=True)
class Page:
    """Envelopes as lines of JSON without newlines; `next` is the seq to read on after."""

    lines: list[bytes]
    next: int


class Journal:
    """One open journal. Not for use from several threads; a data directory has one daemon (its lock)."""

    def __init__(self, descriptor: int) -> None:
        self._file = descriptor
        self._ends = array("Q", [0])  # _ends[seq] is where the envelope with that seq ends in the file
        self._waiting: set[asyncio.Future[None]] = set()

    @classmethod
    def open(cls, path: Path, *, on_other: Callable[[int, bytes], None] | None = None) -> Self:
        """Open or create a journal and cut a torn last line; `on_other` gets seq and line of each that is no output.

        Reads the whole file in bounded memory, so it belongs in a thread when the file may be long. Raises OSError.
        """
        journal = cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            journal._index()
            if on_other is not None:
                journal._visit_others(on_other)
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def last_seq(self) -> int:
        """Give the seq of the newest envelope, 0 when there is none."""
        return len(self._ends) - 1

    @property
    def is_awaited(self) -> bool:
        """Tell whether somebody waits for a change."""
        return bool(self._waiting)

    def append_output(self, data: bytes) -> int:
        """Append what Claude printed: `data` is one line of JSON and stands in the envelope unchanged.

        Gives the seq. Raises DiskFull; any other OSError (the disk is broken) passes.
        """
        return self._append(OUTPUT, b',"data":' + data + b"}")

    def append(self, kind: str, fields: Mapping[str, object]) -> int:
        """Append an envelope of another type with these fields. Gives the seq; raises as `append_output`."""
        return self._append(kind, b"," + dump_json(fields)[1:])

    def read(
        self, after: int, *, limit: int | None = None, max_bytes: int = PAGE_BYTES, outputs_only: bool = False
    ) -> Page:
        """Give the envelopes after a seq: at most `limit`, and `max_bytes` unless the first alone is longer."""
        seq = after = min(max(after, 0), self.last_seq)
        lines: list[bytes] = []
        size = 0
        while seq < self.last_seq and (limit is None or len(lines) < limit):
            if not outputs_only or self._is_output(seq + 1):
                size += self._ends[seq + 1] - self._ends[seq]
                if lines and size > max_bytes:
                    break
                lines.append(self._line(seq + 1))
            seq += 1
        return Page(lines, seq)

    def start_of_last(self, count: int, *, after: int = 0, max_bytes: int | None = None) -> int:
        """Give the seq after which the newest `count` outputs stand (never before `after`).

        With `max_bytes`, fewer: as many as one page may hold, but one at least.
        """
        seq, size, found = self.last_seq, 0, 0
        while seq > after and found < count:
            length = self._ends[seq] - self._ends[seq - 1]
            if self._is_output(seq):
                if max_bytes is not None and found and size + length > max_bytes:
                    break
                found, size = found + 1, size + length
            seq -= 1
        return seq

    async def wait_change(self, timeout: float) -> bool:
        """Wait for the next append or `wake`; tell whether one came within `timeout` seconds."""
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
        """Close the file; the journal is of no use afterwards."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self.wake()

    def _append(self, kind: str, rest: bytes) -> int:
        seq = self.last_seq + 1
        head = b'{"type":"%b","seq":%d,"timestamp":%d' % (kind.encode(), seq, time.time_ns() // 1_000_000)
        self._write(head + rest + b"\n")
        self.wake()
        return seq

    def _write(self, line: bytes) -> None:
        # Written at the known end, not at the file's: what a failed attempt left there is overwritten or cut.
        start, done = self._ends[-1], 0
        view = memoryview(line)
        try:
            while done < len(line):
                done += os.pwrite(self._file, view[done:], start + done)
        except OSError as error:
            if done:
                os.ftruncate(self._file, start)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFull("no space left on the disk for the session's output") from error
            raise
        self._ends.append(start + len(line))

    def _line(self, seq: int) -> bytes:
        start, end = self._ends[seq - 1], self._ends[seq] - 1
        parts = []
        while start < end:
            part = os.pread(self._file, end - start, start)
            if not part:
                raise OSError(errno.EIO, "the journal was cut short by another program")
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def _is_output(self, seq: int) -> bool:
        return os.pread(self._file, len(_OUTPUT_START), self._ends[seq - 1]) == _OUTPUT_START

    def _index(self) -> None:
        at = 0
        while chunk := os.pread(self._file, _CHUNK, at):
            found = chunk.find(b"\n")
            while found >= 0:
                self._ends.append(at + found + 1)
                found = chunk.find(b"\n", found + 1)
            at += len(chunk)
        if at > self._ends[-1]:
            os.ftruncate(self._file, self._ends[-1])

    def _visit_others(self, on_other: Callable[[int, bytes], None]) -> None:
        for seq in range(1, self.last_seq + 1):
            if not self._is_output(seq):
                on_other(seq, self._line(seq))
