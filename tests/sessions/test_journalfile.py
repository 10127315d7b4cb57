"""The journal's file: gapless numbers, pages in bounds, torn tails, damage, full disks, and its index."""

import errno
import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import pytest

from p2pclaude.sessions import journalfile
from p2pclaude.sessions.journalfile import PAGES_AHEAD, DiskFull, JournalFile, Page


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a journal to be."""
    return tmp_path / "journal.jsonl"


def decoded(page: Page) -> list[dict[str, Any]]:
    return [json.loads(line) for line in page.lines]


def sync(journal: JournalFile) -> JournalFile:
    """Show what is written."""
    journal.flush()
    journal.show(journal.written)
    return journal


def fill(journal: JournalFile, count: int, size: int = 10) -> None:
    for _ in range(count):
        journal.append_output(json.dumps({"type": "x", "pad": "p" * size}).encode())
    sync(journal)


def test_envelopes_are_numbered_and_stamped(path: Path) -> None:
    journal = JournalFile.open(path)
    assert journal.last_seq == 0
    assert journal.append_output(b'{"n": 1.0}') == 1
    assert journal.append("message", {"messageId": "m", "data": {"ü": 1}}) == 2
    assert (journal.last_seq, journal.written, journal.read(0)) == (0, 2, Page([], 0))  # not shown before it is synced
    first, second = decoded(sync(journal).read(0))
    journal.close()
    assert (first["type"], first["seq"], first["data"]) == ("session-output", 1, {"n": 1.0})
    assert second == {"type": "message", "seq": 2, "timestamp": second["timestamp"], "messageId": "m", "data": {"ü": 1}}
    assert abs(second["timestamp"] / 1000 - path.stat().st_mtime) < 60
    assert b'"data":{"n": 1.0}}\n' in path.read_bytes()  # unchanged, not written anew
    assert path.stat().st_mode & 0o777 == 0o600


def test_reading_goes_on_where_the_page_ended(path: Path) -> None:
    journal = JournalFile.open(path)
    fill(journal, 10)
    assert [e["seq"] for e in decoded(journal.read(3, limit=4))] == [4, 5, 6, 7]
    assert journal.read(3, limit=4).next == 7
    assert journal.read(10) == Page([], 10)
    assert journal.read(99) == Page([], 10)
    assert journal.read(-5, limit=1).next == 1
    assert journal.read(0, limit=0) == Page([], 0)
    journal.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_page_names_those_after_it_that_no_later_envelope_changes(path: Path, seed: int) -> None:
    rng, journal = random.Random(seed), JournalFile.open(path)
    fill(journal, 60, size=rng.randrange(60))
    journal.append("message", {"data": "p" * 3000})
    fill(sync(journal), rng.randrange(60), size=rng.randrange(400))
    max_bytes = rng.randrange(1, 1500)
    first = journal.read(0, max_bytes=max_bytes)
    fill(journal, rng.randrange(3))
    ends, page = [], first
    while (page := journal.read(page.next, max_bytes=max_bytes)).lines:
        ends.append(page.next)
    assert list(first.then) == ends[: len(first.then)]
    assert len(first.then) >= min(len(ends) - 4, PAGES_AHEAD)
    assert journal.read(0, limit=1).then == journal.read(journal.last_seq).then == ()
    journal.close()


def test_a_page_is_bounded_in_bytes_but_never_empty(path: Path) -> None:
    journal = JournalFile.open(path)
    fill(journal, 3, size=1000)
    fill(journal, 1, size=100_000)
    fill(journal, 2, size=1000)
    sizes, after = [], 0
    while (page := journal.read(after, max_bytes=2500)).lines:
        sizes.append(len(page.lines))
        after = page.next
    assert sizes == [2, 1, 1, 2]
    journal.close()


def test_only_outputs(path: Path) -> None:
    journal = JournalFile.open(path)
    for _ in range(3):
        journal.append("message", {"pad": "p" * 5000})
        fill(journal, 1)
    page = journal.read(0, outputs_only=True, max_bytes=1000)
    assert [e["seq"] for e in decoded(page)] == [2, 4, 6]
    assert page.next == 6
    assert [e["seq"] for e in decoded(journal.read(0, outputs_only=True, limit=2))] == [2, 4]
    journal.close()


def test_the_newest_few(path: Path) -> None:
    journal = JournalFile.open(path)
    for _ in range(3):
        journal.append("message", {})
        fill(journal, 2)
    assert journal.start_of_last(2) == 7
    assert journal.start_of_last(3) == 5
    assert journal.start_of_last(100) == 0
    assert journal.start_of_last(100, after=4) == 4
    assert journal.start_of_last(0) == 9
    assert journal.start_of_last(100, max_bytes=1) == 8
    journal.close()


def test_what_stood_there_is_read_again(path: Path) -> None:
    journal = JournalFile.open(path)
    fill(journal, 5)
    journal.append("message", {"messageId": "m"})
    before = sync(journal).read(0)
    journal.close()
    others: list[tuple[int, Any]] = []
    again = JournalFile.open(path, on_other=lambda seq, line: others.append((seq, json.loads(line)["messageId"])))
    assert again.read(0) == before
    assert others == [(6, "m")]
    assert again.append_output(b"{}") == 7
    again.close()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_cut(path: Path, cut: int) -> None:
    journal = JournalFile.open(path)
    fill(journal, 3)
    journal.close()
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    torn = JournalFile.open(path)
    assert torn.last_seq == 2
    assert torn.append_output(b'{"after":"the cut"}') == 3
    assert [e["seq"] for e in decoded(sync(torn).read(0))] == [1, 2, 3]
    torn.close()


def test_a_whole_torn_journal(path: Path) -> None:
    path.write_bytes(b'{"type":"session-outp')
    journal = JournalFile.open(path)
    assert (journal.last_seq, path.stat().st_size) == (0, 0)
    journal.close()


def test_a_full_disk_leaves_nothing_half_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile.open(path)
    fill(journal, 2)
    before = path.read_bytes()
    write, room = os.pwrite, 20

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, bytes(data)[:room], offset)
        room -= done
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    for room_left in (20, 0):
        room = room_left
        with pytest.raises(DiskFull, match="no space left"):
            journal.append_output(b'{"does":"not fit in there"}')
        assert path.read_bytes() == before
        assert journal.last_seq == 2
    room = 10_000
    assert journal.append_output(b'{"fits":"again"}') == 3
    assert [e["seq"] for e in decoded(sync(journal).read(0))] == [1, 2, 3]
    journal.close()


def test_a_real_limit_of_the_file_system(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = JournalFile.open(path)
    fill(journal, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))
    try:
        with pytest.raises(DiskFull):
            fill(journal, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fill(journal, 1)
    assert [e["seq"] for e in decoded(journal.read(0))] == [1, 2]
    journal.close()


def test_another_error_of_the_disk_passes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile.open(path)

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="Input/output") as caught:
        journal.append_output(b"{}")
    assert not isinstance(caught.value, DiskFull)
    journal.close()


def test_what_an_earlier_daemon_left_is_synced_before_it_is_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile.open(path)
    fill(journal, 2)
    journal.close()
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    journal = JournalFile.open(path)
    assert len(synced) == 1 and journal.last_seq == 2
    journal.close()


def test_the_index_is_written_while_the_journal_grows(path: Path) -> None:
    """Not at the end alone: a daemon that is killed has none."""
    journal = JournalFile.open(path)
    before = path.with_suffix(".index").stat().st_size
    fill(journal, 300)
    assert path.with_suffix(".index").stat().st_size >= before + 256 * 8
    journal.close()


def test_what_is_not_shown_is_written_again(path: Path) -> None:
    journal = JournalFile.open(path)
    fill(journal, 2)
    journal.append("message", {"messageId": "m"})
    before = path.read_bytes()
    os.truncate(path, len(before) - 5)  # as a system does that drops pages it could not write
    journal.rewrite()
    assert path.read_bytes() == before
    assert [e["seq"] for e in decoded(sync(journal).read(0))] == [1, 2, 3]
    journal.close()


def test_what_was_given_up_is_not_counted(path: Path) -> None:
    journal = JournalFile.open(path)
    fill(journal, 1)
    journal.append("message", {"pad": "p" * 1000})
    journal.drop_unsynced()
    assert (journal.written, journal.unsynced_bytes) == (1, 0)
    fill(journal, 1)
    assert journal.unsynced_bytes == 0
    assert [e["seq"] for e in decoded(journal.read(0))] == [1, 2]
    journal.close()


def test_an_old_line_is_proven_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile.open(path)
    fill(journal, 5)
    journal.close()
    looked: list[int] = []
    prove = journalfile._is_envelope

    def look(line: bytes, seq: int) -> bool:
        looked.append(seq)
        return prove(line, seq)

    monkeypatch.setattr(journalfile, "_is_envelope", look)
    journal = JournalFile.open(path)
    for _ in range(3):
        assert len(journal.read(0).lines) == 5
    assert looked == [1, 2, 3, 4, 5]
    journal.close()


def test_a_journal_cut_by_somebody_else_is_an_error(path: Path) -> None:
    journal = JournalFile.open(path)
    fill(journal, 2)
    os.truncate(path, 10)
    with pytest.raises(OSError, match="cut short"):
        journal.read(0)
    journal.close()


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_reads_back_in_any_pages(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    journal, written = JournalFile.open(path), []
    for _ in range(200):
        if rng.random() < 0.7:
            data = {"n": rng.random(), "pad": "ü" * rng.randrange(300)}
            written.append(("session-output", data))
            journal.append_output(json.dumps(data).encode())
        else:
            data = {"data": rng.randrange(100)}
            written.append(("message", data))
            journal.append("message", data)
        if rng.random() < 0.05:
            journal.close()
            journal = JournalFile.open(path)
    sync(journal)
    found: list[dict[str, Any]] = []
    while (page := journal.read(len(found), limit=rng.randrange(1, 9), max_bytes=rng.randrange(2000))).lines:
        found += decoded(page)
    assert [e["seq"] for e in found] == list(range(1, 201))
    assert [(e["type"], e["data"] if e["type"] == "session-output" else {"data": e["data"]}) for e in found] == written
    journal.close()
