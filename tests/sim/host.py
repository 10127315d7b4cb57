"""A host of the simulated network and its UDP sockets: the `Network` that the library under test is given."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import Final

from sim.realm import DEFAULT_TTL, Address, Node, Packet, Realm

LOOPBACK_SECONDS: Final = 5e-5
RESOLVE_SECONDS: Final = 0.01
_EPHEMERAL_PORTS: Final = (32768, 60999)
_ANY: Final = "0.0.0.0"

OnDatagrams = Callable[[list[tuple[list[bytes], Address]]], None]


class Host(Node):
    """A machine with one address or more, all in one realm. `up = False` unplugs it; its sockets stay bound."""

    def __init__(self, realm: Realm, *addresses: str) -> None:
        super().__init__(realm, *addresses)
        self.sockets: dict[Address, SimSocket] = {}
        self._taken: dict[int, set[str]] = {}  # addresses with a socket on them, by port
        self._ports = self.world.random(f"ports of {addresses[0]}")

    async def bind(self, host: str, port: int, on_datagrams: OnDatagrams) -> "SimSocket":
        """Bind a UDP socket; port 0 takes a free one. Raises OSError as the kernel would."""
        if host not in (_ANY, *self.addresses) and not _is_loopback(host):
            raise OSError(errno.EADDRNOTAVAIL, f"{os.strerror(errno.EADDRNOTAVAIL)}: {host}")
        if not port:
            port = next(p for p in iter(lambda: self._ports.randint(*_EPHEMERAL_PORTS), 0) if self._is_free(host, p))
        elif not self._is_free(host, port):
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {host}:{port}")
        bound = self.sockets[host, port] = SimSocket(self, (host, port), on_datagrams)
        self._taken.setdefault(port, set()).add(host)
        return bound

    def interfaces(self) -> list[str]:
        """Return the host's addresses, loopback first."""
        return ["127.0.0.1", *self.addresses]

    async def resolve(self, host: str) -> str:
        """Return the address of a name in `world.names`; an address is its own. Raises OSError for others."""
        try:
            return str(IPv4Address(host))
        except ValueError:
            await asyncio.sleep(RESOLVE_SECONDS)
        if host == "localhost":
            return "127.0.0.1"
        if host not in self.world.names:
            raise socket.gaierror(socket.EAI_NONAME, f"name not known: {host}")
        return self.world.names[host]

    def transmit(self, packet: Packet) -> None:
        """Send a packet out, or straight back when it is for this host."""
        world = self.world
        world.note("sent", packet)
        if not 0 < packet.destination[1] < 65536 or not self.addresses:
            world.note("no_route", packet)
        elif world.intercept is not None and world.intercept(packet):
            world.note("intercepted", packet)
        elif _is_loopback(packet.destination[0]) or packet.destination[0] in self.addresses:
            world.loop.post(world.loop.now + LOOPBACK_SECONDS, self.arrive, packet)
        elif not self.up:
            world.note("down", packet)
        elif packet.source[0] not in self.addresses:
            world.note("no_route", packet)  # bound to loopback, or to an address that is gone
        else:
            self.realm.carry(packet, self)

    def arrive(self, packet: Packet) -> None:
        """Give a packet to the socket bound to its destination."""
        world = self.world
        local = packet.origin is self
        address, port = packet.destination
        bound = self.sockets.get(packet.destination) or self.sockets.get((_ANY, port))
        if not local and not self.up:
            world.note("down", packet)
        elif not local and world.is_blocked(packet.origin, self):
            world.note("blocked", packet)
        elif bound is None or not (_is_loopback(address) or address in self.addresses):
            world.note("unbound", packet)
        else:
            world.note("delivered", packet)
            bound.receive(packet)

    def source_for(self, destination: str) -> str:
        """Return the address to send from: the one with the most leading bits in common, as a routing table would."""
        if _is_loopback(destination):
            return "127.0.0.1"
        if len(self.addresses) < 2 or destination in self.addresses:
            return destination if destination in self.addresses else self.addresses[0] if self.addresses else _ANY
        wanted = int(IPv4Address(destination))
        return min(self.addresses, key=lambda own: (int(IPv4Address(own)) ^ wanted).bit_length())

    def _is_free(self, host: str, port: int) -> bool:
        taken = self._taken.get(port)
        return not taken or (host != _ANY and not taken & {host, _ANY})

    def free(self, address: Address) -> None:
        """Let another socket have the address."""
        del self.sockets[address]
        hosts = self._taken[address[1]]
        hosts.discard(address[0])
        if not hosts:
            del self._taken[address[1]]


class SimSocket:
    """A bound UDP socket.

    What arrives at one instant is handed over as one batch, in a callback of its own; as from a kernel that couples
    datagrams, what comes from one source without another's between is one entry of it.
    """

    def __init__(self, host: Host, address: Address, on_datagrams: OnDatagrams) -> None:
        self.address = address
        self.closed = False
        self._host = host
        self._on_datagrams = on_datagrams
        self._batch: list[tuple[list[bytes], Address]] = []

    def send(self, datagrams: Sequence[bytes], to: Address, ttl: int | None = None, *, fragment: bool = False) -> None:
        """Send datagrams; what is lost is lost silently."""
        host = self._host
        source = self.address if self.address[0] != _ANY else (host.source_for(to[0]), self.address[1])
        for data in datagrams:
            packet = Packet(bytes(data), source, to, DEFAULT_TTL if ttl is None else ttl, host, fragment)
            if self.closed:
                host.world.note("closed", packet)
            else:
                host.transmit(packet)

    def stay_awake(self, seconds: float) -> None:
        """Do nothing: it takes no time to be woken here."""

    def receive(self, packet: Packet) -> None:
        """Queue a packet for the callback."""
        if not self._batch:
            self._host.world.loop.call_soon(self._flush)
        if self._batch and self._batch[-1][1] == packet.source:
            self._batch[-1][0].append(packet.data)
        else:
            self._batch.append(([packet.data], packet.source))

    def close(self) -> None:
        """Free the port. Closing twice is fine."""
        if not self.closed:
            self.closed = True
            self._host.free(self.address)

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if not self.closed:
            self._on_datagrams(batch)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")
