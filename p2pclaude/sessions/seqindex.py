"""Where each envelope of a journal ends: kept in memory at 8 bytes an envelope, and on disk beside the journal.

    journal.index   8 bytes   b"p2pcidx1"
                    blocks:   u32 count, u32 CRC-32 of what follows, count times u64 (the line's end << 1 | is output)

`journalfile` stands above. The file spares the next start from reading the whole journal; it is never synced, and
whatever does not fit the journal is dropped and found anew by reading. All numbers in the machine's own byte order: on
another machine the file is simply wrong.
"""

import os
import re
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from p2pclaude.protocol.wire import OUTPUT

_MAGIC: Final = b"p2pcidx1"
_BLOCK: Final = struct.Struct("=II")
_CHUNK: Final = 1024 * 1024
_HEAD_BYTES: Final = 96
_HEADER: Final = re.compile(rb'\{"type":"([A-Za-z0-9-]{1,40})","seq":([1-9][0-9]{0,15}),')
_OUTPUT: Final = OUTPUT.encode()
_MAX_GAP: Final = 1000  # a number that leaps further ahead is damaged itself
_SAVE_ENTRIES: Final = 256
_SAVE_BYTES: Final = 1024 * 1024


def seq_of_line(line: bytes) -> int | None:
    """Give the seq that a journal's line says it has, None if it does not begin as an envelope does."""
    match = _HEADER.match(line)
    return None if match is None else int(match[2])


class SeqIndex:
    """The places of all envelopes of one journal; seq 1 is the first."""

    def __init__(self) -> None:
        self._entries = array("Q", [0])  # where the line ends << 1 | whether it is output
        self._doubtful = 0  # entries at the end whose numbers the next line may prove wrong
        self._saved = 0  # entries that stand in the file
        self._file = -1
        self._file_end = len(_MAGIC)

    @property
    def last_seq(self) -> int:
        """Give the newest envelope's seq, 0 when there is none."""
        return len(self._entries) - 1

    def end(self, seq: int) -> int:
        """Give where an envelope's line ends in the journal, its newline included."""
        return self._entries[seq] >> 1

    def last_within(self, end: int, after: int) -> int:
        """Give the last envelope after this one whose line ends there or before; this one if none does."""
        return bisect_right(self._entries, end, after + 1, key=lambda entry: entry >> 1) - 1

    def is_output(self, seq: int) -> bool:
        """Tell whether an envelope holds what Claude printed."""
        return bool(self._entries[seq] & 1)

    def add(self, end: int, *, is_output: bool) -> None:
        """Take the next envelope."""
        self._entries.append(end << 1 | is_output)

    def cut(self, last_seq: int) -> None:
        """Forget every envelope after this one; none of them may have been saved."""
        del self._entries[last_seq + 1 :]

    def scan(self, journal: int) -> None:
        """Find the envelopes that stand in the journal (a descriptor) behind those known. Raises OSError.

        A line counts by the number that it holds, so that damage in one moves no other.
        """
        for head, end in _lines(journal, self.end(self.last_seq)):
            self._place(head, end)

    def _place(self, head: bytes, end: int) -> None:
        match = _HEADER.match(head)
        ahead = 0 if match is None else int(match[2]) - self.last_seq - 1
        if match is None or not -self._doubtful <= ahead <= _MAX_GAP:
            self.add(end, is_output=False)
            self._doubtful += 1
            return
        if ahead < 0:  # what came before was one line: newlines cut it to pieces, or its own number is wrong
            line_end = self.end(self.last_seq)
            del self._entries[ahead:]
            self._entries[-1] = line_end << 1 | self._entries[-1] & 1
        for _ in range(ahead):  # their newlines are lost, and they stand in the line before
            self.add(self.end(self.last_seq), is_output=False)
        self.add(end, is_output=match[1] == _OUTPUT)
        self._doubtful = ahead + 1 if ahead > 0 else 0

    def open_file(self, path: Path, journal: int) -> None:
        """Read what an earlier index of this journal (a descriptor) holds, as far as it is true. Raises OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._file).st_size
        if os.pread(self._file, len(_MAGIC), 0) == _MAGIC:
            while (block := self._read_block(size)) is not None:
                self._entries.extend(block)
                self._file_end += _BLOCK.size + len(block) * block.itemsize
        if not self._fits(journal):
            del self._entries[1:]
            self._file_end = len(_MAGIC)
        os.ftruncate(self._file, self._file_end)
        os.pwrite(self._file, _MAGIC, 0)
        self._saved = self.last_seq

    def _read_block(self, size: int) -> "array[int] | None":
        head = os.pread(self._file, _BLOCK.size, self._file_end)
        if len(head) < _BLOCK.size:
            return None
        count, checksum = _BLOCK.unpack(head)
        block = array("Q")
        length = count * block.itemsize
        if not 0 < length <= size:
            return None
        data = os.pread(self._file, length, self._file_end + _BLOCK.size)
        if len(data) < length or zlib.crc32(data) != checksum:
            return None
        block.frombytes(data)
        return block

    def _fits(self, journal: int) -> bool:
        """Tell whether the last envelope stands where it should; a journal that was replaced is found out by that."""
        seq = self.last_seq
        while seq > 0 and self.end(seq) == self.end(seq - 1):
            seq -= 1
        start = self.end(max(seq - 1, 0))
        if self.end(seq) > os.fstat(journal).st_size:
            return False
        before = b"\n" if start == 0 else os.pread(journal, 1, start - 1)
        last = b"\n" if seq == 0 else os.pread(journal, 1, self.end(seq) - 1)
        right = seq == 0 or seq_of_line(os.pread(journal, _HEAD_BYTES, start)) == seq
        return before == last == b"\n" and right

    def save(self, last_seq: int, *, all_of_it: bool = False) -> None:
        """Write entries up to this one to the file, when they are many or `all_of_it` is asked for.

        A failure only costs the next start its time.
        """
        few = last_seq - self._saved < _SAVE_ENTRIES and self.end(last_seq) - self.end(self._saved) < _SAVE_BYTES
        if self._file < 0 or last_seq <= self._saved or (few and not all_of_it):
            return
        data = self._entries[self._saved + 1 : last_seq + 1].tobytes()
        block = _BLOCK.pack(last_seq - self._saved, zlib.crc32(data)) + data
        try:
            if os.pwrite(self._file, block, self._file_end) == len(block):
                self._file_end += len(block)
                self._saved = last_seq
        except OSError:
            pass

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _lines(journal: int, at: int) -> Iterator[tuple[bytes, int]]:
    """Yield the beginning and the end of each complete line from a place on, in bounded memory."""
    head = b""
    while chunk := os.pread(journal, _CHUNK, at):
        begin = 0
        while (found := chunk.find(b"\n", begin)) >= 0:
            yield (head + chunk[begin : min(found, begin + _HEAD_BYTES)])[:_HEAD_BYTES], at + found + 1
            head, begin = b"", found + 1
        head += chunk[begin : begin + _HEAD_BYTES - len(head)]
        at += len(chunk)
