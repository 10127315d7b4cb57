"""What a fuzz target is, and how bytes become decisions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["Script", "Target", "no_seeds"]

QUICK_RUNS: Final = 10_000  # in the short run


def no_seeds() -> Iterable[bytes]:
    """Give no inputs: the corpus directory is all there is."""
    return ()


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to fuzz: `run` takes any bytes and raises only when something is wrong.

    `seeds` gives inputs to begin with, besides the files in the corpus directory; `runs` is how many inputs the short
    run tries.
    """

    name: str
    run: Callable[[bytes], object]
    runs: int = QUICK_RUNS
    max_bytes: int = 1500
    seeds: Callable[[], Iterable[bytes]] = no_seeds

    @property
    def quick(self) -> bool:
        """Whether a million inputs take 20 s at most: neither state machines nor long lines, and no files."""
        return self.runs >= QUICK_RUNS


class Script:
    """Decisions read from bytes, in order; when they are used up every decision is 0."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Whether bytes are left."""
        return self._at < len(self._data)

    def byte(self) -> int:
        """Return a number from 0 to 255."""
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    def number(self, size: int) -> int:
        """Return a number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def take(self, size: int) -> bytes:
        """Return up to `size` bytes as they are."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def chunk(self) -> bytes:
        """Return up to 255 bytes behind their length."""
        return self.take(self.byte())

    def long_chunk(self) -> bytes:
        """Return up to 65535 bytes behind their length of two bytes."""
        return self.take(self.number(2))

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self._data))
