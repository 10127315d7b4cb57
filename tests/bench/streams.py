"""Measure streams beside Node: bulk and round trips on loopback, bulk over a long wire that loses.

Usage: python -m bench.streams [--json] [--rounds N] [--megabytes N] [--wan-megabytes N] [--rtt MS] [--only PART,...]

PART is `loopback`, `fair`, `idle` or `wan` (which needs root). Pairings read SERVER < CLIENT and take turns; figures
are medians, ratios are to Node < Node. Everything here is a function that returns figures; `main` prints them.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.wire import ADDRESSES, wire
from interop.harness import Event, Peer, PeerError, Peers, Side, command, missing_node, peers_on
from nat.lab import in_namespace

SIDES: Final[tuple[Side, ...]] = ("node", "python")
PAIRINGS: Final[tuple[tuple[Side, Side], ...]] = tuple((server, client) for server in SIDES for client in SIDES)
JOBS: Final = {"sink": "upload, MB/s", "source": "download, MB/s"}
LOSSES: Final = (0.0, 0.01, 0.02)
MEGABYTE: Final = 1_000_000
WAN_PORT: Final = 40_000
CONNECT_TRIES: Final = 5

Figures = Mapping[tuple[str, str], list[float]]
"""Samples by figure and pairing."""


@dataclass(frozen=True)
class Pair:
    """A server and a client."""

    server: Peer
    client: Peer

    @property
    def key(self) -> str:
        """The server's public key."""
        return str(self.server.ready["publicKey"])

    def exchange(self, job: str, size: int, **options: object) -> Event:
        """Run one job on a connection of its own; the connect may fail where packets get lost, and is tried again."""
        for _ in range(CONNECT_TRIES):
            self.client.tell("connect", key=self.key, job=job, bytes=size, timeout=200_000, **options)
            result = self.client.expect("result", timeout=210)
            if result["ok"]:
                return result
            if result["opened"]:
                break
        raise PeerError(f"{self.server.name} < {self.client.name}: {result}")

    def megabytes_per_second(self, job: str, megabytes: int, **options: object) -> float:
        """Return the throughput of one job, without the time the connect took."""
        seconds: float = self.exchange(job, megabytes * MEGABYTE, **options)["bodyMs"] / 1000
        return megabytes * MEGABYTE / 1e6 / seconds

    def round_trips_ms(self, count: int) -> list[float]:
        """Return so many echo round trips of 64 bytes."""
        self.client.tell("ping", key=self.key, count=count, bytes=64)
        times: list[float] = self.client.expect("pings", timeout=60)["ms"]
        return times


def loopback(peers: Peers, rounds: int, megabytes: int) -> Figures:
    """Bulk both ways and round trips in all four pairings, in turn."""
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    servers = {side: peers.start(side, "server") for side in SIDES}
    clients = {side: peers.start(side, "client") for side in SIDES}
    pairs = {f"{one} < {two}": Pair(servers[one], clients[two]) for one, two in PAIRINGS}
    for _ in range(rounds):
        for who, pair in pairs.items():
            figures["round trip of 64 bytes, ms", who] += pair.round_trips_ms(200)
            for job, figure in JOBS.items():
                figures[figure, who].append(pair.megabytes_per_second(job, megabytes))
    return figures


def fairness(peers: Peers, rounds: int, megabytes: int) -> Figures:
    """Four downloads at once on one server: the time of the fastest by that of the slowest (1 is fair)."""
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for side in SIDES:
        server = peers.start(side, "server")
        clients = [peers.start(side, "client") for _ in range(4)]
        for _ in range(rounds):
            size = megabytes * MEGABYTE
            for client in clients:
                client.tell("connect", key=server.ready["publicKey"], job="source", bytes=size, timeout=200_000)
            times = [client.expect("result", timeout=210)["bodyMs"] for client in clients]
            figures["four at once, fastest by slowest", f"{side} < {side}"].append(min(times) / max(times))
            total = 4 * size / 1e6 / (max(times) / 1000)
            figures["four at once, MB/s together", f"{side} < {side}"].append(total)
    return figures


