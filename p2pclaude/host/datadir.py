"""The daemon's data directory: identity, pairing URL, lock, and where sessions are kept.

    ~/.p2p-claude      mode 0700, files 0600, each written to a temporary name, synced and renamed
    dht-keypair.json   {"publicKey", "secretKey"} in base64 (32 and 64 bytes)     as the TypeScript system
    encryption.key     {"key", "createdAt"}                                       as the TypeScript system
    pairing.url        the pairing URL            daemon.lock   locked while a daemon runs, holds its pid
    sessions/ID/       journal.jsonl and session.json

`daemon` and `sessions` stand above, the file system below. A damaged key file is an error, never a new identity.
"""

import base64
import binascii
import errno
import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from p2pclaude.errors import DataError, Refused, TryAgain, UsageError
from p2pclaude.hyperdht import KeyPair

ENVIRONMENT_VARIABLE = "P2P_CLAUDE_DATA_DIR"
"""Names the data directory when no option does."""

_MAX_KEY_FILE = 65536


@dataclass(frozen=True, slots=True)
class Identity:
    """The daemon's keys: Ed25519 (`secret_key` is seed and public key, 64 bytes) and the data key (32 bytes).

    `created_at` is in milliseconds since 1970 as a number, or whatever text the file of another program holds.
    """

    public_key: bytes = field(repr=False)
    secret_key: bytes = field(repr=False)
    data_key: bytes = field(repr=False)
    created_at: int | float | str


