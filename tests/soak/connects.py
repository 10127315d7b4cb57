"""A hundred clients connect and close ten thousand times; then a flood of handshakes: what does one server lose?

Usage: tests/soak/connects [--clients N] [--connects N] [--warm-up N] [--rate N] [--seconds N] [--network SIDE]

Everything is on loopback, the server and its clients in processes of their own. After the warm-up, and again at the
end when the last stream is forgotten, file descriptors, tasks and memory of the server are taken: they must not have
grown by more than 5 %. During the flood a stream into the server and one out of it must keep half of their rates, a
new client must get in, and memory must stay under its cap. Exit status 1 when something did not hold.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from interop.harness import Event, Peer, Peers, Side, command, missing_node, peers_on

PROCESSES: Final = 4
GROWTH: Final = 1.05
KEPT_RATE: Final = 0.5
FLOOD_MEMORY: Final = 64 << 20  # what a flood may cost beyond the server's own, in bytes
START_SECONDS: Final = 120.0  # ten thousand handshakes are made before a flood
QUIET_SECONDS: Final = 40.0
FLOOD_HOSTS: Final = 50
ECHO_BYTES: Final = 2000
WATCHED: Final = ("fds", "tasks", "rss")


def start(peers: Peers, script: str, **config: object) -> Peer:
    """Start one of the peers of this directory."""
    argv = command("python", script, {"bootstrap": peers.bootstrap, **config})
    argv[2] = f"soak.{script}"
    return peers.run(f"soak {script}", argv, timeout=START_SECONDS)


def quiet(server: Peer) -> Event:
    """Wait until the server has forgotten all streams and does nothing else for a moment; return its figures."""
    deadline = time.monotonic() + QUIET_SECONDS
    former: Event = {}
    while True:
        stats = server.ask("stats", collect=True)
        steady = all(stats[name] == former.get(name) for name in ("fds", "tasks", "pending"))
        if not stats["streams"] and not stats["open"] and steady:
            return stats
        former = stats
        if time.monotonic() > deadline:
            raise SystemExit(f"streams are never forgotten: {stats}")
        time.sleep(0.5)


@dataclass(frozen=True)
class Visits:
    """What many visits left behind."""

    before: Event
    loaded: Event
    after: Event
    ok: int
    failed: Counter[str]
    ms: list[float]
    seconds: float

    def problems(self) -> list[str]:
        """Name what grew, and visits that failed."""
        grown = [name for name in WATCHED if self.after[name] > self.before[name] * GROWTH]
        problems = [f"{name} grew from {self.before[name]} to {self.after[name]}" for name in grown]
        return problems + [f"{count} visits failed: {reason}" for reason, count in self.failed.items()]

    def show(self) -> None:
        """Print the figures."""
        ms = sorted(self.ms)
        p50, p99 = statistics.median(ms), ms[len(ms) * 99 // 100]
        print(
            f"{self.ok} connects in {self.seconds:.0f} s ({self.ok / self.seconds:.0f} a second), {p50:.0f} ms median, "
            f"{p99:.0f} ms at 99 %, {ms[-1]:.0f} ms at most, {sum(self.failed.values())} failed"
        )
        for name, figures in (("before", self.before), ("loaded", self.loaded), ("after", self.after)):
            print(
                f"{name:>7}: {figures['fds']} descriptors, {figures['tasks']} tasks, {figures['rss'] / 1e6:.2f} MB, "
                f"{figures['streams']} streams, {figures['cpu']:.0f} s of processor time"
            )


def measure_visits(peers: Peers, server: Peer, clients: int, warm_up: int, connects: int) -> Visits:
    """Visit the server and compare what it holds before and after; the clients leave in the end."""
    key, share = server.ready["publicKey"], clients // PROCESSES
    visitors = [start(peers, "visiting", host=f"127.0.0.{2 + i}", nodes=share) for i in range(PROCESSES)]

    def visit(count: int) -> list[Event]:
        for visitor in visitors:
            visitor.tell("visit", key=key, count=count // PROCESSES, size=ECHO_BYTES)
        return [visitor.expect("visited", timeout=60 + count / 10) for visitor in visitors]

    visit(warm_up)
    before = quiet(server)
    began = time.monotonic()
    done = visit(connects)
    seconds = time.monotonic() - began
    loaded = server.ask("stats")
    after = quiet(server)
    for visitor in visitors:
        visitor.close()
        peers.running.remove(visitor)
    failed = sum((Counter(one["failed"]) for one in done), Counter[str]())
    ms = [sample for one in done for sample in one["ms"]]
    return Visits(before, loaded, after, sum(one["ok"] for one in done), failed, ms, seconds)


@dataclass(frozen=True)
class Rate:
    """How fast two streams were."""

    into: float  # the server, MB/s
    out: float
    share: float  # of a processor, that the server got

    @property
    def total(self) -> float:
        """Both, MB/s."""
        return self.into + self.out

    @property
    def efficiency(self) -> float:
        """Megabytes for a second of the server's processor time: other programs do not change it."""
        return self.total / self.share

    def __str__(self) -> str:
        """Say all of it."""
        return (
            f"{self.into:.1f} MB/s in and {self.out:.1f} out with {self.share:.0%} of a processor, "
            f"{self.efficiency:.0f} MB for a second of it"
        )


