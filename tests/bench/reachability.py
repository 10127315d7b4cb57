"""Measure how surely and how fast connections come about on the simulator: issue-sized runs as a command.

    python tests/bench/reachability.py --connects 1000 --seed 1 --case cone-cone --loss 0.1

A case names the kind of host that serves, then the one that connects: `open`, `cone` (a port-preserving NAT that lets
in only who was asked), `random` (one that maps every remote endpoint to a port of chance). `lan` has both hosts behind
one NAT, which does not lead back in; `relay` is random-random with a blind relay. Every path is 50 ms one way, and
with `--loss-at everywhere` each of them loses packets in each direction, so that a handshake through a DHT node may
get lost at four places; `--loss-at client` loses them at the client's access line only.

Clients come in groups, each group to a DHT network and a server of its own; a failure names the seed to replay. A
client is new to the network, of which it knows three nodes (as many as the public one has to begin with), and connects
at once; with `--joined` it has found its neighbours before.

    python tests/bench/reachability.py --days 7

runs a daemon behind a NAT whose mapping moves every hour, and a client that connects every thirty seconds.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from kit.sim_dht import BOOTSTRAP, Swarm, ask, echo, percentile, swarm
from sim import Dependence, Host, Link, Nat, PortChoice, SimNetwork, run
from sim.realm import Packet

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import ConnectionClosed, HyperDHTError
from p2pclaude.hyperdht.relay.relay_server import RelayServer
from p2pclaude.hyperdht.secure.connection import Connection

KINDS: Final = ("open", "cone", "random")
PAIRS: Final = tuple(f"{server}-{client}" for server in KINDS for client in KINDS)
CASES: Final = ("open-open", "lan", "cone-cone", "cone-random", "random-cone", "relay")
LOSSES: Final = (0.0, 0.1, 0.25)
ONE_WAY: Final = 0.05  # seconds
DEADLINE: Final = 20.0
GROUP: Final = 20  # connects to one server
NODES: Final = 20
DAY: Final = 86_400.0
LONGEST_BLACKOUT: Final = 15.0
ANSWER_TIMEOUT: Final = 3.0
GONE_WITHIN: Final = 2.0  # what is open on the server's side only is half open from then on
PUNCH_PAUSE: Final = 5.0  # after a connect with a random NAT: a node spares its NAT that long
LossAt = Literal["everywhere", "client"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A connect that did not lead to a usable connection."""

    case: str
    loss: float
    seed: int
    number: int
    cause: str
    seconds: float


@dataclass(slots=True)
class Outcome:
    """What became of the connects of a case."""

    case: str
    loss: float
    seconds: list[float] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    half_open: list[Failure] = field(default_factory=list)
    late: list[Failure] = field(default_factory=list)
    ways: Counter[str] = field(default_factory=Counter)
    packets: list[int] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)

    @property
    def connects(self) -> int:
        """The number of attempts."""
        return len(self.seconds) + len(self.failures)

    @property
    def share(self) -> float:
        """The share of attempts that led to a usable connection."""
        return len(self.seconds) / self.connects

    def quantile(self, share: float) -> float:
        """Return the seconds in which that share of the successful connects were open."""
        return percentile(self.seconds, share) if self.seconds else float("nan")

    def add(self, other: "Outcome") -> None:
        """Take in the outcome of another group."""
        for name in ("seconds", "failures", "half_open", "late", "packets", "left_behind"):
            getattr(self, name).extend(getattr(other, name))
        self.ways.update(other.ways)

    def __str__(self) -> str:
        ways = ", ".join(f"{count} {way}" for way, count in self.ways.most_common())
        packets = percentile(self.packets, 0.5) if self.packets else 0
        worst = max(self.packets, default=0)
        return (
            f"{self.case:<14} loss {self.loss:4.0%}  {len(self.seconds)}/{self.connects} = {self.share:7.2%}  "
            f"p50 {self.quantile(0.5):5.2f}  p90 {self.quantile(0.9):5.2f}  p99 {self.quantile(0.99):5.2f}  "
            f"max {max(self.seconds, default=float('nan')):5.2f} s  half-open {len(self.half_open)}  "
            f"late {len(self.late)}  packets p50 {packets} max {worst}  ({ways})"
        )


