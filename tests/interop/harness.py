"""Processes of the interoperability tests: started in a group of their own, spoken to in JSON lines, always ended.

Every peer, in Node (`node/*.js`) or Python (`python/*.py`), takes its configuration as one JSON argument, prints
`{"event": ...}` lines and obeys `{"cmd": ...}` lines. The end of its stdin makes it clean up and leave.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEFAULT_TIMEOUT = 60.0
GOODBYE = 10.0

Side = Literal["node", "python"]
Event = dict[str, Any]


class PeerError(AssertionError):
    """A peer died, said `failed`, or did not say in time what was expected; the text holds what it said."""


def node_modules() -> Path:
    """Return the directory of the installed Node packages: $P2PCLAUDE_NODE_MODULES or what `npm ci` made here."""
    return Path(os.environ.get("P2PCLAUDE_NODE_MODULES") or HERE / "node_modules")


def node_path() -> list[Path]:
    """Return where Node looks for packages; older versions of hyperdht may be in the second directory only."""
    return [node_modules(), HERE / "node_modules"]


def missing_node(package: str = "hyperdht") -> str | None:
    """Say what is missing for the Node side, or None when all is there; `package` may be an alias of hyperdht."""
    if shutil.which("node") is None:
        return "Node.js is not installed: NO INTEROPERABILITY IS TESTED"
    if not any((directory / package / "package.json").is_file() for directory in node_path()):
        return f"no {package} in {node_modules()}, run `npm ci` in tests/interop: NO INTEROPERABILITY IS TESTED"
    return None


def real_claude() -> Path | None:
    """Return the real `claude` of the pinned npm package, or None when it is not installed."""
    package = node_modules() / "@anthropic-ai"
    candidates = [package / "claude-code" / "bin" / "claude.exe", *package.glob("claude-code-*/claude")]
    # Without its install script the package has a small stand-in there, which only explains itself.
    return next((path for path in candidates if path.is_file() and path.stat().st_size > 1 << 20), None)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a peer: this tree's package and tests on the path, warnings as errors."""
    env = dict(os.environ)
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])]
    env.update(NODE_PATH=os.pathsep.join(map(str, node_path())), PYTHONPATH=os.pathsep.join(path))
    env["PYTHONWARNINGS"] = "error"
    env["P2P_CLAUDE_CACHE"] = ""  # what one test learns shall not help another
    for name in ("P2P_CLAUDE_DATA_DIR", "P2P_CLAUDE_BOOTSTRAP", "DEBUG", "CLAUDECODE"):
        env.pop(name, None)
    env.update(extra or {})
    return env


def command(side: Side, script: str, config: Mapping[str, Any]) -> list[str]:
    """Return the command line of a peer script with its configuration."""
    if side == "node":
        return ["node", str(HERE / "node" / f"{script}.js"), json.dumps(config)]
    return [sys.executable, "-m", f"interop.python.{script}", json.dumps(config)]


