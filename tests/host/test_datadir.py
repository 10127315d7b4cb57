"""The data directory: keys that last, modes, the lock, damage that is said, disks that are full."""

import base64
import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from p2pclaude.errors import DataError, Refused, TryAgain, UsageError
from p2pclaude.host.datadir import DataDir, Identity, file_errors, write_atomically

# An identity as the TypeScript system writes it; the pair is that of the seed 02 02 … 02.
SEED = bytes([2]) * 32
PUBLIC = bytes.fromhex("8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b394")
PAIR = {"publicKey": base64.b64encode(PUBLIC).decode(), "secretKey": base64.b64encode(SEED + PUBLIC).decode()}
KEY = {"key": base64.b64encode(bytes(range(32))).decode(), "createdAt": 1767225600000}


@pytest.fixture
def theirs(tmp_path: Path) -> DataDir:
    """Give a data directory of the TypeScript system."""
    (tmp_path / "dht-keypair.json").write_text(json.dumps(PAIR, indent=2))
    (tmp_path / "encryption.key").write_text(json.dumps(KEY, indent=2))
    return DataDir(tmp_path)


def test_a_new_directory_gets_an_identity_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down"
    first = DataDir(path).load_or_create_identity()
    again = DataDir(path).load_or_create_identity()
    assert first == again
    assert (len(first.public_key), len(first.secret_key), len(first.data_key)) == (32, 64, 32)
    assert isinstance(first.created_at, int)
    assert path.stat().st_mode & 0o777 == 0o700
    names = {entry.name: entry.stat().st_mode & 0o777 for entry in path.iterdir()}
    assert names == {"dht-keypair.json": 0o600, "encryption.key": 0o600}


def test_the_typescript_systems_directory_is_used_as_it_is(theirs: DataDir) -> None:
    before = {entry.name: entry.read_bytes() for entry in theirs.path.iterdir()}
    assert theirs.load_or_create_identity() == Identity(PUBLIC, SEED + PUBLIC, bytes(range(32)), 1767225600000)
    assert {entry.name: entry.read_bytes() for entry in theirs.path.iterdir()} == before


def test_a_key_pair_that_leads_nowhere_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "dht-keypair.json").symlink_to("/nowhere/dht-keypair.json")  # as to a disk that is not mounted
    with pytest.raises(DataError, match=r"dht-keypair.json is missing"):
        DataDir(tmp_path).load_or_create_identity()


def test_a_key_without_a_date_still_has_the_same_one_at_every_start(theirs: DataDir) -> None:
    theirs.encryption_key_file.write_text(json.dumps({"key": KEY["key"]}))
    first = theirs.load_or_create_identity()
    assert first.created_at == DataDir(theirs.path).load_or_create_identity().created_at
    assert isinstance(first.created_at, int)
    for number in ("1e400", "NaN", "-Infinity"):  # no JSON could say so in the pairing URL
        theirs.encryption_key_file.write_text(f'{{"key": "{KEY["key"]}", "createdAt": {number}}}')
        assert isinstance(theirs.load_or_create_identity().created_at, int)
    theirs.encryption_key_file.write_text(json.dumps(KEY | {"createdAt": "2026-01-01T00:00:00Z"}))
    assert theirs.load_or_create_identity().created_at == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dht-keypair.json", ""),
        ("dht-keypair.json", "{"),
        ("dht-keypair.json", "[]"),
        ("dht-keypair.json", "[" * 50_000),
        ("dht-keypair.json", json.dumps({"publicKey": PAIR["publicKey"]})),
        ("dht-keypair.json", json.dumps(PAIR | {"publicKey": KEY["key"]})),
        ("dht-keypair.json", json.dumps(PAIR | {"secretKey": PAIR["publicKey"]})),
        ("dht-keypair.json", json.dumps(PAIR | {"secretKey": "*" * 88})),
        ("encryption.key", "\0" * 100),
        ("encryption.key", json.dumps(KEY | {"key": "AAAA"})),
        ("encryption.key", json.dumps(KEY | {"key": 7})),
    ],
)
def test_a_damaged_key_file_is_said_and_left_alone(theirs: DataDir, name: str, content: str) -> None:
    path = theirs.path / name
    path.write_text(content)
    with pytest.raises(DataError, match=f"{name} is damaged") as caught:
        theirs.load_or_create_identity()
    assert caught.value.hint is not None
    assert "backup" in caught.value.hint
    assert path.read_text() == content
    for secret in (PAIR["secretKey"], str(KEY["key"])):
        assert secret not in str(caught.value) + caught.value.hint


def test_a_lost_key_file_is_said(theirs: DataDir) -> None:
    theirs.encryption_key_file.unlink()
    with pytest.raises(DataError, match=r"encryption.key is missing"):
        theirs.load_or_create_identity()


def test_a_lost_key_pair_is_said_once_anything_depends_on_it(theirs: DataDir) -> None:
    theirs.keypair_file.unlink()
    theirs.write_pairing_url("p2p-claude://x")
    with pytest.raises(DataError, match=r"dht-keypair.json is missing"):
        theirs.load_or_create_identity()