def processor_seconds(pid: int) -> float:
    """Return the processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle(peers: Peers, seconds: float = 20.0) -> Figures:
    """The share of a core that a server with one idle connection uses, in percent."""
    figures: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers = {}
        for side in SIDES:
            server = servers[side] = peers.start(side, "server")
            client = stack.enter_context(contextlib.closing(peers.start(side, "client")))
            client.tell("connect", key=server.ready["publicKey"], job="stay", timeout=120_000)
            client.expect("staying")
        time.sleep(2.0)
        before = {side: processor_seconds(server.process.pid) for side, server in servers.items()}
        time.sleep(seconds)
        for side, server in servers.items():
            used = processor_seconds(server.process.pid) - before[side]
            figures["processor at idle, % of a core", f"{side} < {side}"] = [100 * used / seconds]
    return figures


@contextlib.contextmanager
def pair_over(namespaces: tuple[str, str], one: Side, two: Side) -> Iterator[Pair]:
    """Start a server that is a DHT of its own, and a client at the other end of the wire that bootstraps with it."""
    here, there = ADDRESSES
    with peers_on([f"{here}:{WAN_PORT}"]) as peers:
        server_config = {"private": WAN_PORT, "bootstrap": [], "host": here}
        server = peers.run(f"{one} server", in_namespace(namespaces[0], command(one, "server", server_config)))
        client_config = {"bootstrap": peers.bootstrap, "host": there}
        client = peers.run(f"{two} client", in_namespace(namespaces[1], command(two, "client", client_config)))
        yield Pair(server, client)


def wan(rounds: int, megabytes: int, rtt_ms: float = 100.0, losses: tuple[float, ...] = LOSSES) -> Figures:
    """Download over a long wire; the packets that get lost differ from round to round, not between the pairings."""
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for loss in losses:
        for seed in range(rounds):
            for one, two in PAIRINGS:
                with wire(rtt_ms, loss, seed) as namespaces, pair_over(namespaces, one, two) as pair:
                    speed = pair.megabytes_per_second("source", megabytes)
                figure = f"download at {rtt_ms:g} ms and {loss:.0%} loss, MB/s"
                figures[figure, f"{one} < {two}"].append(speed)
    return figures


def with_ratios(figures: Figures) -> Iterator[tuple[str, str, float, float]]:
    """Yield figure, pairing, median, and its ratio to the median of Node alone."""
    medians = {key: statistics.median(values) for key, values in figures.items()}
    for (figure, who), median in sorted(medians.items()):
        base = medians.get((figure, "node < node"), 0.0)
        yield figure, who, median, median / base if base else float("nan")


def measure(parts: set[str], options: argparse.Namespace) -> Figures:
    """Run the wanted parts."""
    figures: dict[tuple[str, str], list[float]] = {}
    if parts - {"wan"}:
        with contextlib.ExitStack() as stack:
            net = stack.enter_context(peers_on([])).start("node", "testnet", size=6)
            for part in (part for part in ("loopback", "fair", "idle") if part in parts):
                with peers_on(net.ready["bootstrap"]) as peers:
                    if part == "loopback":
                        figures.update(loopback(peers, options.rounds, options.megabytes))
                    elif part == "fair":
                        figures.update(fairness(peers, options.rounds, options.megabytes))
                    else:
                        figures.update(idle(peers))
    if "wan" in parts:
        losses = tuple(map(float, options.losses.split(",")))
        figures.update(wan(options.rounds, options.wan_megabytes, options.rtt, losses))
    return figures


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.streams", description="Measure streams beside Node.")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every sample")
    parser.add_argument("--rounds", type=int, default=5, help="how often each figure is taken (5)")
    parser.add_argument("--megabytes", type=int, default=64, help="size of a transfer on loopback (64)")
    parser.add_argument("--wan-megabytes", type=int, default=32, help="size of a transfer over the wire (32)")
    parser.add_argument("--rtt", type=float, default=100.0, help="round trip of the wire in milliseconds (100)")
    parser.add_argument("--losses", default="0,0.01,0.02", help="shares of packets the wire loses (0,0.01,0.02)")
    parser.add_argument("--only", default="loopback,fair,idle,wan", help="parts to run (loopback,fair,idle,wan)")
    options = parser.parse_args()
    if missing := missing_node():
        print(missing, file=sys.stderr)
        return 69
    figures = measure(set(options.only.split(",")), options)
    if options.json:
        print(json.dumps([{"figure": f, "who": w, "samples": values} for (f, w), values in figures.items()]))
        return 0
    for figure, who, median, ratio in with_ratios(figures):
        print(f"{figure:<38} {who:<17} {median:>9.2f} {ratio:>6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
