"""Where envelopes end: found by reading, damaged or not, and in a file beside the journal that is checked."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pclaude.protocol.wire import load_json
from p2pclaude.sessions import seqindex
from p2pclaude.sessions.journalfile import JournalFile
from p2pclaude.sessions.seqindex import SeqIndex, seq_of_line


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a journal."""
    return tmp_path / "journal.jsonl"


def line(seq: int, pad: int = 20, kind: str = "session-output") -> bytes:
    return b'{"type":"%b","seq":%d,"timestamp":7,"data":"%b"}\n' % (kind.encode(), seq, b"p" * pad)


def seqs_of(path: Path) -> list[tuple[int, str]]:
    """Give what a reader sees: seq and type of every envelope."""
    journal = JournalFile.open(path)
    try:
        values = [load_json(line) for line in journal.read(0, max_bytes=1 << 30).lines]
    finally:
        journal.close()
    return [(value["seq"], value["type"]) for value in values]


@contextmanager
def opened(path: Path) -> Iterator[SeqIndex]:
    """Give an index over a journal, as a start of the daemon does."""
    journal = os.open(path, os.O_RDONLY)
    index = SeqIndex()
    try:
        index.open_file(path.with_suffix(".index"), journal)
        yield index
    finally:
        index.close()
        os.close(journal)


OUT, NOTE = "session-output", "note"


def test_the_head_of_a_line() -> None:
    assert seq_of_line(line(7)) == 7
    for bad in (b"", b"{}", line(0), line(5)[1:], line(5).replace(b"5", b"05"), b'{"seq":1,"type":"x",'):
        assert seq_of_line(bad) is None


def test_what_an_index_tells_of_its_envelopes() -> None:
    index = SeqIndex()
    for end, is_output in ((10, False), (25, True), (30, True), (70, False)):
        index.add(end, is_output=is_output)
    assert [index.end(seq) for seq in range(index.last_seq + 1)] == [0, 10, 25, 30, 70]
    assert [index.is_output(seq) for seq in range(1, 5)] == [False, True, True, False]
    assert [index.last_within(end, 0) for end in (9, 10, 29, 30, 69, 70, 1000)] == [0, 1, 2, 3, 3, 4, 4]
    assert [index.last_within(30, after) for after in (1, 2, 3)] == [3, 3, 3]
    index.cut(2)
    assert (index.last_seq, index.end(2)) == (2, 25)


def test_an_index_gives_its_descriptor_back(path: Path) -> None:
    path.touch()
    SeqIndex().close()  # it was never opened
    before = list(Path("/proc/self/fd").iterdir())
    with opened(path) as index:
        pass
    index.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_damaged_line_keeps_its_place(path: Path, indexed: bool) -> None:
    good = b"".join(line(seq) for seq in range(1, 6))
    path.write_bytes(good)
    if indexed:
        assert len(seqs_of(path)) == 5
    for damage, bad in (
        (b'"seq":3', b'"sEq":3'),
        (line(3), b"\0" * len(line(3)[:-1]) + b"\n"),
        (b'pp"}\n{"type":"session-output","seq":4', b'ppp}\n{"type":"session-output","seq":4'),
    ):
        assert damage in good
        path.write_bytes(good.replace(damage, bad))
        assert seqs_of(path) == [(1, OUT), (2, OUT), (3, NOTE), (4, OUT), (5, OUT)], damage
        if not indexed:
            path.with_suffix(".index").unlink()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_lost_newline_moves_no_number(path: Path, indexed: bool) -> None:
    lines = [line(seq) for seq in range(1, 7)]
    path.write_bytes(b"".join(lines))
    if indexed:
        assert len(seqs_of(path)) == 6
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-1] + b"X" + b"".join(lines[3:]))
    expected = [(1, OUT), (2, OUT), (3, OUT if indexed else NOTE), (4, OUT if indexed else NOTE), (5, OUT), (6, OUT)]
    assert seqs_of(path) == expected
    journal = JournalFile.open(path)
    alone = [load_json(journal.read(seq, limit=1).lines[0]) for seq in range(6)]
    sizes = [entry["bytes"] for entry in alone if entry["type"] == NOTE]
    assert sizes == ([] if indexed else [len(lines[2]) * 2 - 1, 0])
    journal.close()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_newline_too_many_moves_no_number(path: Path, indexed: bool) -> None:
    lines = [line(seq) for seq in range(1, 5)]
    path.write_bytes(b"".join(lines))
    if indexed:
        assert len(seqs_of(path)) == 4
    path.write_bytes(lines[0] + lines[1][:-9] + b"\n\n" + lines[1][-7:] + lines[2] + lines[3])
    assert seqs_of(path) == [(1, OUT), (2, NOTE), (3, OUT), (4, OUT)]


