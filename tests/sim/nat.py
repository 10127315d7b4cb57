"""A NAT between a LAN and the realm outside, in the terms of RFC 4787: mapping, filtering, choice of port, timeouts."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from sim.host import Host
from sim.link import Link
from sim.realm import Address, Node, Packet, Realm

_PORTS: Final = (1024, 65535)
SWEEP_SECONDS: Final = 1.0  # between looks for expired mappings; a random NAT makes hundreds of them in one


class Dependence(Enum):
    """What a mapping, or the permission to come in, depends on besides the inner endpoint."""

    ENDPOINT = auto()  # nothing: "endpoint-independent"
    ADDRESS = auto()
    ADDRESS_AND_PORT = auto()

    def key(self, remote: Address) -> Hashable:
        """Return what two remote endpoints must have in common to be treated as one."""
        if self is Dependence.ENDPOINT:
            return None
        return remote[0] if self is Dependence.ADDRESS else remote


class PortChoice(Enum):
    """How the outer port of a new mapping is chosen; PRESERVING takes the inner one if it is free, else the next."""

    PRESERVING = auto()
    SEQUENTIAL = auto()
    RANDOM = auto()


@dataclass(slots=True)
class _Mapping:
    inner: Address
    port: int
    key: Hashable
    last_used: float
    fixed: bool = False  # a forwarded port: never expires, lets everyone in
    permits: dict[Hashable, float] = field(default_factory=dict)


class Nat(Node):
    """Translate between `lan` and the realm outside; drop what nobody inside has asked for.

    timeout: seconds a mapping, or a permission, lives after the last packet out (and, with `inbound_refresh`, in).
    hairpin: whether hosts inside reach each other through the outer address.
    """

    def __init__(
        self,
        outside: Realm,
        address: str,
        *,
        mapping: Dependence = Dependence.ENDPOINT,
        filtering: Dependence = Dependence.ADDRESS_AND_PORT,
        ports: PortChoice = PortChoice.PRESERVING,
        timeout: float = 120.0,
        inbound_refresh: bool = False,
        hairpin: bool = False,
        link: Link | None = None,
    ) -> None:
        super().__init__(outside, address)
        self.lan = Realm(self.world, link or Link(latency=(0.0003, 0.0003)), gateway=self.leave)
        self.mapping = mapping
        self.filtering = filtering
        self.ports = ports
        self.timeout = timeout
        self.inbound_refresh = inbound_refresh
        self.hairpin = hairpin
        self._rng = self.world.random(f"nat {address}")
        self._next_port = 40000
        self._sweep_at = 0.0
        self._outbound: dict[Hashable, _Mapping] = {}
        self._inbound: dict[int, _Mapping] = {}
        self._avoid: set[int] = set()

    def host(self, *addresses: str) -> Host:
        """Return the LAN's host of that address, made if there is none."""
        node = self.lan.nodes.get(addresses[0])
        if node is None:
            return Host(self.lan, *addresses)
        assert isinstance(node, Host)
        return node

    def forward(self, port: int, inner: Address) -> None:
        """Forward an outer port to `inner` for good, as a user sets it in a router."""
        mapping = _Mapping(inner, port, ("forward", inner), 0.0, fixed=True)
        self._inbound[port] = self._outbound[mapping.key] = mapping

    def rebind(self, address: str | None = None) -> None:
        """Forget every mapping, as a reboot does; new ones get other ports, and `address` if one is given."""
        self._avoid = set(self._inbound)
        for mapping in [m for m in self._inbound.values() if not m.fixed]:
            self._remove(mapping)
        if address is not None:
            self.set_addresses(address)

    def mappings(self) -> dict[int, Address]:
        """Return the living mappings: outer port to inner endpoint."""
        return {port: m.inner for port, m in self._inbound.items() if not self._is_expired(m)}

    def leave(self, packet: Packet) -> None:
        """Take a packet from inside to the outside."""
        packet.ttl -= 1
        if packet.ttl <= 0 or not self.up or not self.addresses:
            self.world.note("ttl" if packet.ttl <= 0 else "down", packet)
            return
        mapping = self._mapping_for(packet.source, packet.destination)
        mapping.last_used = mapping.permits[self.filtering.key(packet.destination)] = self.world.loop.now
        packet.source = (self.addresses[0], mapping.port)
        if packet.destination[0] not in self.addresses:
            self.realm.carry(packet, self)
        elif self.hairpin:
            self.arrive(packet)
        else:
            self.world.note("hairpin", packet)

    def arrive(self, packet: Packet) -> None:
        """Take a packet from outside to the inside, if someone inside opened the way."""
        packet.ttl -= 1
        mapping = self._inbound.get(packet.destination[1])
        if packet.ttl <= 0 or not self.up:
            self.world.note("ttl" if packet.ttl <= 0 else "down", packet)
        elif mapping is None or self._is_expired(mapping) or not self._lets_in(mapping, packet.source):
            self.world.note("filtered", packet)
        else:
            if self.inbound_refresh:
                mapping.last_used = mapping.permits[self.filtering.key(packet.source)] = self.world.loop.now
            packet.destination = mapping.inner
            self.lan.carry(packet, self)

    def _lets_in(self, mapping: _Mapping, source: Address) -> bool:
        permitted_at = mapping.permits.get(self.filtering.key(source))
        return mapping.fixed or (permitted_at is not None and self.world.loop.now - permitted_at <= self.timeout)

    def _is_expired(self, mapping: _Mapping) -> bool:
        return not mapping.fixed and self.world.loop.now - mapping.last_used > self.timeout

    def _mapping_for(self, inner: Address, remote: Address) -> _Mapping:
        forwarded = self._outbound.get(("forward", inner))
        if forwarded is not None:
            return forwarded
        key = (inner, self.mapping.key(remote))
        mapping = self._outbound.get(key)
        if mapping is not None:
            if not self._is_expired(mapping):
                return mapping
            self._remove(mapping)
        self._forget_expired()
        mapping = _Mapping(inner, self._free_port(inner[1]), key, self.world.loop.now)
        self._outbound[key] = self._inbound[mapping.port] = mapping
        return mapping

    def _forget_expired(self) -> None:
        """Keep the table as small as a router's, so that simulated weeks do not fill the memory."""
        if self.world.loop.now < self._sweep_at:
            return
        now = self.world.loop.now
        self._sweep_at = now + SWEEP_SECONDS
        for mapping in [m for m in self._inbound.values() if self._is_expired(m)]:
            self._remove(mapping)
        for mapping in self._inbound.values():
            permits = mapping.permits
            for key in [key for key, permitted_at in permits.items() if now - permitted_at > self.timeout]:
                del permits[key]

    def _free_port(self, inner_port: int) -> int:
        if self.ports is PortChoice.RANDOM:
            port = self._rng.randint(*_PORTS)
        elif self.ports is PortChoice.SEQUENTIAL:
            port = self._next_port
        else:
            port = inner_port
        while not self._is_free(port):
            port = self._rng.randint(*_PORTS) if self.ports is PortChoice.RANDOM else _after(port)
        if self.ports is PortChoice.SEQUENTIAL:
            self._next_port = _after(port)
        return port

    def _is_free(self, port: int) -> bool:
        return port not in self._inbound and port not in self._avoid

    def _remove(self, mapping: _Mapping) -> None:
        del self._inbound[mapping.port]
        del self._outbound[mapping.key]


def _after(port: int) -> int:
    return port + 1 if port < _PORTS[1] else _PORTS[0]
