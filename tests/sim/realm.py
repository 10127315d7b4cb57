"""Address spaces and what moves in them: the internet is one `Realm`, each LAN behind a NAT another.

Host.transmit -> Realm.carry -> links -> the loop's heap -> Node.arrive: a Host's socket, or a Nat that
carries it on in the next realm
"""

import asyncio
import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from random import Random
from typing import Final, Literal, TypeAlias

from sim.link import Link
from sim.loop import SimLoop, SimulationError

Address: TypeAlias = tuple[str, int]
Event = Literal[
    "sent", "delivered", "closed", "blocked", "down", "filtered", "hairpin", "intercepted", "no_route", "ttl", "unbound"
]

DEFAULT_TTL: Final = 64


@dataclass(slots=True)
class Packet:
    """A datagram under way; `origin` is the node it started from, whatever its source address has become."""

    data: bytes
    source: Address
    destination: Address
    ttl: int
    origin: "Node"
    fragment: bool = False  # a link with too small an MTU may cut it to pieces


class World:
    """What all realms share: the loop, randomness, statistics, the trace, partitions, names.

    Everything random derives from `seed`. Arrival times are rounded up to `tick` seconds, as a network card's
    interrupts do, so that packets of one burst reach a socket as one batch.
    """

    def __init__(self, seed: object, *, tick: float = 1e-4, trace: bool = False) -> None:
        self.seed = seed
        self.tick = tick
        self.rng = self.random("packets")
        self.stats: Counter[str] = Counter()
        self.names: dict[str, str] = {}
        self.intercept: Callable[[Packet], bool] | None = None
        self.observe: Callable[[str, Packet], None] | None = None
        self._loop: SimLoop | None = None
        self._hash = hashlib.sha256() if trace else None
        self._blocked: set[tuple[Node, Node]] = set()

    @property
    def loop(self) -> SimLoop:
        """The running SimLoop."""
        if self._loop is None:
            loop = asyncio.get_running_loop()
            if not isinstance(loop, SimLoop):
                raise SimulationError("a simulated network needs a SimLoop: use sim.run")
            self._loop = loop
        return self._loop

    def random(self, name: str) -> Random:
        """Return a generator of its own for `name`, to be injected into what is under test."""
        return Random(f"{self.seed}/{name}")

    def trace_digest(self) -> str:
        """Return the hash of everything that happened to every packet; needs `trace=True`."""
        if self._hash is None:
            raise SimulationError("the network was made without trace=True")
        return self._hash.hexdigest()

    def note(self, event: Event, packet: Packet) -> None:
        """Count what became of a packet, tell `observe`, and extend the trace."""
        self.stats[event] += 1
        if self.observe is not None:
            self.observe(event, packet)
        if self._hash is not None:
            head = f"{self.loop.now!r} {event} {packet.source} {packet.destination} {packet.ttl} {len(packet.data)} "
            self._hash.update(head.encode() + packet.data)

    def block(self, sender: "Node", receiver: "Node") -> None:
        """Drop whatever `sender` sends to `receiver`, in that direction only, packets under way included."""
        self._blocked.add((sender, receiver))

    def unblock(self, sender: "Node", receiver: "Node") -> None:
        """Undo `block`."""
        self._blocked.discard((sender, receiver))

    def partition(self, *groups: "list[Node]") -> None:
        """Cut each group of hosts off from the others; hosts in none of them reach all."""
        for group in groups:
            others = [node for other in groups if other is not group for node in other]
            self._blocked.update((sender, receiver) for sender in group for receiver in others)

    def heal(self) -> None:
        """Undo every `block` and `partition`."""
        self._blocked.clear()

    def is_blocked(self, sender: "Node", receiver: "Node") -> bool:
        """Tell whether `sender` cannot reach `receiver`."""
        return (sender, receiver) in self._blocked

    def round_up(self, when: float) -> float:
        """Return the tick at or after `when`."""
        return math.ceil(when / self.tick - 1e-6) * self.tick if self.tick else when


