"""A blind relay: links the streams of two clients that name the same token, and passes their packets on (ring 2).

    client A <-> stream a = stream b <-> client B      all packets for a go to B, all for b to A

The packets are encrypted between the clients; the relay only changes the stream id in front. Everything that a client
can make it keep has a limit. `relay_client` is the clients' side. Source: blind-relay index.js, libudx
(udx_stream_relay_to).
"""

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..crypto import KeyPair
from ..encoding import Address
from ..errors import HyperDHTError
from ..net.endpoint import Endpoint
from ..net.sockets import Socket
from ..net.streams import Stream, StreamSet
from ..secure.connection import Connection
from ..udx.packet import DESTROY, HEADER, HEADER_BYTES, MAGIC, SEQ_MASK, rewrite_stream_id, unwrap
from ..udx.stream import UdxStream
from .link_messages import (
    RelayPair,
    decode_relay_pair,
    decode_relay_unpair,
    encode_relay_pair,
    encode_relay_unpair,
)
from .mux import Channel, Mux
from .relay_client import KEEP_ALIVE, MAX_FRAME_BYTES, PAIR, PROTOCOL, UNPAIR

log = logging.getLogger(__name__)

WAIT_SECONDS: Final = 30.0  # for the other side of a pair; clients give up after 15
IDLE_SECONDS: Final = 30.0  # a connection may stay without a link or the wish for one
LINGER_SECONDS: Final = 2.0  # a link goes on after a client broke off: repeated DESTROYs and last words pass
MAX_HELD: Final = 16  # packets kept each way until the client that they are for has shown up

_SEQ = struct.Struct("<12xI")  # a packet's number


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives at most.

    `connections` of clients; `pairs` a connection: links and halves of such; `links` in all; `link_bytes` both ways
    together, as UDP payload, and `link_seconds` a link. None is no limit.
    """

    connections: int = 256
    pairs: int = 64
    links: int = 1024
    link_bytes: int | None = None
    link_seconds: float | None = None


@dataclass(slots=True)
class RelayStats:
    """What a relay has done since it began."""

    connections: int = 0
    refused: int = 0  # connections over the limit
    links: int = 0
    refused_links: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class ClientConnected:
    """A client connected, as number `client`."""

    client: int
    public_key: bytes
    address: Address | None


@dataclass(frozen=True, slots=True)
class ClientGone:
    """A client's connection is over."""

    client: int


@dataclass(frozen=True, slots=True)
class ClientRefused:
    """A connection was dropped: there are too many."""

    address: Address | None


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """Two clients (the initiator's connection first) are linked, as number `link`."""

    link: int
    clients: tuple[int, int]


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """A link is over: `client` (one of them is done), `bytes`, `seconds` (limits) or `closed` (the relay is)."""

    link: int
    reason: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LinkRefused:
    """A client asked for more links than it may have, or than there are; told once for each client."""

    client: int


RelayEvent = ClientConnected | ClientGone | ClientRefused | LinkOpened | LinkClosed | LinkRefused


class _RelayStream(Stream):
    """One client's end of a link: packets from the client's host go to the other end as they are."""

    __slots__ = ("_client", "_held", "_last", "_remote_id", "link")

    def __init__(self, streams: StreamSet, core: UdxStream) -> None:
        super().__init__(streams, core)
        self._client: Connection | None = None
        self.link: _Link | None = None
        self._remote_id = 0
        self._held: deque[bytes] = deque(maxlen=MAX_HELD)
        self._last: bytes | None = None  # the packet that is furthest on: repeated ones are behind

    def join(self, link: "_Link", remote_id: int, client: Connection) -> None:
        """Belong to a link: packets out are addressed to `remote_id`, packets in have to come from `client`'s host."""
        self.link, self._remote_id, self._client = link, remote_id, client

    def accepts(self, socket: Socket, source: Address) -> bool:
        """Let the client's host in, and take the way it uses for the way back."""
        client = None if self._client is None else self._client.remote_address  # which may have moved
        if client is None or source[0] != client[0]:
            return False
        if socket is not self.socket or source != self.address:
            self.socket, self.address = socket, source
            held, self._held = self._held, deque(maxlen=MAX_HELD)
            if held:
                socket.send(list(held), source)
        return True

    def receive(self, datagrams: Sequence[bytes]) -> None:
        """Pass packets on to the other end; the beginning of one, which may follow whole ones, is none."""
        packets = [data for data in datagrams if len(data) >= HEADER_BYTES]
        if packets:
            self._last = _furthest(packets, self._last)
            if self.link is not None:
                self.link.relay(self, packets)

    def forward(self, datagrams: Sequence[bytes]) -> None:
        """Send packets to this end's client, or keep a few until its first one shows where it is."""
        packets = [rewrite_stream_id(data, self._remote_id) for data in datagrams]
        if self.socket is not None and self.address is not None:
            self.socket.send(packets, self.address)
        else:
            self._held.extend(packets)

    def last_word(self) -> bytes | None:
        """Return a DESTROY as this end's client would say it now, for the other one; None if it never spoke."""
        if self._last is None:
            return None
        _, _, _, _, window, seq, ack = HEADER.unpack_from(self._last)
        return HEADER.pack(MAGIC, DESTROY, 0, 0, window, (seq + 1) & SEQ_MASK, ack)