def test_damage_at_random_never_moves_a_whole_line(path: Path) -> None:
    rng = random.Random(4)
    lines = [line(seq, rng.randrange(60), rng.choice(["session-output", "message"])) for seq in range(1, 60)]
    for _ in range(300):
        data = bytearray(b"".join(lines))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b'\n\0"9x{')
        path.write_bytes(data)
        path.with_suffix(".index").unlink(missing_ok=True)
        journal = JournalFile.open(path)
        given = journal.read(0, max_bytes=1 << 30).lines
        journal.close()
        assert [load_json(one)["seq"] for one in given] == list(range(1, len(given) + 1))
        torn = bytes(data).rpartition(b"\n")[2]
        whole = [one for one in bytes(data).removesuffix(torn).split(b"\n")[:-1] if one + b"\n" in lines]
        missing = [one for one in whole if one not in given]
        assert missing == [], missing


def test_the_file_spares_reading_the_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"".join(line(seq, 100) for seq in range(1, 2001)))
    first = JournalFile.open(path)
    first.close()
    read = 0
    real = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal read
        data = real(descriptor, length, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "pread", pread)
    again = JournalFile.open(path)
    assert again.last_seq == 2000
    assert read < 8 * 2000 + 1000  # the index, not the journal
    read = 0
    assert [load_json(one)["seq"] for one in again.read(again.start_of_last(3)).lines] == [1998, 1999, 2000]
    assert read < 3 * 200
    again.close()


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut", "flipped", "another", "longer"])
def test_a_wrong_file_is_made_anew(path: Path, damage: str) -> None:
    data = b"".join(line(seq, seq) for seq in range(1, 1001))
    path.write_bytes(data)
    expected = seqs_of(path)
    index = path.with_suffix(".index")
    kept = index.read_bytes()
    if damage == "missing":
        index.unlink()
    elif damage == "another":  # of a journal that was longer
        path.write_bytes(data + line(1001) * 1)
        seqs_of(path)
        path.write_bytes(data)
    else:
        flipped = kept[:5000] + bytes([kept[5000] ^ 1]) + kept[5001:]
        index.write_bytes(
            {"empty": b"", "garbage": os.urandom(9000), "cut": kept[:-3], "flipped": flipped, "longer": kept * 2}[
                damage
            ]
        )
    assert seqs_of(path) == expected
    assert index.read_bytes() == kept  # rebuilt
    assert seqs_of(path) == expected


def test_a_journal_that_was_replaced_is_read_anew(path: Path) -> None:
    path.write_bytes(b"".join(line(seq, 50) for seq in range(1, 100)))
    seqs_of(path)
    path.write_bytes(b"".join(line(seq, 49) for seq in range(1, 150)))
    assert seqs_of(path) == [(seq, OUT) for seq in range(1, 150)]


def test_the_index_is_saved_now_and_then(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqindex, "_SAVE_ENTRIES", 10)
    journal = JournalFile.open(path)
    for _ in range(35):
        journal.append_output(b"{}")
        journal.flush()
        journal.show(journal.written)
    with opened(path) as index:  # as a crash would find it
        assert index.last_seq == 30
        descriptor = os.open(path, os.O_RDONLY)
        index.scan(descriptor)
        os.close(descriptor)
        assert index.last_seq == 35
    journal.close()
