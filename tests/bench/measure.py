"""Measure p2pclaude beside Node: both kinds of peers in turn, on one network, in one run.

Usage: tests/bench/run [--json] [--rounds N] [--megabytes N]

Prints a table (with --json one object with every sample). Each figure is the median of the rounds; the ratio is to the
same figure of Node alone. Pairings read SERVER < CLIENT. Nothing here is a threshold: it shows where the time goes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from interop.daemons import start_daemon
from interop.harness import HERE, Peer, Peers, Side, environment, missing_node, peers_on, tool_command

SIDES: tuple[Side, ...] = ("node", "python")
PAIRINGS: list[tuple[Side, Side]] = [(server, client) for server in SIDES for client in SIDES]
NODE_ALONE = ("node", "node < node", "node daemon", "node server")
MEGABYTE = 1 << 20


@dataclass
class Samples:
    """Every sample taken, by figure and by who was measured."""

    taken: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, figure: str, who: str, *values: float) -> None:
        """Add samples."""
        self.taken[figure, who].extend(values)

    def rows(self) -> Iterator[tuple[str, str, float, float | None]]:
        """Yield figure, who, median, and the ratio to Node's own median of that figure."""
        base = {figure: statistics.median(values) for (figure, who), values in self.taken.items() if who in NODE_ALONE}
        for (figure, who), values in self.taken.items():
            median = statistics.median(values)
            yield figure, who, median, median / base[figure] if base.get(figure) else None


def resident_megabytes(pid: int) -> float:
    """Return a process's resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def wall_ms(argv: list[str], env: dict[str, str]) -> float:
    """Run a command that must succeed and return how long its whole life took."""
    started = time.perf_counter()
    subprocess.run(argv, env=env, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1000


def measure_one_shots(samples: Samples, peers: Peers, rounds: int) -> None:
    """Time p2pclaude-ls and the leanest Node script, in turn, against one daemon; and both daemons' memory."""
    fake = HERE / "fake_claude.py"
    with tempfile.TemporaryDirectory() as directory:
        ours = start_daemon(peers, Path(directory), fake)
        theirs = peers.start("node", "daemon", claude=[str(fake)])
        env = environment({"P2P_CLAUDE_BOOTSTRAP": peers.bootstrap[0]})
        del env["PYTHONWARNINGS"]  # for tests; its filters cost the interpreter milliseconds at start
        node = ["node", str(HERE / "node" / "ls.js"), peers.bootstrap[0], ours.url]
        for _ in range(rounds):
            samples.add("ls, whole process, ms", "node", wall_ms(node, env))
            samples.add("ls, whole process, ms", "python", wall_ms(tool_command("ls", ours.url), env))
        samples.add("idle daemon, MB resident", "node daemon", resident_megabytes(theirs.process.pid))
        samples.add("idle daemon, MB resident", "python daemon", resident_megabytes(ours.peer.process.pid))


@dataclass(frozen=True)
class Pairing:
    """A server and a client."""

    server: Peer
    client: Peer

    def exchange(self, job: str, size: int, **options: object) -> dict[str, float]:
        """Run one connection and return its times; it must succeed."""
        self.client.tell("connect", key=self.server.ready["publicKey"], job=job, bytes=size, timeout=120_000, **options)
        result = self.client.expect("result", timeout=130)
        if not result["ok"]:
            raise SystemExit(f"{self.server.name} < {self.client.name}: {result}")
        return result

    def pings(self, count: int) -> list[float]:
        """Return so many echo round trips of 64 bytes, in milliseconds."""
        self.client.tell("ping", key=self.server.ready["publicKey"], count=count, bytes=64)
        times: list[float] = self.client.expect("pings", timeout=60)["ms"]
        return times


def measure_connections(samples: Samples, peers: Peers, rounds: int, megabytes: int) -> None:
    """Time connects, round trips and bulk transfers in all four pairings, in turn."""
    servers = {side: peers.start(side, "server") for side in SIDES}
    for side, server in servers.items():
        samples.add("idle server, MB resident", f"{side} server", resident_megabytes(server.process.pid))
    clients = {side: peers.start(side, "client") for side in SIDES}
    pairings = {f"{one} < {two}": Pairing(servers[one], clients[two]) for one, two in PAIRINGS}
    for _ in range(rounds):
        for who, pairing in pairings.items():
            samples.add("connect, new node, ms", who, pairing.exchange("echo", 1, fresh=True)["openMs"])
            samples.add("connect, ms", who, pairing.exchange("echo", 1)["openMs"])
            samples.add("round trip of 64 bytes, ms", who, *pairing.pings(50))
            for job, figure in (("sink", "upload, MB/s"), ("source", "download, MB/s")):
                seconds = pairing.exchange(job, megabytes * MEGABYTE)["bodyMs"] / 1000
                samples.add(figure, who, megabytes * MEGABYTE / 1e6 / seconds)


def show_table(samples: Samples) -> None:
    """Print medians and ratios."""
    print(f"{'figure':<28} {'server < client':<17} {'median':>10} {'to node':>8}")
    for figure, who, median, ratio in sorted(samples.rows()):
        shown = "" if ratio is None else f"{ratio:.2f}"
        print(f"{figure:<28} {who:<17} {median:>10.2f} {shown:>8}")


def show_json(samples: Samples) -> None:
    """Print everything, samples included."""
    rows = [
        {"figure": figure, "who": who, "median": median, "to_node": ratio, "samples": samples.taken[figure, who]}
        for figure, who, median, ratio in samples.rows()
    ]
    print(json.dumps({"python": sys.version.split()[0], "rows": rows}))


def main() -> int:
    """Start a network, measure, print."""
    parser = argparse.ArgumentParser(prog="tests/bench/run", description="Measure p2pclaude beside Node.")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every sample")
    parser.add_argument("--rounds", type=int, default=5, help="how often each figure is taken (5)")
    parser.add_argument("--megabytes", type=int, default=32, help="size of a bulk transfer (32)")
    options = parser.parse_args()
    if missing := missing_node():
        print(missing, file=sys.stderr)
        return 69
    samples = Samples()
    with ExitStack() as stack:
        net = stack.enter_context(peers_on([])).start("node", "testnet", size=6)
        peers = stack.enter_context(peers_on(net.ready["bootstrap"]))
        measure_connections(samples, peers, options.rounds, options.megabytes)
        measure_one_shots(samples, peers, max(options.rounds, 10))
    (show_json if options.json else show_table)(samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
