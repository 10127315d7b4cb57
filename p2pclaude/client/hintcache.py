"""What a tool learnt of a daemon's whereabouts, kept for the next tool: a file a daemon in the user's cache directory.

`rpc_client` reads it before it dials and writes it when it was connected. Nothing depends on it: hints are tried beside
the search for the daemon, so that an old one costs a packet, and a file that cannot be used is as good as none.

    NAME   BLAKE2b of the public key, keyed with the data key, in hex: it tells nobody whose it is
    text   SEALED (`protocol.wire`) of the JSON {"addresses": [[HOST, PORT], ...], "nodes": [[HOST, PORT], ...]}

`addresses` are the daemon's own, if one is known, and those of the nodes that led to it; `nodes` are others of the DHT.
"""
# ruff: noqa: PTH103, PTH104, PTH108, PTH117, PTH118
# (pathlib takes a tool's start some time)

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from p2pclaude.errors import WireError
from p2pclaude.protocol.wire import dump_json, seal_json, unseal

if TYPE_CHECKING:
    from p2pclaude.protocol.pairing import Pairing

VARIABLE = "P2P_CLAUDE_CACHE"
"""Names the cache directory; empty for none."""

MAX_FILE_BYTES = 16384
MAX_ADDRESSES = 8
"""As many of either kind are kept."""

Address = tuple[str, int]

_OCTETS = frozenset(map(str, range(256)))


class Hints(NamedTuple):
    """Where a daemon was, who led to it, and other nodes that answered."""

    addresses: tuple[Address, ...] = ()
    nodes: tuple[Address, ...] = ()


def cache_directory(environ: Mapping[str, str]) -> str | None:
    """Return the directory of the hints, None if they shall not be kept."""
    if VARIABLE in environ:
        return environ[VARIABLE] or None
    if sys.platform == "darwin":
        base = os.path.join(environ.get("HOME", ""), "Library", "Caches")
    else:
        base = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", ""), ".cache")
    # A relative one is to be ignored, says the XDG specification; it would be another in every directory.
    return os.path.join(base, "p2pclaude") if os.path.isabs(base) else None


class HintCache:
    """The hints about one pairing's daemon. `problem` says why the last call was in vain."""

    def __init__(self, directory: str | None, pairing: Pairing) -> None:
        name = blake2b(pairing.public_key, key=pairing.data_key, digest_size=16, person=b"p2pclaude hints").hexdigest()
        self._directory = directory
        self._path = os.path.join(directory or "", name)
        self._data_key = pairing.data_key
        self._read = Hints()
        self.problem: str | None = None

    def read(self) -> Hints:
        """Return the hints, none if there are none to be had."""
        self.problem = None
        if self._directory is None:
            return Hints()
        try:
            self._read = decode_hints(unseal(self._data_key, self._read_own_file().decode("ascii")))
            return self._read
        except FileNotFoundError:
            return Hints()
        except (OSError, ValueError, WireError) as error:
            self.problem = _reason(error)
            return Hints()

    def write(self, hints: Hints) -> None:
        """Keep the hints for the next time, if the daemon's whereabouts are others than those last read."""
        self.problem = None
        if self._directory is None or hints.addresses[:MAX_ADDRESSES] == self._read.addresses:
            return
        text = dump_json({"addresses": hints.addresses[:MAX_ADDRESSES], "nodes": hints.nodes[:MAX_ADDRESSES]})
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            self._replace(seal_json(self._data_key, text).encode())
        except (OSError, ValueError) as error:
            self.problem = _reason(error)

    def _read_own_file(self) -> bytes:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a file")
            return os.read(descriptor, MAX_FILE_BYTES)
        finally:
            os.close(descriptor)

    def _replace(self, data: bytes) -> None:
        # Not synced: after a power cut the file may be empty, and is then no worse than none.
        # A new one under a name that nobody can guess: what others have put there would be written to, or waited for.
        temporary = f"{self._path}.{os.urandom(8).hex()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)
            os.rename(temporary, self._path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else "damaged"


def decode_hints(value: object) -> Hints:
    """Check what the file holds, a JSON value. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return Hints(_addresses(value.get("addresses")), _addresses(value.get("nodes")))


def _addresses(value: object) -> tuple[Address, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return tuple(_address(entry) for entry in value[:MAX_ADDRESSES])


def _address(value: object) -> Address:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError("not an address")
    host, port = value
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 65536:
        raise ValueError("not an address")
    octets = host.split(".")
    if len(octets) != 4 or not all(octet in _OCTETS for octet in octets):
        raise ValueError("not an IPv4 address")
    return host, port
