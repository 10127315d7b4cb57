"""A network of the library's DHT nodes on the simulator, for tests of everything above one connection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from sim import Dependence, Host, Link, PortChoice, SimNetwork
from sim.realm import Packet

from p2pclaude.hyperdht.constants import Command
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import DecodeError, HyperDHTError
from p2pclaude.hyperdht.peer.server import Server
from p2pclaude.hyperdht.rpc.messages import Request, decode_message
from p2pclaude.hyperdht.secure.connection import Connection

BOOTSTRAP: Final[Address] = ("5.0.0.1", 49737)
DEADLINE: Final = 20.0  # for one connect
INTERNET: Final = (0.01, 0.04)  # seconds one way


def internet(loss: float = 0.0, duplicate: float = 0.0) -> Link:
    """Return the usual path: 10 to 40 ms, so that packets overtake each other."""
    return Link(latency=INTERNET, loss=loss, duplicate=duplicate, hops=8)


def cone(net: SimNetwork, number: int) -> Host:
    """Return a host behind a port-preserving NAT."""
    return net.nat(f"5.8.0.{number}").host(f"192.168.{number}.2")


def symmetric(net: SimNetwork, number: int) -> Host:
    """Return a host behind a NAT with another random port for every remote endpoint."""
    nat = net.nat(f"5.8.0.{number}", mapping=Dependence.ADDRESS_AND_PORT, ports=PortChoice.RANDOM)
    return nat.host(f"192.168.{number}.2")


def is_request(packet: Packet, command: Command) -> bool:
    """Tell whether a packet asks for that."""
    try:
        message = decode_message(packet.data)
    except DecodeError:
        return False
    return isinstance(message, Request) and not message.internal and message.command == command


class Swarm:
    """A bootstrap node and `nodes`, all of them persistent and on hosts of their own; `join` adds more."""

    def __init__(self, net: SimNetwork) -> None:
        self.net = net
        self.bootstrap = self._bootstrapper()
        self.nodes: list[HyperDHT] = []
        self.joined: list[HyperDHT] = []

    def _bootstrapper(self) -> HyperDHT:
        host, port = BOOTSTRAP
        return HyperDHT.bootstrapper(port, host, network=self.net.host(host), rng=self.net.random("bootstrap"))

    def make(self, host: Host, *, ephemeral: bool | None = True, port: int = 0, keep_alive: float = 5.0) -> HyperDHT:
        """Return a node on `host`, not yet started."""
        return HyperDHT(
            bootstrap=[BOOTSTRAP],
            port=port,
            ephemeral=ephemeral,
            connection_keep_alive=keep_alive,
            network=host,
            rng=self.net.random(f"node {host.addresses[0]}:{len(self.joined)}"),
        )

    async def join(self, host: Host, *, ephemeral: bool | None = True, port: int = 0) -> HyperDHT:
        """Start a node on `host` and wait until it has joined; it is destroyed with the swarm."""
        node = self.make(host, ephemeral=ephemeral, port=port)
        self.joined.append(node)
        await node.start()
        await node.bootstrapped.wait()
        return node

    async def start(self, count: int) -> None:
        """Start the bootstrap node and `count` persistent ones, a few at a time."""
        await self.bootstrap.start()
        hosts = self.net.hosts(count)
        for start in range(0, count, 20):
            group = hosts[start : start + 20]
            self.nodes += await asyncio.gather(*(self.join(host, ephemeral=False, port=49737) for host in group))

    async def stop(self) -> None:
        """Destroy every node."""
        await asyncio.gather(*(node.destroy() for node in [*self.joined, self.bootstrap]))


@asynccontextmanager
async def swarm(seed: object, count: int, link: Link | None = None, *, trace: bool = False) -> AsyncIterator[Swarm]:
    """Run a network of `count` persistent nodes and a bootstrap node; `link` begins when they have joined."""
    net = SimNetwork(seed, internet(), trace=trace)
    made = Swarm(net)
    try:
        await made.start(count)
        if link is not None:
            net.internet.link = link
        yield made
    finally:
        await made.stop()


async def echo(connection: Connection) -> None:
    """Serve a client: send back what it sends until its end."""
    while data := await connection.read():
        await connection.write(data)
    await connection.write_eof()


async def ask(connection: Connection, data: bytes) -> bytes:
    """Write `data` to an echo server, and return as many bytes of its answer."""
    await connection.write(data)
    answer = b""
    while len(answer) < len(data) and (more := await connection.read()):
        answer += more
    return answer


async def serve(node: HyperDHT, key_pair: KeyPair) -> Server:
    """Listen on `node` with an echo server."""
    server = node.create_server(echo)
    await server.listen(key_pair)
    return server


async def can_ask(client: HyperDHT, key: bytes, data: bytes = b"ping") -> bool:
    """Tell whether one connection and one answer come within the deadline; any failure must have settled by then."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with await client.connect(key, timeout=DEADLINE) as connection, asyncio.timeout(60):
            return await ask(connection, data) == data
    except HyperDHTError:
        return False
    finally:
        assert loop.time() - started < DEADLINE + 60.1


def is_clean(node: HyperDHT) -> bool:
    """Tell whether a node holds nothing but its own two sockets."""
    return not node.endpoint.streams and len(node.endpoint.sockets) == 2 and not node.context.handlers


async def eventually(check: Callable[[], Awaitable[bool]], seconds: float, step: float = 1.0) -> bool:
    """Tell whether `check()` comes true within so many seconds of virtual time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not await check():
        if loop.time() >= end:
            return False
        await asyncio.sleep(step)
    return True


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