def make_nat(net: SimNetwork, kind: str, address: str) -> Nat:
    """Return a NAT that lets in only who was asked."""
    if kind == "cone":
        return net.nat(address)
    return net.nat(address, mapping=Dependence.ADDRESS_AND_PORT, ports=PortChoice.RANDOM)


def make_host(net: SimNetwork, kind: str, number: int) -> Host:
    """Return a host of a kind, behind a NAT of its own unless it is open."""
    if kind == "open":
        return net.host(f"5.9.{number}.1")
    return make_nat(net, kind, f"5.9.{number}.7").host(f"192.168.{number}.2")


class Group:
    """One network, one server and its clients."""

    def __init__(self, network: Swarm, case: str, seed: int, loss: float, loss_at: LossAt, joined: bool) -> None:
        self.net = network.net
        self.outcome = Outcome(case, loss)
        self._network = network
        self._case = case
        self._seed = seed
        self._loss = loss
        self._loss_at: LossAt = loss_at
        self._joined = joined
        self._served: list[Connection] = []
        self._lan: Nat | None = None
        self._packets = 0
        self._watched: set[object] = set()
        self.net.observe = self._observe

    async def run(self, connects: int) -> Outcome:
        """Start the server, then connect that often."""
        server_kind, client_kind = {"lan": ("cone", "lan"), "relay": ("random", "random")}.get(
            self._case, tuple(self._case.split("-"))
        )
        key, relay = await self._serve(server_kind)
        for number in range(connects):
            await self._connect(key, self._client_host(client_kind, number + 2), number)
            if "random" in (server_kind, client_kind):
                await asyncio.sleep(PUNCH_PAUSE)
        await asyncio.sleep(60)
        self._look_for_leftovers()
        if relay is not None:
            await relay.close()
        return self.outcome

    async def _serve(self, kind: str) -> tuple[bytes, RelayServer | None]:
        if self._case == "lan":
            self._lan = make_nat(self.net, "cone", "5.9.1.7")
        self._server_host = make_host(self.net, kind, 1) if self._lan is None else self._lan.host("192.168.1.2")
        self._server_node = await self._network.join(self._server_host)
        relay = await self._start_relay() if self._case == "relay" else None
        if self._loss_at == "everywhere":
            self.net.internet.link = Link(latency=(ONE_WAY, ONE_WAY), loss=self._loss, hops=8)
        server = self._server_node.create_server(
            self._handle, relay_through=None if relay is None else relay.public_key
        )
        key_pair = KeyPair.generate(self.net.random("server"))
        await server.listen(key_pair)
        await asyncio.sleep(5)
        return key_pair.public_key, relay

    async def _start_relay(self) -> RelayServer:
        relay = RelayServer(await self._network.join(self.net.host("5.8.8.8")))
        await relay.listen(KeyPair.generate(self.net.random("relay")))
        return relay

    def _client_host(self, kind: str, number: int) -> Host:
        if self._lan is not None:
            return self._lan.host(f"192.168.1.{number + 1}")
        host = make_host(self.net, kind, number)
        if self._loss_at == "client":
            outer = host if kind == "open" else self.net.internet.nodes[f"5.9.{number}.7"]
            outer.uplink = Link(latency=(0, 0), loss=self._loss)
            outer.downlink = Link(latency=(0, 0), loss=self._loss)
        return host

    async def _connect(self, key: bytes, host: Host, number: int) -> None:
        loop = asyncio.get_running_loop()
        client = HyperDHT(
            bootstrap=[BOOTSTRAP, ("5.1.0.1", 49737), ("5.1.0.2", 49737)],
            port=0,
            ephemeral=True,
            network=host,
            rng=self.net.random(f"client {number}"),
        )
        await client.start()
        if self._joined:
            await client.bootstrapped.wait()
        self._served.clear()
        self._watched, self._packets = {host, self._server_host}, 0
        start = loop.time()
        try:
            connection = await client.connect(key, timeout=DEADLINE)
        except HyperDHTError as error:
            await self._failed(number, f"{type(error).__name__}: {error}", loop.time() - start)
        else:
            seconds = loop.time() - start
            self.outcome.packets.append(self._packets)
            await self._use(connection, number, seconds)
        await client.destroy()

    async def _use(self, connection: Connection, number: int, seconds: float) -> None:
        """Count a connection if bytes pass both ways, and exactly one is open on the other side."""
        data = self.net.rng.randbytes(3000)
        try:
            async with asyncio.timeout(30):
                answer = await ask(connection, data)
                how = connection.how
                await connection.close()
        except (ConnectionClosed, TimeoutError) as error:
            self.outcome.half_open.append(self._failure(number, f"client: {error!r}", seconds))
            return
        if answer != data or len(self._served) != 1:
            self.outcome.half_open.append(self._failure(number, f"{len(self._served)} served", seconds))
        self.outcome.seconds.append(seconds)
        self.outcome.ways[how] += 1

    async def _failed(self, number: int, cause: str, seconds: float) -> None:
        """Count a failure; the server may have heard of the client in that moment, and must then hear of its end."""
        failure = self._failure(number, cause, seconds)
        self.outcome.failures.append(failure)
        if self._served:
            await asyncio.sleep(GONE_WITHIN)
        if not all(connection.closed for connection in self._served):
            self.outcome.half_open.append(failure)
        if seconds > DEADLINE + 0.1:
            self.outcome.late.append(failure)

    def _failure(self, number: int, cause: str, seconds: float) -> Failure:
        return Failure(self._case, self._loss, self._seed, number, cause, seconds)

    async def _handle(self, connection: Connection) -> None:
        self._served.append(connection)
        await echo(connection)

    def _observe(self, event: str, packet: Packet) -> None:
        if event == "sent" and packet.origin in self._watched:
            self._packets += 1

    def _look_for_leftovers(self) -> None:
        endpoint = self._server_node.endpoint
        if len(endpoint.streams) or len(endpoint.sockets) != 2:
            self.outcome.left_behind.append(
                f"seed {self._seed}: {len(endpoint.streams)} streams, {len(endpoint.sockets)} sockets"
            )


