"""A journal's file: envelopes in, pages out; what is written is shown only once it is synced.

    journal.jsonl   one envelope a line, the first fields always in this order:
                    {"type":TYPE,"seq":N,"timestamp":MS, …, "data":…}      seq from 1 without gaps

`journal` stands above and syncs in groups; `seqindex` knows the places. A last line without its newline is one that a
crash tore; it was never shown and is cut when the file is opened. A damaged line in the middle keeps its seq and is
given as a note.
"""

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from p2pclaude.errors import TryAgain, WireError
from p2pclaude.host.datadir import sync_directory
from p2pclaude.protocol.wire import NOTE, OUTPUT, dump_json, load_json
from p2pclaude.sessions.seqindex import SeqIndex, seq_of_line

PAGE_BYTES = 256 * 1024
"""A page of envelopes ends before it is longer than this, but has one at least.

What happens to it happens in one go, here and where it is read: others wait meanwhile, and so do the packets.
"""
PAGES_AHEAD = 8
"""So many pages are told of before they are asked for, so that a long way can be full of them."""


class DiskFull(TryAgain):
    """There is no room for an envelope; nothing of it was kept, and the same append may be tried again."""


@dataclass(frozen=True, slots=True)
class Page:
    """Envelopes as lines of JSON without newlines; `next` is the seq to read on after.

    `then` has the `next` of the pages after this one that are full, and so known for good.
    """

    lines: list[bytes]
    next: int
    then: tuple[int, ...] = ()


