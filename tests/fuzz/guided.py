"""Runs targets under atheris: libFuzzer, guided by the coverage of the package's byte code.

libFuzzer ends its process, so each target has one, forked when the instrumented modules are loaded already.
"""

import importlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from fuzz import engine
from fuzz.engine import CORPUS, Result
from fuzz.target import Target

TIMEOUT_SECONDS = 20
MEMORY_MB = 1500


def load_atheris() -> Any:
    """Return the atheris module, None where it is not installed."""
    try:
        return importlib.import_module("atheris")
    except ImportError:
        return None


@contextmanager
def instrument(atheris: Any) -> Iterator[None]:
    """Instrument what is imported of the package meanwhile; atheris's line about each module is left out."""
    with redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["p2pclaude"]):
        yield


def run(
    atheris: Any,
    target: Target,
    *,
    runs: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    keep: bool = False,
) -> Result:
    """Run one target in a process of its own.

    By number, a run starts from the committed corpus and repeats with its seed. By time, or with `keep`, it goes on
    from what earlier ones found, in `engine.BUILD/found`, and keeps what it finds.
    """
    engine.BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=engine.memory()) as scratch:
        found = engine.BUILD / "found" / target.name if keep or seconds is not None else Path(scratch, "found")
        seeds = Path(scratch, "seeds")
        for directory in (found, seeds, Path(scratch, "files"), engine.BUILD / "crashes"):
            directory.mkdir(parents=True, exist_ok=True)
        for data in target.seeds():
            (seeds / engine.name_of(data)).write_bytes(data)
        directories = [found, seeds, *([CORPUS / target.name] if (CORPUS / target.name).is_dir() else [])]
        log = engine.BUILD / f"{target.name}.log"
        start = time.perf_counter()
        arguments = _arguments(target, runs, seconds, seed, directories)
        status = _in_child(atheris, target, arguments, log, Path(scratch, "files"))
        result = _result(target, log, status, time.perf_counter() - start)
        _join_found(found, target)
        return result


def _arguments(
    target: Target, runs: int | None, seconds: float | None, seed: int, directories: Sequence[Path]
) -> list[str]:
    limits = [f"-runs={runs}"] if runs is not None else []
    limits += [f"-max_total_time={max(1, round(seconds))}"] if seconds is not None else []
    return [
        f"fuzz-{target.name}",
        *limits,
        f"-seed={seed or 1}",  # 0 is libFuzzer's word for a seed of chance
        f"-max_len={target.max_bytes}",
        f"-timeout={TIMEOUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={engine.BUILD}/crashes/{target.name}-",
        "-print_final_stats=1",
        "-reload=0",
        *map(str, directories),
    ]


def _in_child(atheris: Any, target: Target, arguments: list[str], log: Path, files: Path) -> int:
    """Fork, run libFuzzer in the child with its words in `log`, and return the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        engine.scratch = files
        atheris.Setup(arguments, partial(_checked, target))
        atheris.Fuzz()
    finally:
        os._exit(70)  # libFuzzer has ended the process already, unless it could not begin


def _checked(target: Target, data: bytes) -> None:
    """Run one input; keep it if it fails. (libFuzzer itself keeps those that hang or eat all memory.)"""
    try:
        target.run(data)
    except Exception:
        os.write(2, f"Test unit written to {engine.keep(target, data)}\n".encode())
        raise


def _result(target: Target, log: Path, status: int, seconds: float) -> Result:
    text = log.read_text(errors="replace")
    units = re.search(r"stat::number_of_executed_units: +(\d+)", text)
    coverage = re.findall(r"\bcov: (\d+)", text)
    crash = None
    if status:
        written = re.search(r"Test unit written to (\S+)", text)
        crash = Path(written[1]) if written else log
        print(text[max(text.rfind("Test unit written to"), len(text) - 6000) :], file=sys.stderr)
    notes = f"{coverage[-1]} edges" if coverage else ""
    return Result(target.name, "atheris", int(units[1]) if units else 0, seconds, crash, notes)


def _join_found(found: Path, target: Target) -> None:
    """Drop what was found twice, so that the kept corpus does not grow with repetitions."""
    known = {path.name for path in engine.corpus_files(target)}
    for path in list(found.glob("*")):
        if path.name in known:
            path.unlink()
    if not any(found.iterdir()):
        shutil.rmtree(found, ignore_errors=True)
