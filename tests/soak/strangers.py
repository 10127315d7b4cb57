"""Strangers who know the public key alone push hundreds of megabytes at a daemon: what does it cost?

Usage: tests/soak/strangers [--bytes N] [--connections N] [--kind KIND] [--strict] [--network SIDE]

Everything is on loopback; the daemon, the strangers and the DHT are processes of their own. Each kind of stranger (see
pushing.py) pushes its share over so many connections at once, which are made anew when they are broken off. Meanwhile
a client asks the daemon twice a second, over one connection and over new ones. Memory must grow by less than 64 MiB at
any time, every question must be answered, in the end the daemon must have let go of every stranger, and who has a
wrong key must be told so by exit status 77. Exit status 1 when something did not hold.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from interop.daemons import Daemon, start_daemon
from interop.harness import HERE, Peer, Peers, Side, Tools, command, missing_node, peers_on
from soak.sizes import parse_size

from p2pclaude.client.rpc_client import open_client
from p2pclaude.errors import P2PClaudeError
from p2pclaude.protocol.pairing import Pairing, format_url, parse_url

KINDS: Final = ("endless", "lines", "sealed", "frames", "crumbs")
MEMORY: Final = 64 << 20
ASK_SECONDS: Final = 0.5
SAMPLE_SECONDS: Final = 0.02
NEW_CLIENT_EVERY: Final = 4  # questions
GONE_SECONDS: Final = 30.0
CRUMBS_SHARE: Final = 8  # these bytes are dear to send: 22 for two


def resident(pid: int) -> int:
    """Give the resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@dataclass
class Siege:
    """What one kind of stranger did to the daemon."""

    kind: str
    size: int
    strict: bool
    pushed: dict[str, Any] = field(default_factory=dict)
    before: int = 0
    most: int = 0
    after: int = 0
    ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    remaining: int = 0
    seconds: float = 0.0

    @property
    def grown(self) -> int:
        """Give the most that memory grew by, in bytes."""
        return self.most - self.before

    def problems(self) -> list[str]:
        """Name what did not hold."""
        problems = [f"a question failed: {failure}" for failure in self.failed]
        if self.grown >= MEMORY:
            problems.append(f"memory grew by {self.grown / 2**20:.1f} MiB")
        if not self.strict and self.pushed["sent"] < self.size:
            problems.append("the strangers did not get all of it out")
        if self.strict and self.pushed["connects"]:
            problems.append("strangers got in")
        if self.remaining or self.pushed["held"]:
            problems.append(f"{self.remaining} strangers are still there, {self.pushed['held']} were held to the end")
        if not self.ms:
            problems.append("nobody asked in the meantime")
        return [f"{self.kind}: {problem}" for problem in problems]

    def show(self) -> None:
        """Print the figures."""
        ms = self.ms or [0.0]
        print(
            f"{self.kind:>8}: {self.pushed['sent'] / 1e6:.0f} MB in {self.seconds:.0f} s over "
            f"{self.pushed['connects']} connections, {self.pushed['refused']} not let in; memory grew by "
            f"{self.grown / 2**20:.1f} MiB at most, {(self.after - self.before) / 2**20:.1f} afterwards; "
            f"{len(self.ms)} questions, {statistics.median(ms):.0f} ms median, {max(ms):.0f} ms at most, "
            f"{len(self.failed)} failed",
            flush=True,
        )


async def ask(pairing: Pairing, siege: Siege, bootstrap: Sequence[str], over: asyncio.Event) -> None:
    """Ask the daemon again and again, now and then over a new connection."""
    while not over.is_set():
        async with open_client(pairing, bootstrap=bootstrap) as client:
            for _ in range(NEW_CLIENT_EVERY):
                began = time.monotonic()
                try:
                    await client.call("list-sessions", {})
                    siege.ms.append((time.monotonic() - began) * 1000)
                except P2PClaudeError as error:
                    siege.failed.append(str(error))
                if over.is_set():
                    return
                await asyncio.sleep(ASK_SECONDS)


