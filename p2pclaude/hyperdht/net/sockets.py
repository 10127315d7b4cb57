"""One UDP socket of a node, and what a node needs of the world to have one (ring 2).

`endpoint` binds sockets, `streams` and all above send through them. The world is behind `Network`: the kernel (`udp`),
or a simulated one.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from ..encoding import Address
from ..errors import Destroyed

Arrival = tuple[list[bytes], Address]
"""Datagrams of one source that came one after the other, and that source."""


class DatagramSocket(Protocol):
    """A bound UDP socket as a `Network` makes it."""

    @property
    def address(self) -> Address:
        """The local host and port it is bound to."""

    def send(self, datagrams: Sequence[bytes], to: Address, ttl: int | None = None, *, fragment: bool = False) -> None:
        """Send a batch to one receiver, for so many hops; what the system refuses is lost, as on any wire.

        With `fragment` routers may fragment them, else what a path has no room for is lost.
        """

    def stay_awake(self, seconds: float) -> None:
        """Learn that an answer should be here within so many seconds, too soon to go to sleep until it comes."""

    def close(self) -> None:
        """Close it; no batch is delivered afterwards."""


class Network(Protocol):
    """What a node needs of the world; the kernel's is `udp.UdpNetwork`, tests bring a simulated one."""

    async def bind(self, host: str, port: int, on_datagrams: Callable[[list[Arrival]], None]) -> DatagramSocket:
        """Bind a socket and deliver what arrives to `on_datagrams`, in batches; raises OSError if it is taken."""

    def interfaces(self) -> list[str]:
        """Return this host's IPv4 addresses, loopback included."""

    async def resolve(self, host: str) -> str:
        """Return an IPv4 address of a host name; raises OSError if it has none."""


class Socket:
    """One UDP socket of an endpoint."""

    __slots__ = ("_datagrams", "_on_closed", "closed", "on_probe")

    def __init__(self, on_closed: Callable[["Socket"], None]) -> None:
        self._on_closed = on_closed
        self._datagrams: DatagramSocket | None = None
        self.closed = False
        self.on_probe: Callable[[Socket, Address], None] | None = None
        """Called for datagrams of no or one byte, which hole punching uses; other sockets ignore them."""

    def attach(self, datagrams: DatagramSocket) -> None:
        """Take the network's socket, once it is bound: what arrives before finds this object there already."""
        assert self._datagrams is None
        self._datagrams = datagrams

    @property
    def address(self) -> Address:
        """The local host and port."""
        if self._datagrams is None:
            raise Destroyed("the socket is not bound")
        return self._datagrams.address

    def send(self, datagrams: Sequence[bytes], to: Address, ttl: int | None = None, *, fragment: bool = False) -> None:
        """Send a batch to one receiver; nothing happens once the socket is closed."""
        if self._datagrams is not None and not self.closed:
            self._datagrams.send(datagrams, to, ttl, fragment=fragment)

    def stay_awake(self, seconds: float) -> None:
        """Say that an answer should come within so many seconds, too soon to go to sleep until then."""
        if self._datagrams is not None and not self.closed:
            self._datagrams.stay_awake(seconds)

    def close(self) -> None:
        """Close the socket; streams on it stay known and may move to another one."""
        if self.closed:
            return
        self.closed = True
        self._on_closed(self)
        if self._datagrams is not None:
            self._datagrams.close()