def _furthest(packets: list[bytes], last: bytes | None) -> bytes:
    """Return the packet with the highest number; a DESTROY with a lower one than the peer expects is ignored."""
    if last is None:
        last = packets[0]
    (near,) = _SEQ.unpack_from(last)
    return max((last, *packets), key=lambda data: unwrap(_SEQ.unpack_from(data)[0], near))


class _Session:
    """A client's connection, its links, and its halves of links to be."""

    __slots__ = ("channel", "connection", "halves", "links", "number", "was_refused")

    def __init__(self, number: int, connection: Connection) -> None:
        self.number = number
        self.connection = connection
        self.channel: Channel | None = None
        self.halves: set[_Half] = set()
        self.links: dict[bytes, _Link] = {}
        self.was_refused = False  # a link, which is told

    @property
    def pairs(self) -> int:
        return len(self.halves) + len(self.links)

    def tell(self, kind: int, payload: bytes) -> None:
        if self.channel is not None:
            self.channel.send(kind, payload)


@dataclass(eq=False, slots=True)
class _Half:
    """A client waits for another one with the same token."""

    session: _Session
    message: RelayPair
    expiry: asyncio.TimerHandle | None = None


class _Link:
    """Two streams, cross-connected."""

    __slots__ = ("_expiry", "_server", "bytes", "clients", "number", "opened_at", "streams", "token")

    def __init__(self, server: "RelayServer", number: int, token: bytes, halves: tuple[_Half, _Half]) -> None:
        self._server = server
        self.number = number
        self.token = token
        self.bytes = 0
        self.opened_at = asyncio.get_running_loop().time()
        self.clients = (halves[0].session, halves[1].session)
        self.streams = server.create_streams()
        for stream, half in zip(self.streams, halves, strict=True):
            stream.join(self, half.message.id, half.session.connection)
        self._expiry: asyncio.TimerHandle | None = None
        if (seconds := server.limits.link_seconds) is not None:
            self._close_after(seconds, "seconds")

    def relay(self, source: _RelayStream, datagrams: Sequence[bytes]) -> None:
        """Take packets of one client to the other."""
        size = sum(map(len, datagrams))
        self.bytes += size
        self._server.stats.bytes += size
        limit = self._server.limits.link_bytes
        if limit is not None and self.bytes > limit:
            self._server.close_link(self, "bytes")
            return
        first, second = self.streams
        (second if source is first else first).forward(datagrams)
        if any(data[2] & DESTROY for data in datagrams):
            self.end_soon()

    def end_soon(self) -> None:
        """Close when the clients' last words are through."""
        self._close_after(LINGER_SECONDS, "client")

    def stop(self) -> None:
        """Let go of streams and timers."""
        if self._expiry is not None:
            self._expiry.cancel()
        for stream in self.streams:
            stream.link = None
            self._server.discard(stream)

    def break_streams(self) -> None:
        """End the clients' streams, each in the other's name: blind-relay's clients have no other way to learn it."""
        for stream, other in (self.streams, self.streams[::-1]):
            if (word := stream.last_word()) is not None:
                other.forward([word])

    def _close_after(self, seconds: float, reason: str) -> None:
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        if self._expiry is not None:
            if self._expiry.when() <= when:
                return
            self._expiry.cancel()
        self._expiry = loop.call_at(when, self._server.close_link, self, reason)


