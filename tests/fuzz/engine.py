"""Runs a target over its corpus and over mutations of it; keeps the input that failed."""

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from fuzz.mutate import Mutator
from fuzz.target import Target

HERE: Final = Path(__file__).resolve().parent
CORPUS: Final = HERE / "corpus"
BUILD: Final = HERE.parent.parent / "build" / "fuzz"
HANG_SECONDS: Final = 20.0  # of CPU time, for one input

scratch: Path | None = None
"""Where targets may write files, in a process that is not able to clean up behind itself; else they choose a place."""


def memory() -> Path | None:
    """Return a directory in memory, None where there is none known."""
    path = Path("/dev/shm")
    return path if os.access(path, os.W_OK) else None


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did: inputs, seconds, and where the failing input lies if one was found."""

    target: str
    engine: str
    runs: int
    seconds: float
    crash: Path | None = None
    notes: str = ""

    def __str__(self) -> str:
        rate = self.runs / self.seconds if self.seconds else 0.0
        end = f"FAILED, see {self.crash}" if self.crash is not None else "ok"
        line = f"{self.target:18} {self.engine:7} {self.runs:>9} inputs {self.seconds:8.1f} s {rate:>9.0f}/s"
        return f"{line}  {self.notes + '  ' if self.notes else ''}{end}"


class Hang(Exception):
    """An input took too long."""


def name_of(data: bytes) -> str:
    """Return the file name under which an input is kept."""
    return hashlib.sha256(data).hexdigest()[:16]


def corpus_files(target: Target) -> list[Path]:
    """Return the target's committed inputs, in an order that does not depend on the file system."""
    return sorted((CORPUS / target.name).glob("*"))


def corpus(target: Target) -> list[bytes]:
    """Return all inputs to begin with."""
    inputs = [*target.seeds(), *(path.read_bytes() for path in corpus_files(target))]
    return [data for data in dict.fromkeys(inputs) if len(data) <= target.max_bytes]


def replay(target: Target, data: bytes) -> None:
    """Run one input; raises what it raises, Hang if it takes too long."""
    with _watch():
        target.run(data)


def run(target: Target, *, runs: int | None = None, seconds: float | None = None, seed: int = 0) -> Result:
    """Run the corpus and then mutations of it, `runs` of them or for so many seconds; the first failure is raised.

    The failing input is kept in `BUILD/crashes`, and the error has a note that says where.
    """
    inputs = corpus(target)
    mutator = Mutator(inputs, random.Random(f"{seed} {target.name}"), target.max_bytes)
    function, count, start = target.run, 0, time.perf_counter()
    data = b""
    try:
        with _watch() as progress:
            for data in inputs:
                function(data)
            while (runs is None or count < runs) and (seconds is None or time.perf_counter() - start < seconds):
                for _ in range(min(100, runs - count) if runs is not None else 100):
                    data = mutator.next()
                    function(data)
                    count += 1
                progress[0] = count
    except Exception as error:
        error.add_note(f"seed {seed}: replay with tests/fuzz/run {target.name} {keep(target, data)}")
        raise
    return Result(target.name, "random", count, time.perf_counter() - start)


def keep(target: Target, data: bytes) -> Path:
    """Write a failing input to `BUILD/crashes` and return its path."""
    path = BUILD / "crashes" / f"{target.name}-{name_of(data)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@contextmanager
def _watch() -> Iterator[list[int]]:
    """Raise Hang when the number given does not change in `HANG_SECONDS`; on CPU time, which no busy host spoils."""
    progress, seen = [0], [-1]

    def look(_number: int, _frame: FrameType | None) -> None:
        if progress[0] == seen[0]:
            raise Hang(f"no progress in {HANG_SECONDS:g} s of CPU time")
        seen[0] = progress[0]

    former = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS, HANG_SECONDS)
    try:
        yield progress
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