async def watch(pid: int, siege: Siege) -> None:
    """Note the most memory that a process has."""
    while True:
        siege.most = max(siege.most, resident(pid))
        await asyncio.sleep(SAMPLE_SECONDS)


def strangers_left(daemon: Daemon) -> int:
    """Count the connections that were opened, never proved the key, and are not over: the log tells."""
    opened: set[int] = set()
    for line in daemon.peer.said:
        entry = json.loads(line)
        if entry["event"] == "connection-opened":
            opened.add(entry["connection"])
        elif entry["event"] in ("connection-proven", "connection-closed"):
            opened.discard(entry["connection"])
    return len(opened)


async def besiege(
    daemon: Daemon,
    strangers: Peer,
    bootstrap: Sequence[str],
    before: int,
    push: dict[str, Any],
    *,
    strict: bool = False,
) -> Siege:
    """Let strangers push while a client asks; `before` is the memory that the daemon had before the first."""
    siege = Siege(push["kind"], push["bytes"], strict)
    pid, pairing = daemon.peer.process.pid, parse_url(daemon.url)
    siege.most = resident(pid)
    siege.before = min(before, siege.most)
    over, began = asyncio.Event(), time.monotonic()
    watching = asyncio.create_task(watch(pid, siege))
    asking = asyncio.create_task(ask(pairing, siege, bootstrap, over))
    strangers.tell("push", **push)
    siege.pushed = await asyncio.to_thread(strangers.expect, "pushed", 3600)
    siege.seconds = time.monotonic() - began
    over.set()
    await asking
    deadline = time.monotonic() + GONE_SECONDS
    while (remaining := strangers_left(daemon)) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    siege.remaining = remaining
    watching.cancel()
    siege.after = resident(pid)
    return siege


def start_strangers(peers: Peers, daemon: Daemon) -> Peer:
    """Start the strangers' process."""
    config = {"bootstrap": peers.bootstrap, "key": parse_url(daemon.url).public_key.hex(), "host": "127.0.0.2"}
    argv = command("python", "pushing", config)
    argv[2] = "soak.pushing"
    return peers.run("soak pushing", argv)


def status_with_a_wrong_key(daemon: Daemon, bootstrap: Sequence[str]) -> int:
    """Give the exit status of a tool whose pairing URL has another data key."""
    wrong = parse_url(daemon.url)._replace(data_key=bytes(32))
    return Tools(bootstrap)("ls", "-t", "30", format_url(wrong)).status


def main() -> int:
    """Besiege a daemon with each kind."""
    parser = argparse.ArgumentParser(prog="tests/soak/strangers", description="Push at a daemon without its key.")
    parser.add_argument("--bytes", type=parse_size, default=800_000_000, help="for each kind, such as 800MB (800MB)")
    parser.add_argument("--connections", type=int, default=8, help="at a time (8)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="what to push (all of them, one after another)")
    parser.add_argument("--strict", action="store_true", help="start the daemon with --strict")
    parser.add_argument("--network", choices=("node", "python"), default="node", help="whose DHT nodes (node)")
    options = parser.parse_args()
    side: Side = options.network
    if side == "node" and (missing := missing_node()):
        print(missing, file=sys.stderr)
        return 69
    problems = []
    with tempfile.TemporaryDirectory() as directory, peers_on([]) as network:
        bootstrap = network.start(side, "testnet", size=6).ready["bootstrap"]
        with peers_on(bootstrap) as peers:
            strict = ["--strict"] if options.strict else []
            daemon = start_daemon(peers, Path(directory), HERE / "fake_claude.py", *strict)
            strangers = start_strangers(peers, daemon)
            before = resident(daemon.peer.process.pid)
            for kind in options.kind or KINDS:
                size = options.bytes // (CRUMBS_SHARE if kind == "crumbs" else 1)
                push = {"kind": kind, "connections": options.connections, "bytes": size}
                siege = asyncio.run(besiege(daemon, strangers, bootstrap, before, push, strict=options.strict))
                siege.show()
                problems += siege.problems()
            if (status := status_with_a_wrong_key(daemon, bootstrap)) != (69 if options.strict else 77):
                problems.append(f"a wrong key ended a tool with status {status}")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