class Listener(Protocol):
    """The server on which a relay's clients arrive: what a relay needs of `peer.server.Server`."""

    @property
    def public_key(self) -> bytes:
        """The key clients connect to; RuntimeError before `listen`."""

    @property
    def is_announced(self) -> bool:
        """Tell whether the last announcement succeeded."""

    async def listen(self, key_pair: KeyPair | None = None) -> None:
        """Answer for a key pair and announce it."""

    async def close(self) -> None:
        """Stop serving and take the announcement back."""


class RelayHost(Protocol):
    """The node that a relay runs on: what it needs of `HyperDHT`."""

    @property
    def endpoint(self) -> Endpoint:
        """All sockets and streams of the node."""

    def create_server(self, on_connection: Callable[[Connection], Awaitable[None]], /) -> Listener:
        """Make a server that awaits `on_connection` for each client."""


class RelayServer:
    """A blind relay on a node. `listen`, then `close`; `on_event` is told what happens.

    Clients find it by its public key as they find any server. What a client sends in vain is dropped without an
    answer; a link that is refused, or ended by the relay, is answered with an unpair message.
    """

    def __init__(
        self,
        dht: RelayHost,
        limits: RelayLimits | None = None,
        on_event: Callable[[RelayEvent], None] | None = None,
    ) -> None:
        self.limits = limits or RelayLimits()
        self.stats = RelayStats()
        self._streams = dht.endpoint.streams
        self._server = dht.create_server(self.serve)
        self._on_event = on_event
        self._sessions: set[_Session] = set()
        self._waiting: dict[bytes, dict[bool, _Half]] = {}
        self._links: set[_Link] = set()
        self._closed = False

    @property
    def public_key(self) -> bytes:
        """The key that clients name; RuntimeError before `listen`."""
        return self._server.public_key

    @property
    def connections(self) -> int:
        """The number of clients connected."""
        return len(self._sessions)

    @property
    def links(self) -> int:
        """The number of links that are open."""
        return len(self._links)

    @property
    def waiting(self) -> int:
        """The number of tokens that one side has named and the other one has not."""
        return len(self._waiting)

    async def listen(self, key_pair: KeyPair | None = None) -> None:
        """Announce the relay under a key pair (default: the node's) and serve. Raises ValueError as a server does."""
        await self._server.listen(key_pair)

    @property
    def is_announced(self) -> bool:
        """Tell whether the last announcement succeeded; one that did not is tried again behind."""
        return self._server.is_announced

    async def close(self) -> None:
        """Take the announcement back, end all links and connections."""
        if self._closed:
            return
        self._closed = True
        for link in list(self._links):
            self.close_link(link, "closed")
        connections = [session.connection.close() for session in self._sessions]
        await asyncio.gather(self._server.close(), *connections, return_exceptions=True)

    async def serve(self, connection: Connection) -> None:
        """Serve one client to the end of its connection."""
        if self._closed or len(self._sessions) >= self.limits.connections:
            self.stats.refused += 1
            self._tell(ClientRefused(connection.remote_address))
            connection.abort()
            return
        self.stats.connections += 1
        session = _Session(self.stats.connections, connection)
        self._sessions.add(session)
        self._tell(ClientConnected(session.number, connection.remote_public_key, connection.remote_address))
        connection.set_keep_alive(KEEP_ALIVE)
        connection.limit_frames(MAX_FRAME_BYTES)
        watch = asyncio.create_task(_close_when_idle(session))
        try:
            mux = Mux(connection)
            session.channel = mux.open(
                PROTOCOL,
                connection.remote_public_key,
                on_message=lambda kind, payload: self._receive(session, kind, payload),
                on_close=lambda: self._end(session),
            )
            await mux.run()
        finally:
            watch.cancel()
            self._sessions.discard(session)
            self._tell(ClientGone(session.number))

    # For links

    def create_streams(self) -> tuple[_RelayStream, _RelayStream]:
        """Make the two streams of a link. Raises HyperDHTError when there are too many."""
        first = self._streams.create_of(_RelayStream)
        try:
            return first, self._streams.create_of(_RelayStream)
        except HyperDHTError:
            self._streams.discard(first)
            raise

    def discard(self, stream: Stream) -> None:
        """Forget a stream of a link."""
        self._streams.discard(stream)

    def close_link(self, link: _Link, reason: str) -> None:
        """End a link and tell its clients; when it is the relay's doing, their streams are broken off too."""
        if link not in self._links:
            return
        self._links.discard(link)
        link.stop()
        for session in link.clients:
            session.links.pop(link.token, None)
            session.tell(UNPAIR, encode_relay_unpair(link.token))
        loop = asyncio.get_running_loop()
        if reason != "client":  # a client that left may have found a direct way, on which the stream lives on
            loop.call_soon(link.break_streams)  # after the messages above
        seconds = loop.time() - link.opened_at
        self._tell(LinkClosed(link.number, reason, link.bytes, seconds))

    # What clients ask for

    def _receive(self, session: _Session, kind: int, payload: bytes) -> None:
        if kind == PAIR:
            self._pair(session, decode_relay_pair(payload))
        elif kind == UNPAIR:
            self._unpair(session, decode_relay_unpair(payload))

    def _pair(self, session: _Session, message: RelayPair) -> None:
        token = message.token
        halves = self._waiting.get(token, {})
        if message.is_initiator in halves or token in session.links:
            return  # the first one counts
        if session.pairs >= self.limits.pairs:
            self._refuse(session, token)
            return
        half = _Half(session, message)
        self._waiting.setdefault(token, halves)[message.is_initiator] = half
        session.halves.add(half)
        if len(halves) == 2:
            self._link(token, (halves[True], halves[False]))
        else:
            half.expiry = asyncio.get_running_loop().call_later(WAIT_SECONDS, self._forget, half)

    def _link(self, token: bytes, halves: tuple[_Half, _Half]) -> None:
        for half in halves:
            self._forget(half)
        try:
            if len(self._links) >= self.limits.links:
                raise HyperDHTError("too many links")
            link = _Link(self, self.stats.links + 1, token, halves)
        except HyperDHTError as error:
            log.debug("a link is refused: %s", error)
            for half in halves:
                self._refuse(half.session, token)
            return
        self.stats.links += 1
        self._links.add(link)
        for half, stream in zip(halves, link.streams, strict=True):
            half.session.links[token] = link
            half.session.tell(PAIR, encode_relay_pair(RelayPair(half.message.is_initiator, token, stream.id)))
        self._tell(LinkOpened(link.number, (halves[0].session.number, halves[1].session.number)))

    def _unpair(self, session: _Session, token: bytes) -> None:
        for half in self._waiting.get(token, {}).copy().values():
            if half.session is session:
                self._forget(half)
        if token in session.links:
            session.links[token].end_soon()

    def _refuse(self, session: _Session, token: bytes) -> None:
        self.stats.refused_links += 1
        session.tell(UNPAIR, encode_relay_unpair(token))
        if not session.was_refused:  # to ask costs the client next to nothing, and a line in a log does not
            session.was_refused = True
            self._tell(LinkRefused(session.number))

    def _forget(self, half: _Half) -> None:
        """Drop a half: it is linked, taken back, or has waited too long."""
        if half.expiry is not None:
            half.expiry.cancel()
        half.session.halves.discard(half)
        halves = self._waiting[half.message.token]
        del halves[half.message.is_initiator]
        if not halves:
            del self._waiting[half.message.token]

    def _end(self, session: _Session) -> None:
        """Forget what a client wanted when its channel is closed; the other sides learn it in a moment."""
        session.channel = None
        for half in list(session.halves):
            self._forget(half)
        for link in session.links.values():
            link.end_soon()

    def _tell(self, event: RelayEvent) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:  # a bug in who listens must cost no client its connection, and leave none counted
            log.exception("a relay's listener failed")


async def _close_when_idle(session: _Session) -> None:
    """End a connection that nothing was paired on for a while."""
    while True:
        await asyncio.sleep(IDLE_SECONDS)
        if not session.pairs:
            await session.connection.close()
            return
