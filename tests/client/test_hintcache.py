"""The file of a daemon's whereabouts: private, whole, and harmless whatever is wrong with it."""

import os
import stat
from pathlib import Path

import pytest

from p2pclaude.client.hintcache import MAX_ADDRESSES, MAX_FILE_BYTES, HintCache, Hints, cache_directory
from p2pclaude.protocol.pairing import Pairing
from p2pclaude.protocol.wire import seal

PAIRING = Pairing(bytes(range(32)), bytes(range(32, 64)))
HINTS = Hints((("192.0.2.1", 49737), ("198.51.100.7", 1)), (("203.0.113.9", 65535),))


def only_file(directory: Path) -> Path:
    """Return the one file there is."""
    (found,) = directory.iterdir()
    return found


def test_what_was_written_is_read(tmp_path: Path) -> None:
    HintCache(str(tmp_path / "c"), PAIRING).write(HINTS)
    cache = HintCache(str(tmp_path / "c"), PAIRING)
    assert cache.read() == HINTS
    assert cache.problem is None


def test_the_file_is_private_and_names_nobody(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        HintCache(str(tmp_path / "c"), PAIRING).write(HINTS)
    finally:
        os.umask(before)
    file = only_file(tmp_path / "c")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    text = file.read_bytes() + file.name.encode()
    for secret in (PAIRING.public_key, PAIRING.data_key):
        assert secret not in text and secret.hex()[:16].encode() not in text
    assert b"192.0.2.1" not in text


def test_each_pairing_has_a_file_of_its_own(tmp_path: Path) -> None:
    """The same daemon under another data key is another pairing, and cannot read this one's hints."""
    other = Pairing(PAIRING.public_key, bytes(32))
    HintCache(str(tmp_path), PAIRING).write(HINTS)
    assert HintCache(str(tmp_path), other).read() == Hints()
    HintCache(str(tmp_path), other).write(Hints((("192.0.2.2", 1),)))
    assert len(list(tmp_path.iterdir())) == 2
    assert HintCache(str(tmp_path), PAIRING).read() == HINTS


WRONG: list[object] = [
    [],
    {},
    {"addresses": 1, "nodes": []},
    {"addresses": [["192.0.2.1"]], "nodes": []},
    {"addresses": [["192.0.2.1", 0]], "nodes": []},
    {"addresses": [["192.0.2.1", 65536]], "nodes": []},
    {"addresses": [["192.0.2.1", "1"]], "nodes": []},
    {"addresses": [["example.org", 1]], "nodes": []},
    {"addresses": [["192.0.2.010", 1]], "nodes": []},
    {"addresses": [[["192.0.2.1"], 1]], "nodes": []},
    {"addresses": ["ab"], "nodes": []},
]
DAMAGED = [b"", b"\xff\xfe", b"AAAA", b"x" * (MAX_FILE_BYTES + 1), seal(bytes(32), {}).encode()]
DAMAGED += [seal(PAIRING.data_key, value).encode() for value in WRONG]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))  # sealing is never the same twice
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damaged: bytes) -> None:
    HintCache(str(tmp_path), PAIRING).write(HINTS)
    only_file(tmp_path).write_bytes(damaged)
    cache = HintCache(str(tmp_path), PAIRING)
    assert cache.read() == Hints()
    assert cache.problem == "damaged"
    cache.write(HINTS)
    assert HintCache(str(tmp_path), PAIRING).read() == HINTS


def test_a_cache_that_cannot_be_used_says_why_and_raises_nothing(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"")
    cache = HintCache(str(place), PAIRING)
    assert cache.read() == Hints() and cache.problem is not None
    cache.write(HINTS)
    assert cache.problem is not None
    assert place.read_bytes() == b""


@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_what_is_no_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    """A pipe must not hold the tool up, and a link must not lead it elsewhere."""
    place = tmp_path / "c"
    HintCache(str(place), PAIRING).write(HINTS)
    file = only_file(place)
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(elsewhere)
    cache = HintCache(str(place), PAIRING)
    assert cache.read() == Hints() and cache.problem is not None
    cache.write(HINTS)
    assert [path.name for path in place.iterdir()] == [file.name], "a temporary file is left"
    assert (cache.problem is None) == (kind != "directory")


@pytest.mark.parametrize("kind", ["hard link", "pipe", "file"])
def test_what_was_put_in_its_way_is_not_written(tmp_path: Path, kind: str) -> None:
    """In a directory that others may write to, they know the name of the file and guess the process's number."""
    HintCache(str(tmp_path / "c"), PAIRING).write(HINTS)
    cache = HintCache(str(tmp_path / "c"), PAIRING)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    file = only_file(tmp_path / "c")
    file.unlink()
    trap = file.with_name(f"{file.name}.{os.getpid()}")
    if kind == "hard link":
        trap.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(trap)
    else:
        trap.touch()
        trap.chmod(0o666)
    cache.write(HINTS)
    assert cache.problem is None
    assert victim.read_bytes() == b"precious"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert HintCache(str(tmp_path / "c"), PAIRING).read() == HINTS


def test_nothing_is_written_when_nothing_is_new(tmp_path: Path) -> None:
    HintCache(str(tmp_path), PAIRING).write(HINTS)
    cache = HintCache(str(tmp_path), PAIRING)
    known = cache.read()
    only_file(tmp_path).unlink()
    cache.write(Hints(known.addresses, (("203.0.113.10", 1),)))
    assert list(tmp_path.iterdir()) == []
    cache.write(Hints((("192.0.2.3", 1),)))
    assert HintCache(str(tmp_path), PAIRING).read().addresses == (("192.0.2.3", 1),)


def test_only_a_few_are_kept(tmp_path: Path) -> None:
    many = tuple((f"192.0.2.{n}", 1) for n in range(1, 30))
    HintCache(str(tmp_path), PAIRING).write(Hints(many, many))
    assert HintCache(str(tmp_path), PAIRING).read() == Hints(many[:MAX_ADDRESSES], many[:MAX_ADDRESSES])


def test_switched_off_it_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = HintCache(None, PAIRING)
    cache.write(HINTS)
    assert cache.read() == Hints() and cache.problem is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "environ", "directory"),
    [
        ("linux", {"HOME": "/home/u"}, "/home/u/.cache/p2pclaude"),
        ("linux", {"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}, "/c/p2pclaude"),
        ("linux", {"HOME": "/home/u", "XDG_CACHE_HOME": ""}, "/home/u/.cache/p2pclaude"),
        ("linux", {"HOME": "/home/u", "XDG_CACHE_HOME": "c"}, None),
        ("linux", {}, None),
        ("darwin", {"HOME": "/Users/u", "XDG_CACHE_HOME": "/c"}, "/Users/u/Library/Caches/p2pclaude"),
        ("linux", {"HOME": "/home/u", "P2P_CLAUDE_CACHE": "/x"}, "/x"),
        ("linux", {"HOME": "/home/u", "P2P_CLAUDE_CACHE": ""}, None),
    ],
)
def test_where_it_is(
    monkeypatch: pytest.MonkeyPatch, platform: str, environ: dict[str, str], directory: str | None
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert cache_directory(environ) == directory
