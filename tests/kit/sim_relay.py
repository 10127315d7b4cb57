"""Two peers that meet at a blind relay on the simulated network: for tests of the folder `relay`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

from sim import Dependence, Host, Link, PortChoice

from kit.sim_dht import Swarm, swarm
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.net.streams import Stream
from p2pclaude.hyperdht.relay.relay_client import RelayLink, open_link
from p2pclaude.hyperdht.relay.relay_server import RelayEvent, RelayLimits, RelayServer
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.secure.noise import NoiseIK


@dataclass
class Side:
    """One peer: its node, and its end of a connection that has no way yet."""

    dht: HyperDHT
    stream: Stream
    connection: Connection
    link: RelayLink | None = None
    lost: bool = False

    async def join(self, relay: bytes, token: bytes, timeout: float = 15.0) -> None:
        """Go to the relay and wait for the other side; the connection breaks off when the relay is lost."""
        is_initiator = self.connection.is_initiator
        self.link = await open_link(self.dht.connect, relay, token, is_initiator, self.stream, timeout)
        self.link.on_lost = self._lose

    def _lose(self) -> None:
        self.lost = True
        self.connection.abort()

    async def leave(self) -> None:
        """End everything at once."""
        self.connection.abort()
        if self.link is not None:
            self.link.close()
            await self.link.wait_closed()


def pair_of(first: HyperDHT, second: HyperDHT, rng: Random) -> tuple[Side, Side]:
    """Make both ends of a connection, initiator first; the Noise handshake is exchanged by hand."""
    keys, ephemerals = [KeyPair.generate(rng) for _ in range(2)], [KeyPair.generate(rng) for _ in range(2)]
    initiator = NoiseIK.initiator(keys[0], keys[1].public_key, ephemerals[0])
    responder = NoiseIK.responder(keys[1], ephemerals[1])
    responder.read_message(initiator.write_message(b""))
    initiator.read_message(responder.write_message(b""))
    made = []
    for i, (dht, noise) in enumerate(((first, initiator), (second, responder))):
        stream = dht.endpoint.streams.create()
        public = keys[i].public_key, keys[1 - i].public_key
        connection = Connection(stream, *public, is_initiator=not i, keep_alive=5.0, rng=dht.rng)
        connection.start(noise)
        made.append(Side(dht, stream, connection))
    return made[0], made[1]


@dataclass
class Place:
    """A network with a relay on its bootstrap node, and what the relay tells."""

    network: Swarm
    relay: RelayServer
    events: list[RelayEvent]
    sides: list[Side] = field(default_factory=list)

    def symmetric(self, number: int) -> Host:
        """Return a host behind a NAT of its own, of the kind that no hole is punched through."""
        nat = self.network.net.nat(
            f"6.0.0.{number}",
            mapping=Dependence.ADDRESS_AND_PORT,
            filtering=Dependence.ADDRESS_AND_PORT,
            ports=PortChoice.RANDOM,
        )
        return nat.host("192.168.1.2")

    async def clients(self, behind_nats: bool = True) -> tuple[HyperDHT, HyperDHT]:
        """Start two nodes."""
        net = self.network.net
        hosts = [self.symmetric(i) if behind_nats else net.host(f"5.7.0.{i}") for i in (1, 2)]
        first, second = [await self.network.join(host) for host in hosts]
        return first, second

    def pair(self, first: HyperDHT, second: HyperDHT, name: str = "") -> tuple[Side, Side]:
        """Make both ends of a connection, initiator first."""
        made = pair_of(first, second, self.network.net.random(f"pair {name}"))
        self.sides += made
        return made

    async def linked(self, behind_nats: bool = True) -> tuple[Side, Side]:
        """Return two peers that are linked by the relay."""
        sides = self.pair(*await self.clients(behind_nats))
        await self.link(*sides)
        return sides

    async def link(self, first: Side, second: Side, token: bytes = bytes(32)) -> None:
        """Have two peers meet under a token."""
        key = self.relay.public_key
        await asyncio.gather(first.join(key, token), second.join(key, token))


@asynccontextmanager
async def relay_place(
    seed: object, limits: RelayLimits | None = None, *, loss: float = 0.0, nodes: int = 3
) -> AsyncIterator[Place]:
    """Run a DHT network whose bootstrap node is a relay; paths lose packets once all is set up."""
    async with swarm(seed, nodes) as network:
        events: list[RelayEvent] = []
        relay = RelayServer(network.bootstrap, limits, events.append)
        await relay.listen(KeyPair.generate(network.net.random("relay")))
        place = Place(network, relay, events)
        network.net.internet.link = Link(latency=(0.02, 0.03), loss=loss, hops=8)
        try:
            yield place
        finally:
            for side in place.sides:
                await side.leave()
            await relay.close()