class JournalFile:
    """One open journal. Not for use from several threads, but for `flush`; a data directory has one daemon (its lock).

    `last_seq` is the newest envelope that is shown, `written` the newest there is.
    """

    def __init__(self, descriptor: int) -> None:
        self.cut = 0
        """Bytes of a torn last line that were cut off when it was opened."""
        self.last_seq = 0
        self._file = descriptor
        self._index = SeqIndex()
        self._old = 0  # envelopes that an earlier daemon wrote: they may be damaged
        self._proven = 0  # all up to this one were looked at, and are whole
        self._unsynced: deque[bytes] = deque()
        self.unsynced_bytes = 0
        """Length of what is written and not shown."""

    @classmethod
    def open(cls, path: Path, *, on_other: Callable[[int, bytes], None] | None = None) -> Self:
        """Open or create a journal and cut a torn last line; `on_other` gets seq and line of each that is no output.

        Reads what its index does not know yet, in bounded memory, so it belongs in a thread. Raises OSError.
        """
        journal = cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            journal._find(path)
            if on_other is not None:
                journal._visit_others(on_other)
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def written(self) -> int:
        """Give the seq of the newest envelope, shown or not."""
        return self._index.last_seq

    def append_output(self, data: bytes, kind: str = OUTPUT) -> int:
        """Append what Claude printed: `data` is one line of JSON and stands in the envelope unchanged.

        `kind` is the envelope's type. Gives the seq. Raises DiskFull; any other OSError (the disk is broken) passes.
        """
        return self._append(kind, b',"data":' + data + b"}")

    def append(self, kind: str, fields: Mapping[str, object]) -> int:
        """Append an envelope of another type with these fields. Gives the seq; raises as `append_output`."""
        return self._append(kind, b"," + dump_json(fields)[1:])

    def flush(self) -> None:
        """Make what was written before survive a power cut; may run in a thread. Raises OSError."""
        os.fdatasync(self._file)

    def show(self, seq: int) -> None:
        """Let readers see the envelopes up to one that a `flush` begun after its append has covered."""
        for _ in range(self.last_seq, seq):
            self.unsynced_bytes -= len(self._unsynced.popleft())
        self.last_seq = seq
        self._index.save(seq)

    def rewrite(self) -> None:
        """Write again what is not shown, after a `flush` that failed: the system may have dropped it.

        Raises as `append_output`, with nothing changed.
        """
        start = self._index.end(self.last_seq)
        os.ftruncate(self._file, start)
        self._write(b"".join(self._unsynced), start)

    def drop_unsynced(self) -> None:
        """Give up what is not shown, so that no seq is ever given twice: the disk is broken."""
        self._index.cut(self.last_seq)
        self._unsynced.clear()
        self.unsynced_bytes = 0
        try:
            os.ftruncate(self._file, self._index.end(self.last_seq))
        except OSError:
            pass

    def read(
        self, after: int, *, limit: int | None = None, max_bytes: int = PAGE_BYTES, outputs_only: bool = False
    ) -> Page:
        """Give the envelopes after a seq: at most `limit`, and `max_bytes` unless the first alone is longer."""
        seq = min(max(after, 0), self.last_seq)
        if outputs_only:
            return self._read_outputs(seq, limit, max_bytes)
        end = self._page_end(seq, max_bytes)
        if limit is not None:
            return Page([line for line, _ in self._lines(seq + 1, min(end, seq + limit))], min(end, seq + limit))
        return Page([line for line, _ in self._lines(seq + 1, end)], end, tuple(self._full_pages(end, max_bytes)))

    def _full_pages(self, after: int, max_bytes: int) -> Iterator[int]:
        """Yield where the next pages end that no later envelope changes."""
        for _ in range(PAGES_AHEAD):
            after = self._page_end(after, max_bytes)
            if after >= self.last_seq:
                return
            yield after

    def _page_end(self, after: int, max_bytes: int) -> int:
        """Give the last envelope of a page that begins after this one."""
        last = self._index.last_within(self._index.end(after) + max_bytes, after)
        return min(max(last, after + 1), self.last_seq)

    def _read_outputs(self, seq: int, limit: int | None, max_bytes: int) -> Page:
        runs: list[tuple[int, int]] = []  # first and last seq of lines that stand together
        count = size = 0
        while seq < self.last_seq and (limit is None or count < limit):
            if self._index.is_output(seq + 1):
                size += self._length(seq + 1)
                if count and size > max_bytes:
                    break
                first = runs.pop()[0] if runs and runs[-1][1] == seq else seq + 1
                runs.append((first, seq + 1))
                count += 1
            seq += 1
        found = [found for first, last in runs for found in self._lines(first, last)]
        return Page([line for line, is_whole in found if is_whole], seq)

    def start_of_last(self, count: int, *, after: int = 0, max_bytes: int | None = None) -> int:
        """Give the seq after which the newest `count` outputs stand (never before `after`).

        With `max_bytes`, fewer: as many as one page may hold, but one at least.
        """
        seq, size, found = self.last_seq, 0, 0
        while seq > after and found < count:
            if self._index.is_output(seq):
                length = self._length(seq)
                if max_bytes is not None and found and size + length > max_bytes:
                    break
                found, size = found + 1, size + length
            seq -= 1
        return seq

    def close(self) -> None:
        """Close the file; the journal is of no use afterwards."""
        if self._file >= 0:
            self._index.save(self.last_seq, all_of_it=True)
            self._index.close()
            os.close(self._file)
            self._file = -1

    def _find(self, path: Path) -> None:
        size = os.fstat(self._file).st_size
        self._index.open_file(path.with_suffix(".index"), self._file)
        self._index.scan(self._file)
        end = self._index.end(self.written)
        if size > end:
            self.cut = size - end
            os.ftruncate(self._file, end)
        # Whole lines that a crash left unsynced were seen by nobody, and are as good as any once they are synced.
        self.flush()
        if size == 0:
            sync_directory(path.parent)
        self.last_seq = self._old = self.written
        self._index.save(self.last_seq)

    def _visit_others(self, on_other: Callable[[int, bytes], None]) -> None:
        for seq in range(1, self.last_seq + 1):
            if not self._index.is_output(seq):
                ((line, is_whole),) = self._lines(seq, seq)
                if is_whole:
                    on_other(seq, line)

    def _append(self, kind: str, rest: bytes) -> int:
        seq = self.written + 1
        head = b'{"type":"%b","seq":%d,"timestamp":%d' % (kind.encode(), seq, time.time_ns() // 1_000_000)
        line = head + rest + b"\n"
        start = self._index.end(seq - 1)
        self._write(line, start)
        self._index.add(start + len(line), is_output=kind == OUTPUT)
        self._unsynced.append(line)
        self.unsynced_bytes += len(line)
        return seq

    def _write(self, data: bytes, start: int) -> None:
        # Written at the known end, not at the file's: what a failed attempt left there is overwritten or cut.
        done = 0
        view = memoryview(data)
        try:
            while done < len(data):
                done += os.pwrite(self._file, view[done:], start + done)
        except OSError as error:
            if done:
                os.ftruncate(self._file, start)
            if is_full(error):
                raise DiskFull("no space left on the disk for the session's output") from error
            raise

    def _length(self, seq: int) -> int:
        return self._index.end(seq) - self._index.end(seq - 1)

    def _lines(self, first: int, last: int) -> Iterator[tuple[bytes, bool]]:
        """Yield envelopes that stand together, and whether each is whole: a damaged old one becomes a note."""
        start = self._index.end(first - 1)
        data = self._pread(start, self._index.end(last) - 1)
        begin = 0
        for seq in range(first, last + 1):
            end = self._index.end(seq) - start
            line = data[begin : max(end - 1, begin)]  # one whose newline is lost has no bytes of its own
            begin = end
            yield (line, True) if self._is_whole(line, seq) else (_damaged(line, seq), False)

    def _is_whole(self, line: bytes, seq: int) -> bool:
        if seq > self._old or seq <= self._proven:
            return True
        is_whole = _is_envelope(line, seq)
        if is_whole and seq == self._proven + 1:
            self._proven = seq
        return is_whole

    def _pread(self, start: int, end: int) -> bytes:
        parts = []
        while start < end:
            part = os.pread(self._file, end - start, start)
            if not part:
                raise OSError(errno.EIO, "the journal was cut short by another program")
            parts.append(part)
            start += len(part)
        return b"".join(parts)


def is_full(error: OSError) -> bool:
    """Tell whether an error means that there is no room, so that a later attempt may do."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _damaged(line: bytes, seq: int) -> bytes:
    note = {"type": NOTE, "seq": seq, "timestamp": 0, "event": "damaged", "bytes": len(line)}
    return dump_json(note | {"text": "this line of the journal is damaged"})


def _is_envelope(line: bytes, seq: int) -> bool:
    try:
        value = load_json(line) if seq_of_line(line) == seq else None
    except WireError:
        return False
    return isinstance(value, dict) and value["seq"] == seq and isinstance(value["type"], str)