@dataclass(frozen=True)
class Flood:
    """What a flood did to a server and its clients."""

    rates: tuple["Rate", ...]  # before, during, after
    sent: int
    answered: int
    legitimate_ms: list[float]
    failed: Counter[str]
    memory: int  # bytes more than before, at most
    worst: Event
    after: Event

    @property
    def cost(self) -> float:
        """The share of a processor that the flood took: what the streams alone would not have."""
        calm, flooded, _ = self.rates
        return flooded.share - flooded.total / calm.efficiency

    def problems(self) -> list[str]:
        """Name what did not hold."""
        calm, flooded, _ = self.rates
        problems = []
        if flooded.total < calm.total * KEPT_RATE:
            problems.append(f"the rate fell from {calm} to {flooded}")
        if self.memory > FLOOD_MEMORY:
            problems.append(f"memory grew by {self.memory / 1e6:.1f} MB")
        return problems + [f"{count} legitimate connects failed: {reason}" for reason, count in self.failed.items()]

    def show(self) -> None:
        """Print the figures."""
        print(f"{self.sent} handshakes, {self.answered} datagrams in answer; streams before, during and after:")
        for rate in self.rates:
            print(f"    {rate}")
        ms = self.legitimate_ms
        print(
            f"{len(ms)} legitimate connects, {statistics.median(ms) if ms else 0:.0f} ms median, "
            f"{max(ms, default=0):.0f} ms at most, {sum(self.failed.values())} failed"
        )
        print(
            f"memory grew by {self.memory / 1e6:.1f} MB at most, {self.worst['pending']} pending, "
            f"{self.worst['streams']} streams; afterwards {self.after['rss'] / 1e6:.1f} MB, {self.after['tasks']} tasks"
        )


class Rates:
    """Measures two streams that last."""

    def __init__(self, peers: Peers, server: Peer) -> None:
        """Open them."""
        key = server.ready["publicKey"]
        self._server = server
        self._into = start(peers, "visiting", host="127.0.0.2", nodes=1)
        self._out = start(peers, "visiting", host="127.0.0.3", nodes=1)
        self._into.tell("drain", key=key)
        self._out.tell("pour", key=key)
        self._into.expect("draining")
        self._out.expect("pouring")

    def _sample(self) -> tuple[float, int, int, float]:
        stats = self._server.ask("stats")
        return time.monotonic(), stats["received"], self._out.ask("received")["bytes"], stats["cpu"]

    def mark(self) -> None:
        """Begin to measure."""
        self._began = self._sample()

    def since(self) -> Rate:
        """Return the rates since `mark`."""
        seconds, into, out, cpu = (two - one for one, two in zip(self._began, self._sample(), strict=True))
        return Rate(into / 1e6 / seconds, out / 1e6 / seconds, max(cpu / seconds, 0.01))

    def over(self, seconds: float) -> Rate:
        """Measure for some seconds."""
        self.mark()
        time.sleep(seconds)
        return self.since()


def measure_flood(peers: Peers, server: Peer, rate: int, seconds: int) -> Flood:
    """Flood the server while two streams run and a client visits it every second."""
    key, port = server.ready["publicKey"], server.ready["port"]
    flooder = start(peers, "flooding", key=key, port=port, rate=rate, hosts=FLOOD_HOSTS, made=min(10, seconds) * rate)
    visitor = start(peers, "visiting", host="127.0.0.4", nodes=4)
    rates = Rates(peers, server)
    time.sleep(2)
    calm_memory = server.ask("stats")["rss"]
    calm = rates.over(min(seconds, 10))
    failed, ms, worst = Counter[str](), [], server.ask("stats")
    flooder.tell("flood", seconds=seconds)
    rates.mark()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(0.5)
        visitor.tell("visit", key=key, count=1, size=ECHO_BYTES)
        visited = visitor.expect("visited", timeout=60)
        failed += Counter(visited["failed"])
        ms += visited["ms"]
        stats = server.ask("stats")
        worst |= {name: max(worst[name], stats[name]) for name in ("rss", "pending", "streams")}
    during = rates.since()
    flooded = flooder.expect("flooded", timeout=60)
    time.sleep(2)
    after = rates.over(min(seconds, 10))
    memory = worst["rss"] - calm_memory
    return Flood(
        (calm, during, after), flooded["sent"], flooded["answered"], ms, failed, memory, worst, server.ask("stats")
    )


def report(problems: Sequence[str]) -> bool:
    """Print what did not hold."""
    for problem in problems:
        print(f"FAILED: {problem}")
    return not problems


def main() -> int:
    """Measure both."""
    parser = argparse.ArgumentParser(prog="tests/soak/connects", description="Load one server, then flood it.")
    parser.add_argument("--clients", type=int, default=100, help="how many at a time (100)")
    parser.add_argument("--connects", type=int, default=10_000, help="how many after the warm-up (10000)")
    parser.add_argument("--warm-up", type=int, default=8000, help="how many before anything is measured (8000)")
    parser.add_argument("--rate", type=int, default=1000, help="handshakes a second of the flood (1000)")
    parser.add_argument("--seconds", type=int, default=30, help="of the flood (30)")
    parser.add_argument("--network", choices=("node", "python"), default="node", help="whose DHT nodes (node)")
    options = parser.parse_args()
    side: Side = options.network
    if side == "node" and (missing := missing_node()):
        print(missing, file=sys.stderr)
        return 69
    good = True
    with peers_on([]) as network:
        bootstrap = network.start(side, "testnet", size=6).ready["bootstrap"]
        with peers_on(bootstrap) as peers:
            server = start(peers, "serving")
            if options.connects:
                visits = measure_visits(peers, server, options.clients, options.warm_up, options.connects)
                visits.show()
                good &= report(visits.problems())
            if options.seconds:
                flood = measure_flood(peers, server, options.rate, options.seconds)
                flood.show()
                good &= report(flood.problems())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