class DataDir:
    """One data directory, made on first use. `warn` gets a sentence for each thing put right on the way."""

    def __init__(self, path: str | os.PathLike[str], *, warn: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._warn = warn or (lambda _: None)
        self._lock: int | None = None
        try:
            with file_errors(self.path):
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._tighten(self.path, 0o700)
        except FileNotFoundError as error:  # as in /proc
            raise Refused(f"{self.path} cannot be made") from error

    @staticmethod
    def default_path(environ: Mapping[str, str]) -> Path:
        """Give the directory that the environment names, else ~/.p2p-claude. Raises UsageError without a home."""
        if named := environ.get(ENVIRONMENT_VARIABLE):
            return Path(named)
        try:
            return Path(environ.get("HOME") or Path.home()) / ".p2p-claude"
        except RuntimeError:
            hint = f"name a directory in {ENVIRONMENT_VARIABLE}"  # the node has no --data-dir
            raise UsageError("there is no home directory", hint=hint) from None

    @property
    def keypair_file(self) -> Path:
        """Give the path of the DHT key pair."""
        return self.path / "dht-keypair.json"

    @property
    def encryption_key_file(self) -> Path:
        """Give the path of the data key."""
        return self.path / "encryption.key"

    @property
    def pairing_url_file(self) -> Path:
        """Give the path of the pairing URL."""
        return self.path / "pairing.url"

    @property
    def sessions_dir(self) -> Path:
        """Give the directory that holds one directory a session."""
        return self.path / "sessions"

    def lock(self) -> None:
        """Take the directory for this process until `unlock` or exit. Raises TryAgain if a daemon has it."""
        path = self.path / "daemon.lock"
        with file_errors(path):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(lock, 0)
                os.write(lock, b"%d\n" % os.getpid())
            except BlockingIOError:
                pid = os.read(lock, 32).decode("ascii", "replace").strip()
                os.close(lock)
                raise self._in_use(pid) from None
            except OSError:
                os.close(lock)
                raise
        self._lock = lock

    def _in_use(self, pid: str) -> TryAgain:
        by = f" (pid {pid})" if pid.isdigit() else ""
        return TryAgain(f"{self.path} is in use by another daemon{by}", hint="stop it, or use another --data-dir")

    def unlock(self) -> None:
        """Give the directory free again."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load_or_create_identity(self) -> Identity:
        """Read the keys, or make them in a directory that never had any; safe beside another process.

        Raises DataError, with what to do, if a key file is damaged or one of the two is missing.
        """
        try:
            with file_errors(self.path):
                if not self.keypair_file.exists():
                    self._create_missing_keys()
            return self._read_identity()
        except FileNotFoundError:
            # A key pair that is a link to nowhere is neither there nor made.
            there = self.keypair_file.exists()
            raise self._missing(self.encryption_key_file if there else self.keypair_file) from None

    def rotate_data_key(self) -> None:
        """Make a new data key, so that no URL handed out before opens anything; call it with the lock held.

        The key is replaced in one step: whatever comes after it, a crash too, the old one is gone, and `pairing.url`
        is written anew at the latest when a daemon starts.
        """
        self.load_or_create_identity()  # damaged files are not made good by this
        with file_errors(self.encryption_key_file):
            write_atomically(self.encryption_key_file, _new_data_key())

    def write_pairing_url(self, url: str) -> None:
        """Write `pairing.url`, unless it holds that URL already."""
        with file_errors(self.pairing_url_file):
            text = (url + "\n").encode()
            if not self.pairing_url_file.exists() or self.pairing_url_file.read_bytes() != text:
                write_atomically(self.pairing_url_file, text)
            self._tighten(self.pairing_url_file, 0o600)

    def _create_missing_keys(self) -> None:
        # The data key is written first: a data key alone is a first start cut short, and is kept. Once a URL was
        # handed out, or sessions exist, a missing file is a loss that a person must hear of.
        if self.pairing_url_file.exists() or (self.sessions_dir.exists() and any(self.sessions_dir.iterdir())):
            raise self._missing(self.keypair_file)
        own = KeyPair.generate()
        pair = {"publicKey": _to_base64(own.public_key), "secretKey": _to_base64(own.secret_key)}
        for path, data in ((self.encryption_key_file, _new_data_key()), (self.keypair_file, _key_file(pair))):
            with file_errors(path):
                write_atomically(path, data, exclusive=True)

    def _read_identity(self) -> Identity:
        pair = self._read_key_file(self.keypair_file)
        public, secret = (_key(pair, name, n) for name, n in (("publicKey", 32), ("secretKey", 64)))
        if public is None or secret is None or not _belong_together(public, secret):
            raise self._damaged(self.keypair_file)
        key_file = self._read_key_file(self.encryption_key_file)
        key = _key(key_file, "key", 32)
        if key is None:
            raise self._damaged(self.encryption_key_file)
        created_at = key_file.get("createdAt")
        infinite = isinstance(created_at, float) and not math.isfinite(created_at)
        if infinite or isinstance(created_at, bool) or not isinstance(created_at, int | float | str):
            # Older files lack it: the file's own date is as old as the key and the same at every start.
            created_at = int(self.encryption_key_file.stat().st_mtime * 1000)
        return Identity(public, secret, key, created_at)

    def _read_key_file(self, path: Path) -> dict[str, object]:
        with file_errors(path):
            with path.open("rb") as file:
                data = file.read(_MAX_KEY_FILE)
            self._tighten(path, 0o600)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise self._damaged(path) from None
        if not isinstance(value, dict):
            raise self._damaged(path)
        return value

    def _tighten(self, path: Path, mode: int) -> None:
        loose = stat.S_IMODE(path.stat().st_mode)
        if loose & ~mode:
            path.chmod(loose & mode)
            self._warn(f"{path} was readable or writable by others (mode {loose:04o}), now it is {loose & mode:04o}")

    def _damaged(self, path: Path) -> DataError:
        return DataError(f"{path} is damaged", hint="restore it from a backup; " + self._how_to_begin_anew())

    def _missing(self, path: Path) -> DataError:
        return DataError(f"{path} is missing", hint="restore it from a backup; " + self._how_to_begin_anew())

    def _how_to_begin_anew(self) -> str:
        return f"to begin with a new identity and a new pairing URL, move {self.path} away"


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into TryAgain (no room) or Refused that names `path` and the cause; FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TryAgain(f"{path}: no space left on the disk", hint="make room and try again") from error
        raise Refused(f"{path}: {(error.strerror or str(error)).lower()}") from error


def write_atomically(path: Path, data: bytes, *, exclusive: bool = False) -> None:
    """Replace a file (mode 0600) in one step that also survives a power cut; leaves nothing behind when it fails.

    With `exclusive`, an existing file is left as it is. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        _write_synced(temporary, data)
        if not exclusive:
            temporary.replace(path)
        else:
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                pass
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_data_key() -> bytes:
    return _key_file({"key": _to_base64(os.urandom(32)), "createdAt": time.time_ns() // 1_000_000})


def _key_file(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"


def _belong_together(public: bytes, secret: bytes) -> bool:
    of_seed = KeyPair.from_seed(secret[:32]).public_key
    return of_seed == public == secret[32:]


def _key(values: Mapping[str, object], name: str, size: int) -> bytes | None:
    text = values.get(name)
    if not isinstance(text, str):
        return None
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) == size else None


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