class Node(ABC):
    """Something with addresses in a realm: a host, or a NAT with its outer side.

    `uplink` and `downlink` are its access lines, crossed in addition to the path between; None costs nothing.
    """

    def __init__(self, realm: "Realm", *addresses: str) -> None:
        self.realm = realm
        self.world = realm.world
        self.addresses: list[str] = []
        self.uplink: Link | None = None
        self.downlink: Link | None = None
        self.up = True
        self.set_addresses(*addresses)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {' '.join(self.addresses)}>"

    def set_addresses(self, *addresses: str) -> None:
        """Replace the node's addresses: what is sent to the old ones from now on is lost."""
        self._leave()
        for address in addresses:
            self.realm.add(str(IPv4Address(address)), self)
        self.addresses = list(addresses)

    def move(self, realm: "Realm", *addresses: str) -> None:
        """Take the node into another realm, as when a laptop changes networks."""
        self._leave()
        self.realm = realm
        self.set_addresses(*addresses)

    def _leave(self) -> None:
        for address in self.addresses:
            self.realm.remove(address)
        self.addresses = []

    @abstractmethod
    def arrive(self, packet: Packet) -> None:
        """Take a packet addressed to this node in its realm."""


class Realm:
    """An address space with one default path between its nodes, and paths of their own for some pairs."""

    def __init__(self, world: World, link: Link, *, gateway: Callable[[Packet], None] | None = None) -> None:
        self.world = world
        self.link = link
        self.nodes: dict[str, Node] = {}
        self._gateway = gateway
        self._paths: dict[tuple[Node, Node], Link] = {}

    def add(self, address: str, node: Node) -> None:
        """Give `address` to `node`."""
        if address in self.nodes:
            raise SimulationError(f"{address} is taken by {self.nodes[address]!r}")
        self.nodes[address] = node

    def remove(self, address: str) -> None:
        """Free `address`."""
        del self.nodes[address]

    def set_path(self, sender: Node, receiver: Node, link: Link) -> None:
        """Use `link` from `sender` to `receiver`, in that direction only."""
        self._paths[sender, receiver] = link

    def carry(self, packet: Packet, sender: Node) -> None:
        """Move a packet from `sender` to the owner of its destination, or to the gateway when nobody here owns it."""
        receiver = self.nodes.get(packet.destination[0])
        if receiver is not None:
            self._send(packet, sender, receiver, receiver.arrive)
        elif self._gateway is not None:
            self._send(packet, sender, None, self._gateway)
        else:
            IPv4Address(packet.destination[0])  # a name here is a bug of the sender's, not a packet to lose
            self.world.note("no_route", packet)

    def _send(self, packet: Packet, sender: Node, receiver: Node | None, arrive: Callable[[Packet], None]) -> None:
        world = self.world
        arrivals = [world.loop.now]
        for link in self._links(sender, receiver):
            packet.ttl -= link.hops
            size = len(packet.data)
            arrivals = [
                t for start in arrivals for t in link.cross(size, start, world.rng, world.stats, packet.fragment)
            ]
        if packet.ttl <= 0:
            world.note("ttl", packet)
            return
        for extra, when in enumerate(arrivals):
            copy = (
                packet
                if not extra
                else Packet(packet.data, packet.source, packet.destination, packet.ttl, packet.origin, packet.fragment)
            )
            world.loop.post(world.round_up(when), arrive, copy)

    def _links(self, sender: Node, receiver: Node | None) -> list[Link]:
        links = [self.link if receiver is None else self._paths.get((sender, receiver), self.link)]
        # A NAT sending inwards stands in another realm than its access lines do.
        if sender.uplink is not None and sender.realm is self:
            links.insert(0, sender.uplink)
        if receiver is not None and receiver.downlink is not None and receiver.realm is self:
            links.append(receiver.downlink)
        return links
