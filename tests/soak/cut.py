"""`p2pclaude-tail -f` in a network that goes dark for a while, before a daemon that is killed: is it the journal?

Usage: tests/soak/cut [--seconds N]

Daemon and reader sit in network namespaces, with a NAT before the reader. While Claude prints, every packet of the
reader is lost for so many seconds; later the daemon is ended with SIGKILL and started again. When the session is
stopped the reader must have ended by itself, and have printed exactly what the journal holds. Exit status 1 if not.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from interop.harness import environment, tool_command
from nat.lab import PUBLIC_HOSTS, Lab, remove_stale

HOST: Final = PUBLIC_HOSTS[0]
PORT: Final = 49737
FAKE: Final = Path(__file__).resolve().parent.parent / "kit" / "fake_claude.py"
DARK: Final = 0.9999  # of all datagrams, each way: the most that the laboratory can lose
OBJECTS: Final = 20  # printed in each turn
PAUSE_SECONDS: Final = 0.5
START_SECONDS: Final = 30.0
END_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Report:
    """What the reader printed, beside what the journal holds."""

    printed: list[object]
    journal: list[object]
    status: int
    words: str
    dark_seconds: float
    printed_while_dark: int

    @property
    def problems(self) -> list[str]:
        """Name what did not hold."""
        found = [] if self.status == 0 else [f"the reader ended with {self.status}: {self.words}"]
        if self.printed != self.journal:
            found.append(f"{len(self.printed)} objects were printed, the journal has {len(self.journal)}, or others")
        if not self.printed_while_dark:
            found.append("nothing happened while it was dark")
        return found


class Scene:
    """A daemon in the public network, a reader behind a NAT, and somebody who sends."""

    def __init__(self, lab: Lab, path: Path) -> None:
        self._lab = lab
        self._path = path
        claude = path / "claude"
        claude.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -E {shlex.quote(str(FAKE))} "$@"\n')
        claude.chmod(0o755)
        self.home = lab.home("cone")
        self._env = environment({"HOME": str(path / "home")})
        self.daemon = self.start_daemon()
        self._sending = threading.Event()

    @property
    def url(self) -> str:
        """Where the pairing URL stands."""
        return str(self._path / "data" / "pairing.url")

    def start_daemon(self) -> "subprocess.Popen[bytes]":
        """Start the daemon, and wait until it serves."""
        options = ["--private", "--host", HOST, "--port", str(PORT), "--data-dir", str(self._path / "data")]
        options += ["--claude", str(self._path / "claude"), "--root-dir", str(self._path)]
        log = self._path / "log"
        log.unlink(missing_ok=True)
        with log.open("wb") as out:
            argv = self._lab.command(tool_command("daemon", *options))
            daemon = subprocess.Popen(argv, stdout=out, stderr=out, env=self._env)
        deadline = time.monotonic() + START_SECONDS
        while b"daemon-started" not in log.read_bytes():
            if time.monotonic() > deadline:
                raise SystemExit(f"the daemon does not start: {log.read_text()}")
            time.sleep(0.05)
        return daemon

    def tool(self, name: str, *arguments: str) -> str:
        """Run a tool beside the daemon."""
        argv = self._lab.command(tool_command(name, *arguments))
        return subprocess.run(argv, env=self._env, check=True, capture_output=True, text=True).stdout.strip()

    def tail(self, session: str) -> "subprocess.Popen[str]":
        """Start the reader."""
        argv = self.home.command(tool_command("tail", "-f", "-v", self.url, session))
        return subprocess.Popen(argv, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def journal(self, session: str) -> list[object]:
        """Give what Claude has printed so far."""
        lines = (self._path / "data" / "sessions" / session / "journal.jsonl").read_bytes().splitlines()
        return [value["data"] for value in map(json.loads, lines) if value["type"] == "session-output"]

    def talk(self, session: str, seconds: float) -> None:
        """Keep Claude busy for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.tool("send", "-s", session, self.url, f"MANY:{OBJECTS}")
            time.sleep(PAUSE_SECONDS)


def follow_through_the_dark(path: Path, lab: Lab, seconds: float) -> Report:
    """Do all of it."""
    scene = Scene(lab, path)
    tail = None
    try:
        session = scene.tool("send", "-C", str(path), scene.url, "hello")
        tail = scene.tail(session)
        scene.talk(session, 2.0)
        scene.home.lose(DARK)
        before, began = len(scene.journal(session)), time.monotonic()
        scene.talk(session, seconds)
        dark, during = time.monotonic() - began, len(scene.journal(session)) - before
        scene.home.lose(0.0)
        scene.talk(session, 2.0)
        scene.daemon.send_signal(signal.SIGKILL)
        scene.daemon.wait()
        scene.daemon = scene.start_daemon()
        scene.talk(session, 2.0)
        scene.tool("stop", scene.url, session)
        out, err = tail.communicate(timeout=END_SECONDS)
        printed = [json.loads(line) for line in out.splitlines()]
        return Report(printed, scene.journal(session), tail.returncode, err, dark, during)
    finally:
        if tail is not None:
            tail.kill()
            tail.wait()
        scene.daemon.kill()
        scene.daemon.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it as a command."""
    parser = argparse.ArgumentParser(prog="tests/soak/cut", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long it is dark")
    options = parser.parse_args(argv)
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    remove_stale()
    with Lab() as lab, tempfile.TemporaryDirectory() as path:
        report = follow_through_the_dark(Path(path).resolve(), lab, options.seconds)
    print(report.words, end="")
    print(
        f"dark for {report.dark_seconds:.0f} s, in which Claude printed {report.printed_while_dark} objects, and a "
        f"daemon killed: {len(report.printed)} objects printed, {len(report.journal)} in the journal"
    )
    for problem in report.problems:
        print(f"PROBLEM {problem}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
