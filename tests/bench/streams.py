"""Measure streams: bulk, fairness and round trips on loopback, bulk over a long wire that loses.

Pairings read SERVER < CLIENT and take turns. Every measurement yields samples by figure and pairing, as they come.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bench.far import ENDS, wire
from bench.oneshots import Samples, processor_seconds
from interop.harness import Event, Peer, PeerError, Peers, Side, command, peers_on
from nat.lab import in_namespace

SIDES: Final[tuple[Side, ...]] = ("node", "python")
PAIRINGS: Final[tuple[tuple[Side, Side], ...]] = tuple((server, client) for server in SIDES for client in SIDES)
JOBS: Final = {"sink": "upload, MB/s", "source": "download, MB/s"}
RTT_MS: Final = 100.0
LOSSES: Final = (0.0, 0.01, 0.02)
MEGABYTE: Final = 1_000_000
WAN_PORT: Final = 40_000
CONNECT_TRIES: Final = 5


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


@contextlib.contextmanager
def testnet() -> Iterator[Peers]:
    """Make a DHT on loopback, and what starts peers in it."""
    with peers_on([]) as peers:
        net = peers.start("node", "testnet", size=6)
        with peers_on(net.ready["bootstrap"]) as inside:
            yield inside


def loopback(peers: Peers, rounds: int, megabytes: int) -> Samples:
    """Bulk both ways and round trips in all four pairings, in turn."""
    servers = {side: peers.start(side, "server") for side in SIDES}
    clients = {side: peers.start(side, "client") for side in SIDES}
    pairs = {f"{one} < {two}": Pair(servers[one], clients[two]) for one, two in PAIRINGS}
    for _ in range(rounds):
        for who, pair in pairs.items():
            for milliseconds in pair.round_trips_ms(200):
                yield ("round trip of 64 bytes, ms", who), milliseconds
            for job, figure in JOBS.items():
                yield (figure, who), pair.megabytes_per_second(job, megabytes)


def fairness(peers: Peers, rounds: int, megabytes: int) -> Samples:
    """Four downloads at once on one server: the time of the fastest by that of the slowest (1 is fair)."""
    for side in SIDES:
        server = peers.start(side, "server")
        clients = [peers.start(side, "client") for _ in range(4)]
        for _ in range(rounds):
            size = megabytes * MEGABYTE
            for client in clients:
                client.tell("connect", key=server.ready["publicKey"], job="source", bytes=size, timeout=200_000)
            times = [client.expect("result", timeout=210)["bodyMs"] for client in clients]
            yield ("four at once, fastest by slowest", f"{side} < {side}"), min(times) / max(times)
            total = 4 * size / 1e6 / (max(times) / 1000)
            yield ("four at once, MB/s together", f"{side} < {side}"), total


def idle(peers: Peers, seconds: float = 20.0) -> Samples:
    """The share of a core that a server with one idle connection uses, in percent."""
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
            yield ("processor at idle, % of a core", f"{side} < {side}"), 100 * used / seconds


@contextlib.contextmanager
def pair_over(namespaces: tuple[str, str], one: Side, two: Side) -> Iterator[Pair]:
    """Start a server that is a DHT of its own, and a client at the other end of the wire that bootstraps with it."""
    here, there = ENDS
    with peers_on([f"{here}:{WAN_PORT}"]) as peers:
        server_config = {"private": WAN_PORT, "bootstrap": [], "host": here}
        server = peers.run(f"{one} server", in_namespace(namespaces[0], command(one, "server", server_config)))
        client_config = {"bootstrap": peers.bootstrap, "host": there}
        client = peers.run(f"{two} client", in_namespace(namespaces[1], command(two, "client", client_config)))
        yield Pair(server, client)


def wan(rounds: int, megabytes: int) -> Samples:
    """Download over a long wire; the packets that get lost differ from round to round, not between the pairings."""
    for seed in range(rounds):
        for loss in LOSSES:
            for one, two in PAIRINGS:
                with wire(RTT_MS, loss, seed) as namespaces, pair_over(namespaces, one, two) as pair:
                    speed = pair.megabytes_per_second("source", megabytes)
                yield (f"download at {RTT_MS:g} ms and {loss:.0%} loss, MB/s", f"{one} < {two}"), speed
