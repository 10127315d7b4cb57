"""Datagrams in, datagrams out: the sockets of one node and where each datagram goes (ring 2).

A batch from the network is split here: packets of a known UDX stream go to that stream, whichever socket they came in
on (`streams`), one-byte probes to the socket's own probe handler, everything else to the RPC engine.
"""

import logging
import random
from collections.abc import Callable
from functools import partial

from ..encoding import Address
from ..udx.packet import PREFIX
from .sockets import Arrival, Network, Socket
from .streams import Stream, StreamSet

log = logging.getLogger(__name__)


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
        socket = Socket(self.sockets.discard)
        socket.attach(await self.network.bind(host, port, partial(self._receive, socket)))
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
