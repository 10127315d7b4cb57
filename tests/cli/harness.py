"""Runs the commands as a user does: own processes, own environment, and everything they say is looked at."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kit.free_ports import free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOOLS = ("daemon", "send", "tail", "ls", "stop", "approve", "ping", "node")
TIMEOUT = 60.0


def command(tool: str, *arguments: str) -> list[str]:
    """Return the command line that runs a tool's entry point with this interpreter."""
    start = f"import sys; from p2pclaude.cli.{tool} import main; sys.argv[0] = 'p2pclaude-{tool}'; sys.exit(main())"
    return [sys.executable, "-c", start, *arguments]


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return a clean environment: an empty home, no variables of ours, warnings as errors."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "SYSTEMROOT") if name in os.environ}
    home.mkdir(exist_ok=True)
    ours = {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "LC_ALL": "C.UTF-8"}
    return {**kept, **ours, **(extra or {})}


@dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    out: str
    err: str

    def lines(self) -> list[str]:
        """Return the lines on stdout."""
        return self.out.splitlines()


@dataclass(frozen=True)
class Shell:
    """Runs tools in one directory, against one daemon."""

    work: Path
    url: str

    def start(self, tool: str, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> "Process":
        """Start a tool; `@` among the arguments stands for the pairing URL."""
        words = [self.url if word == "@" else word for word in arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            command(tool, *words), cwd=self.work, env=environment(self.work / "home", env), **{**pipes, **options}
        )

    def run(self, tool: str, *arguments: str, text: str | bytes | None = None, **options: Any) -> Result:
        """Run a tool to its end, with `text` on stdin."""
        data = text.encode() if isinstance(text, str) else text
        if data is not None:
            options["stdin"] = subprocess.PIPE
        process = self.start(tool, *arguments, **options)
        try:
            out, err = process.communicate(data, timeout=TIMEOUT)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return Result(process.returncode, (out or b"").decode(), (err or b"").decode())

    def succeed(self, tool: str, *arguments: str, **options: Any) -> list[str]:
        """Run a tool that must end with 0 and say nothing on stderr; return the lines on stdout."""
        result = self.run(tool, *arguments, **options)
        assert (result.status, result.err) == (0, ""), result
        return result.lines()

    def fail(self, status: int, tool: str, *arguments: str, **options: Any) -> str:
        """Run a tool that must end with this status, print nothing and say why; return what it said."""
        result = self.run(tool, *arguments, **options)
        assert (result.status, result.out) == (status, ""), result
        check_words(tool, result.err, self.url)
        return result.err


Process = subprocess.Popen[bytes]


def check_words(tool: str, err: str, url: str) -> None:
    """Check the form of what a tool says on stderr: its name, lower case, no full stop, no key, no traceback."""
    lines = [line for line in err.splitlines() if not line.startswith(("Usage:", "  "))]
    assert lines, "an error needs words"
    for line in lines:
        name, kind, text = line.split(": ", 2)
        assert name == f"p2pclaude-{tool}", line
        assert kind in ("error", "hint"), line
        assert text[0] == text[0].lower(), line
        assert not text.endswith("."), line
    assert url.removeprefix("p2p-claude://connect?code=")[:40] not in err


@contextmanager
def daemon(work: Path, *options: str, port: int | None = None) -> Iterator[Shell]:
    """Run a daemon of its own network with the stand-in for claude, and end it in good order."""
    work.mkdir(exist_ok=True)
    log = work / "daemon.log"
    arguments = ["--private", "--host", "127.0.0.1", "--port", str(port or free_port())]
    arguments += ["--claude", str(HERE / "fake_claude.py")]
    with log.open("wb") as out:
        process = Shell(work, "").start("daemon", *arguments, *options, stdout=out, stderr=out)
    try:
        eventually(lambda: b"daemon-started" in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield Shell(work, (work / "home" / ".p2p-claude" / "pairing.url").read_text().strip())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def eventually(check: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 50
    while not check():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def unread(pipe: IO[Any] | int) -> int:
    """Tell how many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)
