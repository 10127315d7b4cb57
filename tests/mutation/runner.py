"""Runs a module's tests against a mutant, in a process of its own that ends in time."""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MEMORY_BYTES: Final = 4 << 30  # a mutant may eat without end
CORES: Final = 2.0  # so many times the time on the clock is processor time allowed, as a process may have threads
LEAST_SECONDS: Final = 10.0
PATIENCE: Final = 5.0  # times what the tests take without a fault; then they hang, which is noticed
PASSED: Final = 0
NONE_FOUND: Final = 5  # pytest's status


_running: Final[set["subprocess.Popen[str]"]] = set()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of tests ended: pytest's status, None if it was ended for taking too long."""

    status: int | None
    seconds: float
    text: str

    @property
    def noticed(self) -> bool:
        """Whether something failed. A mutant may also keep pytest from beginning."""
        return self.status not in (PASSED, NONE_FOUND)


def limits(seconds: float | None) -> dict[str, str]:
    """Return the variables by which the plugin holds a run that may take so long to memory and processor time."""
    found = {"MUTANT_MEMORY_BYTES": str(MEMORY_BYTES)}
    if seconds is not None:
        found["MUTANT_CPU_SECONDS"] = str(math.ceil(CORES * seconds))
    return found


def run_tests(
    root: Path, tests: list[Path], *, module: str = "", source: str = "", seconds: float | None = None
) -> Outcome:
    """Run tests until the first failure; with `module` and `source`, against a mutant of that module."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "mutant.py")
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
        environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": directory}
        environ |= limits(seconds)
        if module:
            file.write_text(source, encoding="utf-8")
            environ |= {"MUTANT_MODULE": module, "MUTANT_FILE": str(file)}
        command = [sys.executable, "-m", "pytest", "-p", "mutation.plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["-x", "-q", "--no-header", "--tb=line", "--hypothesis-seed=0", f"--basetemp={directory}/tmp"]
        command += ["-o", "faulthandler_timeout=0", *map(str, tests)]
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=root, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        _running.add(process)
        try:
            text, _ = process.communicate(timeout=seconds)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            text, status = "", None
        finally:
            _running.discard(process)
            _end(process)
        return Outcome(status, time.monotonic() - began, text or "")


def end_all() -> None:
    """End the runs that other threads wait for."""
    for process in list(_running):
        _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _end(process: "subprocess.Popen[str]") -> None:
    """End a run with all it has started."""
    _kill(process)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
