"""Datagrams in, datagrams out: the sockets of one node and where each datagram goes (ring 2).

A batch from the network is split here: packets of a known UDX stream go to that stream, whichever socket they came in
on (`streams`), one-byte probes to the socket's own probe handler, everything else to the RPC engine.
"""

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ..encoding import Address
from ..errors import Destroyed
from ..udx.packet import PREFIX
from .streams import Stream, StreamSet

log = logging.getLogger(__name__)

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

    __slots__ = ("_datagrams", "_endpoint", "closed", "on_probe")

    def __init__(self, endpoint: "Endpoint") -> None:
        self._endpoint = endpoint
        self._datagrams: DatagramSocket | None = None
        self.closed = False
        self.on_probe: Callable[[Socket, Address], None] | None = None
        """Called for datagrams of no or one byte, which hole punching uses; other sockets ignore them."""

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
        self._endpoint.sockets.discard(self)
        if self._datagrams is not None:
            self._datagrams.close()


class Endpoint:
    """All sockets and streams of one node."""

    def __init__(self, network: Network, rng: random.Random) -> None:
        self.network = network
        self.rng = rng
        self.sockets: set[Socket] = set()
        self.streams = StreamSet(rng)
        self.on_message: Callable[[Socket, bytes, Address], None] = _drop
        """Takes every datagram that belongs to no stream; set by the RPC engine."""

    async def bind(self, host: str, port: int) -> Socket:
        """Bind a socket; port 0 picks a free one. Raises OSError if the port is taken."""
        socket = Socket(self)
        socket._datagrams = await self.network.bind(host, port, partial(self._receive, socket))
        self.sockets.add(socket)
        return socket

    def close(self) -> None:
        """Close every socket and forget every stream."""
        self.streams.close()
        for socket in list(self.sockets):
            socket.close()

    def _receive(self, socket: Socket, batch: list[Arrival]) -> None:
        by_stream: dict[Stream, list[bytes]] = {}
        for datagrams, source in batch:
            if source[1] != 0:  # nobody can be answered there
                self._sort(socket, datagrams, source, by_stream)
        for stream, packets in by_stream.items():
            stream.receive(packets)

    def _sort(
        self, socket: Socket, datagrams: list[bytes], source: Address, by_stream: dict[Stream, list[bytes]]
    ) -> None:
        """Sort by stream what came from one source; packets that follow one of the same stream cost a comparison."""
        find = self.streams.find
        settled: bytes | None = None  # the stream id that packets go on with; short datagrams have none
        packets: list[bytes] = []
        for data in datagrams:
            if data[4:8] == settled and data[:2] == PREFIX:
                packets.append(data)
                continue
            stream = find(data)
            if stream is not None:
                if stream.accepts(socket, source):
                    packets = by_stream.setdefault(stream, [])
                    packets.append(data)
                    settled = data[4:8] if stream.is_way(socket, source) else None
            elif len(data) >= 2:
                self._deliver(socket, data, source)
            elif socket.on_probe is not None:
                socket.on_probe(socket, source)

    def _deliver(self, socket: Socket, data: bytes, source: Address) -> None:
        try:
            self.on_message(socket, data, source)
        except Exception:  # a bug in a handler must not cost the rest of the batch
            log.exception("a message handler failed")


def _drop(socket: Socket, data: bytes, source: Address) -> None:
    """Ignore messages until an RPC engine is there."""