def test_a_first_start_cut_short_goes_on(theirs: DataDir) -> None:
    theirs.keypair_file.unlink()
    assert theirs.load_or_create_identity().data_key == bytes(range(32))


def test_loose_modes_are_tightened_and_said(theirs: DataDir) -> None:
    theirs.path.chmod(0o755)
    theirs.keypair_file.chmod(0o644)
    warnings: list[str] = []
    DataDir(theirs.path, warn=warnings.append).load_or_create_identity()
    assert theirs.path.stat().st_mode & 0o777 == 0o700
    assert theirs.keypair_file.stat().st_mode & 0o777 == 0o600
    assert len(warnings) == 3
    assert "mode 0755" in warnings[0]


def hold_lock(path: str, ready: "multiprocessing.connection.Connection") -> None:
    DataDir(path).lock()
    ready.send(os.getpid())
    ready.recv()


def test_a_directory_in_use_is_said_with_the_pid(tmp_path: Path) -> None:
    ours, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold_lock, args=(str(tmp_path), other))
    process.start()
    try:
        pid = ours.recv()
        with pytest.raises(TryAgain, match=f"in use by another daemon .pid {pid}."):
            DataDir(tmp_path).lock()
    finally:
        ours.send(None)
        process.join(60)
    data_dir = DataDir(tmp_path)
    data_dir.lock()  # what a dead process held is free
    data_dir.unlock()
    data_dir.lock()
    data_dir.unlock()


def test_the_pairing_url_is_written_once(theirs: DataDir) -> None:
    theirs.write_pairing_url("p2p-claude://connect?code=a")
    assert theirs.pairing_url_file.read_text() == "p2p-claude://connect?code=a\n"
    assert theirs.pairing_url_file.stat().st_mode & 0o777 == 0o600
    inode = theirs.pairing_url_file.stat().st_ino
    theirs.write_pairing_url("p2p-claude://connect?code=a")
    assert theirs.pairing_url_file.stat().st_ino == inode
    theirs.write_pairing_url("p2p-claude://connect?code=b")
    assert theirs.pairing_url_file.read_text() == "p2p-claude://connect?code=b\n"


def test_a_new_data_key_keeps_the_identity(theirs: DataDir) -> None:
    before = theirs.load_or_create_identity()
    theirs.rotate_data_key()
    after = theirs.load_or_create_identity()
    assert (after.public_key, after.secret_key) == (before.public_key, before.secret_key)
    assert after.data_key != before.data_key
    assert after.created_at != before.created_at
    assert after == theirs.load_or_create_identity()
    assert theirs.encryption_key_file.stat().st_mode & 0o777 == 0o600


def test_a_rotation_cut_short_leaves_the_old_key_or_the_new_one(
    theirs: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = theirs.load_or_create_identity()
    theirs.write_pairing_url("old")
    replace = Path.replace

    def cut(self: Path, target: Path, *, after: bool) -> None:
        if after:
            replace(self, target)
        raise KeyboardInterrupt

    for after in (False, True):
        monkeypatch.setattr(Path, "replace", lambda self, target, after=after: cut(self, target, after=after))
        with pytest.raises(KeyboardInterrupt):
            theirs.rotate_data_key()
        monkeypatch.undo()
        identity = theirs.load_or_create_identity()
        assert (identity.data_key != before.data_key) is after
        assert identity.public_key == before.public_key
    theirs.write_pairing_url("new")  # as the next start does
    assert theirs.pairing_url_file.read_text() == "new\n"


def test_a_damaged_key_is_not_made_good_by_a_rotation(theirs: DataDir) -> None:
    theirs.encryption_key_file.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        theirs.rotate_data_key()
    assert theirs.encryption_key_file.read_text() == "{"


def test_a_full_disk_is_said_and_leaves_the_old_file(theirs: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs.write_pairing_url("old")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TryAgain, match=r"pairing.url: no space left"):
        theirs.write_pairing_url("new")
    assert theirs.pairing_url_file.read_text() == "old\n"
    assert not [entry for entry in theirs.path.iterdir() if entry.name.startswith(".")]


def test_exclusive_writing_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first", exclusive=True)
    write_atomically(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_other_errors_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="file exists"):
        DataDir(tmp_path / "file")
    with pytest.raises(Refused, match="not a directory"):
        DataDir(tmp_path / "file" / "below")
    with pytest.raises(Refused, match="/proc/none"):
        DataDir("/proc/none")
    with pytest.raises(Refused, match="permission denied"), file_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(Refused, match="input/output error"), file_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error")


def test_the_default_directory() -> None:
    assert DataDir.default_path({"P2P_CLAUDE_DATA_DIR": "/d", "HOME": "/h"}) == Path("/d")
    assert DataDir.default_path({"HOME": "/h"}) == Path("/h/.p2p-claude")


def test_no_home_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UsageError, match="no home directory"):
        DataDir.default_path({})


def test_nothing_shows_the_keys(theirs: DataDir) -> None:
    shown = repr(theirs.load_or_create_identity())
    for key in (PUBLIC, SEED + PUBLIC, bytes(range(32))):
        assert repr(key) not in shown