class Peer:
    """One process that speaks JSON lines."""

    def __init__(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, *, heeds_stdin: bool = True
    ) -> None:
        self.name = name
        self.heeds_stdin = heeds_stdin  # False: it is ended by SIGTERM at once
        self.ready: Event = {}
        self.said: list[str] = []
        self._lines_read = 0
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._ended = False
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in close())
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(env),
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"reader of {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.said.append(line)
                with contextlib.suppress(ValueError):
                    self._events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def tell(self, cmd: str, **fields: Any) -> None:
        """Send one command."""
        self.write(json.dumps({"cmd": cmd, **fields}) + "\n")

    def expect(self, event: str, timeout: float = DEFAULT_TIMEOUT, **fields: Any) -> Event:
        """Return (and take) the first event of that name whose fields have these values; others stay for later."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for position, candidate in enumerate(self._events):
                    if candidate.get("event") == event and fields.items() <= candidate.items():
                        return self._events.pop(position)
                    if candidate.get("event") == "failed" and event != "failed":
                        raise PeerError(f"{self.name} failed: {candidate}")
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    reason = "ended" if self._ended else f"was silent for {timeout:g} s"
                    raise PeerError(f"{self.name} {reason}, expected {event} {fields or ''}\n{self.transcript()}")
                self._changed.wait(left)

    def ask(self, cmd: str, timeout: float = DEFAULT_TIMEOUT, **fields: Any) -> Event:
        """Send a command and return the event of the same name."""
        self.tell(cmd, **fields)
        return self.expect(cmd, timeout)

    def write(self, text: str) -> None:
        """Write to the process's stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def line(self, timeout: float = DEFAULT_TIMEOUT) -> str:
        """Return (and step over) the next line of stdout."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.said) > self._lines_read or self._ended, timeout):
                raise PeerError(f"{self.name} was silent for {timeout:g} s\n{self.transcript()}")
            if len(self.said) <= self._lines_read:
                raise PeerError(f"{self.name} ended\n{self.transcript()}")
            self._lines_read += 1
            return self.said[self._lines_read - 1].removesuffix("\n")

    def finish(self, timeout: float = DEFAULT_TIMEOUT) -> int:
        """Wait for the process to end by itself; return its exit status. All that it printed is in `said` then."""
        try:
            status = self.process.wait(timeout)
            self._reader.join(timeout)
            return status
        except subprocess.TimeoutExpired:
            raise PeerError(f"{self.name} did not end in {timeout:g} s\n{self.transcript()}") from None

    def events(self, event: str) -> list[Event]:
        """Take every event of that name that has come so far."""
        with self._changed:
            taken = [one for one in self._events if one.get("event") == event]
            self._events = [one for one in self._events if one.get("event") != event]
        return taken

    def transcript(self) -> str:
        """Return the end of what the process printed, on both streams."""
        with contextlib.suppress(ValueError):  # closed already
            self._errors.seek(0)
            errors = self._errors.read()[-4000:]
            return f"--- {self.name} stdout\n{''.join(self.said)[-4000:]}\n--- {self.name} stderr\n{errors}"
        return f"--- {self.name} is closed"

    def close(self) -> None:
        """End the process: by the end of its stdin, else by SIGTERM, else by SIGKILL to its group."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        end_process(self.process, patient=self.heeds_stdin)
        self._reader.join(GOODBYE)
        self.process.stdout.close()
        self._errors.close()

    def kill(self) -> None:
        """End the process at once, without a goodbye to its peers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(GOODBYE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def end_process(process: subprocess.Popen[str], *, patient: bool) -> None:
    """End a process, if `patient` by waiting first, and clear whatever is left of its group."""
    for step in (*([None] if patient else []), signal.SIGTERM, signal.SIGKILL):
        if step is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, step)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GOODBYE)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Peers:
    """The peers of one test (or one session): started here, all ended by `close`."""

    def __init__(self, bootstrap: Sequence[str] = ()) -> None:
        self.bootstrap = list(bootstrap)
        self.running: list[Peer] = []

    def start(self, side: Side, script: str, *, env: Mapping[str, str] | None = None, **config: Any) -> Peer:
        """Start a peer script on our network unless its configuration says otherwise; wait until it is ready."""
        config.setdefault("bootstrap", self.bootstrap)
        return self.run(f"{side} {script}", command(side, script, config), env=env)

    def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        ready: str = "ready",
        timeout: float = DEFAULT_TIMEOUT,
        heeds_stdin: bool = True,
    ) -> Peer:
        """Start any command that speaks JSON lines, and await its `ready` event, which stays in `peer.ready`."""
        peer = Peer(name, argv, env, heeds_stdin=heeds_stdin)
        self.running.append(peer)
        peer.ready = peer.expect(ready, timeout)
        return peer

    def close(self) -> None:
        """End every peer, the youngest first."""
        while self.running:
            self.running.pop().close()


@contextlib.contextmanager
def peers_on(bootstrap: Sequence[str]) -> Iterator[Peers]:
    """Give a group of peers on one network, all ended at exit."""
    group = Peers(bootstrap)
    try:
        yield group
    finally:
        group.close()


def tool_command(name: str, *arguments: str) -> list[str]:
    """Return the command line of one of the tools (`send`, `tail`, ...) of this tree."""
    code = f"import sys; sys.argv[0] = 'p2pclaude-{name}'; from p2pclaude.cli.{name} import main; sys.exit(main())"
    return [sys.executable, "-c", code, *arguments]


@dataclass(frozen=True)
class Finished:
    """What a tool left behind."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Return the lines of stdout."""
        return self.out.splitlines()


class Tools:
    """Runs the command line tools against one network."""

    def __init__(self, bootstrap: Sequence[str]) -> None:
        self.env = environment({"P2P_CLAUDE_BOOTSTRAP": ",".join(bootstrap)} if bootstrap else None)

    def __call__(self, name: str, *arguments: str, text: str = "", timeout: float = 60) -> Finished:
        """Run a tool to its end and return what it left behind."""
        done = subprocess.run(
            tool_command(name, *arguments), input=text, capture_output=True, text=True, env=self.env, timeout=timeout
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def succeed(self, name: str, *arguments: str, text: str = "", timeout: float = 60) -> str:
        """Run a tool that must end with 0 and say nothing on stderr; return its stdout without the last newline."""
        done = self(name, *arguments, text=text, timeout=timeout)
        assert (done.status, done.err) == (0, ""), (name, done)
        return done.out.removesuffix("\n")

    def start(self, name: str, *arguments: str) -> Peer:
        """Run a tool beside the test: speak to it by `write` and `line`, close it in the end."""
        return Peer(f"p2pclaude-{name}", tool_command(name, *arguments), self.env, heeds_stdin=False)