async def connect_group(
    case: str, seed: int, loss: float, connects: int, *, loss_at: LossAt = "everywhere", joined: bool = False
) -> Outcome:
    """Run one network of a case."""
    link = Link(latency=(ONE_WAY, ONE_WAY), hops=8)
    async with swarm(seed, NODES, link) as network:
        return await Group(network, case, seed, loss, loss_at, joined).run(connects)


def measure(
    case: str, seed: int, loss: float, connects: int, *, loss_at: LossAt = "everywhere", joined: bool = False
) -> Outcome:
    """Return the outcome of so many connects, in groups with seeds from `seed` on."""
    total = Outcome(case, loss)
    for start in range(0, connects, GROUP):
        main = connect_group(case, seed, loss, min(GROUP, connects - start), loss_at=loss_at, joined=joined)
        total.add(run(main, seed=seed, cpu_limit=600))
        seed += 1
    return total


@dataclass(slots=True)
class Life:
    """What a client that connects every thirty seconds saw of a daemon: seconds until each answer, and failures.

    It connects anew when an open connection brings no answer.
    """

    seconds: list[float] = field(default_factory=list)
    failed_at: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of connects that brought an answer within `LONGEST_BLACKOUT`."""
        return len(self.seconds) / (len(self.seconds) + len(self.failed_at))

    def __str__(self) -> str:
        return (
            f"{len(self.seconds) + len(self.failed_at)} connects, {self.share:.3%} answered, p50 "
            f"{percentile(self.seconds, 0.5):.2f}, p99 {percentile(self.seconds, 0.99):.2f}, longest "
            f"{max(self.seconds):.2f} s, failed at {[round(when) for when in self.failed_at]}"
        )


async def _is_answered(client: HyperDHT, key: bytes) -> bool:
    """Tell whether one connection brings an answer; a mapping that moves under an open one ends it for good."""
    try:
        connection = await client.connect(key, timeout=LONGEST_BLACKOUT)
    except HyperDHTError:
        return False
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            return await ask(connection, b"ping") == b"ping"
    except (HyperDHTError, TimeoutError):
        return False
    finally:
        await connection.close()


async def live(hours: float, seed: int, tell: Callable[[str], object] = str) -> Life:
    """Run a daemon behind a NAT that gives it other ports every hour, and every fourth hour another address.

    `tell` hears of every day.
    """
    async with swarm(seed, NODES, Link(latency=(0.02, 0.08), loss=0.01, hops=8)) as network:
        net, loop = network.net, asyncio.get_running_loop()
        nat = net.nat("5.9.1.7")
        node = await network.join(nat.host("192.168.1.2"))
        client = await network.join(net.nat("5.9.2.7").host("192.168.2.2"))
        server = node.create_server(echo)
        await server.listen()
        life, end, moves = Life(), loop.time() + hours * 3600, 0

        async def move() -> None:
            nonlocal moves
            while True:
                await asyncio.sleep(net.rng.uniform(0.9, 1.1) * 3600)
                moves += 1
                nat.rebind(f"5.9.{100 + moves % 100}.7" if moves % 4 == 0 else None)

        moving = asyncio.create_task(move())
        while loop.time() < end:
            started = loop.time()
            while not (answered := await _is_answered(client, server.public_key)):
                if loop.time() - started >= LONGEST_BLACKOUT:
                    break
            if answered and loop.time() - started <= LONGEST_BLACKOUT:
                life.seconds.append(loop.time() - started)
            else:
                life.failed_at.append(started)
            if started // DAY < (started + 30) // DAY or started + 30 >= end:
                tell(f"{loop.time() / DAY:.2f} days: {life}")
            await asyncio.sleep(max(0.0, started + 30 - loop.time()))
        moving.cancel()
        await asyncio.wait([moving])
        return life


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connects", type=int, default=100, help="of each case (default 100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", choices=sorted({*PAIRS, *CASES}), help="may be repeated")
    parser.add_argument("--loss", action="append", type=float, help="may be repeated (default 0, 0.1, 0.25)")
    parser.add_argument("--loss-at", choices=("everywhere", "client"), default="everywhere")
    parser.add_argument("--days", type=float, help="the life of a daemon instead, so many days of it")
    parser.add_argument("--joined", action="store_true", help="clients have joined the network before")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Print a line a case, and failures with the seed and number to replay; return 1 if anything is half open."""
    options = _parse(arguments)
    if options.days:
        limits = {"time_limit": options.days * DAY + 3600, "cpu_limit": 36_000}
        life = run(live(options.days * 24, options.seed, partial(print, flush=True)), seed=options.seed, **limits)
        print(life)
        return int(life.share < 0.999)
    broken = False
    for case in options.case or CASES:
        for loss in options.loss if options.loss is not None else LOSSES:
            started = time.perf_counter()
            outcome = measure(
                case, options.seed, loss, options.connects, loss_at=options.loss_at, joined=options.joined
            )
            print(f"{outcome}  [{time.perf_counter() - started:.0f} s]", flush=True)
            causes = Counter(failure.cause for failure in outcome.failures)
            for cause, count in causes.most_common():
                places = [f"{f.seed}:{f.number}" for f in outcome.failures if f.cause == cause]
                print(f"    {count} x {cause}  (seed:number {' '.join(places[:8])})")
            for trouble in [*outcome.half_open, *outcome.late, *outcome.left_behind]:
                broken = True
                print(f"    BROKEN {trouble}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
