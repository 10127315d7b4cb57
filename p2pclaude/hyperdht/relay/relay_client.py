"""A blind relay as its clients see it: two peers that cannot reach each other meet there (ring 2).

Both sides of a connection connect to the relay, each on an encrypted connection of its own, and name the same token
and the id of the stream that waits. The relay answers with the id of a stream of its own, and passes UDX packets on
between the two: it sees ciphertext only. `peer` calls `open_link`; `relay_server` is the other side.
Source: blind-relay index.js, hyperdht lib/connect.js (relayConnection).
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from ..encoding import Address
from ..errors import Destroyed, HyperDHTError, RelayFailed, Suspended
from ..net.sockets import Socket
from ..net.streams import Stream
from ..secure.connection import Connection
from .link_messages import (
    RelayPair,
    decode_relay_pair,
    decode_relay_unpair,
    encode_relay_pair,
    encode_relay_unpair,
)
from .mux import Mux

PROTOCOL: Final = "blind-relay"
PAIR: Final = 0  # kinds of messages on its channel
UNPAIR: Final = 1
LINK_TIMEOUT: Final = 15.0
MAX_FRAME_BYTES: Final = 16384  # of what a relay and its clients say to each other: some 40 bytes a message
KEEP_ALIVE: Final = 5.0  # seconds, on the connection to the relay: a NAT must not forget it while it carries packets


class Connect(Protocol):
    """A way to a server: `HyperDHT.connect`, of which a relay's client needs no more than this."""

    def __call__(self, public_key: bytes, /, *, timeout: float) -> Coroutine[Any, Any, Connection]:
        """Connect within `timeout` seconds."""


class RelayClient:
    """This side of a connection to a blind relay; it owns the connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.on_lost: Callable[[bytes], None] | None = None
        """Called with a token that was paired when the relay ended its link, or the connection to it is over."""
        self._waiting: dict[bytes, tuple[bool, asyncio.Future[int]]] = {}
        self._paired: set[bytes] = set()
        connection.limit_frames(MAX_FRAME_BYTES)
        self._mux = Mux(connection)
        self._channel = self._mux.open(
            PROTOCOL, connection.public_key, on_message=self._receive, on_close=self._channel_closed
        )
        self._running = asyncio.create_task(self._mux.run())

    async def pair(self, token: bytes, is_initiator: bool, stream: Stream) -> int:
        """Ask for a link under a token, and return the id that the relay gave the peer's stream.

        Waits until the other side asks too, which may be never. Raises RelayFailed when the relay refuses or is lost;
        ValueError for a token that is waiting already.
        """
        if token in self._waiting or token in self._paired:
            raise ValueError("this token is in use")
        if self._channel.closed:
            raise RelayFailed("the connection to the relay is over")
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[token] = (is_initiator, answer)
        self._channel.send(PAIR, encode_relay_pair(RelayPair(is_initiator, token, stream.id)))
        try:
            remote_id = await answer
        except asyncio.CancelledError:
            self.unpair(token)
            raise
        finally:
            self._waiting.pop(token, None)
        if token not in self._paired:
            raise RelayFailed("the relay ended the link at once")
        return remote_id

    def unpair(self, token: bytes) -> None:
        """Take a link back, or the wish for one: then `pair` raises RelayFailed."""
        self._paired.discard(token)
        self._fail(token, "the link was taken back")
        self._channel.send(UNPAIR, encode_relay_unpair(token))

    async def close(self) -> None:
        """End the connection to the relay, and with it all its links."""
        self._paired.clear()
        self._channel.close()
        await self.connection.close()
        await self._running

    def _receive(self, kind: int, payload: bytes) -> None:
        if kind == PAIR:
            message = decode_relay_pair(payload)
            is_initiator, answer = self._waiting.get(message.token, (None, None))
            if answer is not None and is_initiator == message.is_initiator and not answer.done():
                self._paired.add(message.token)
                answer.set_result(message.id)
        elif kind == UNPAIR:  # blind-relay's server never says so; ours does when it ends or refuses a link
            self._lose(decode_relay_unpair(payload))

    def _lose(self, token: bytes) -> None:
        if token in self._paired:
            self._paired.discard(token)
            if self.on_lost is not None:
                self.on_lost(token)
        else:
            self._fail(token, "the relay refuses the link")

    def _fail(self, token: bytes, reason: str) -> None:
        if token in self._waiting and not (answer := self._waiting[token][1]).done():
            answer.set_exception(RelayFailed(reason))

    def _channel_closed(self) -> None:
        for token in [*self._waiting]:
            self._fail(token, "the connection to the relay is over")
        for token in [*self._paired]:
            self._lose(token)


class RelayLink:
    """A stream's way through a relay; it closes itself when the stream is over."""

    def __init__(self, client: RelayClient, token: bytes, stream: Stream, remote_id: int) -> None:
        connection = client.connection
        assert connection.socket is not None and connection.remote_address is not None
        self.socket: Socket = connection.socket
        """The socket that packets through the relay leave from and arrive on."""
        self.address: Address = connection.remote_address
        """The relay's address."""
        self.remote_id = remote_id
        """The id by which the relay knows the peer's stream: that of packets sent to the relay."""
        self.remote_id = remote_id
        """The relay's id for the peer's stream."""
        self.on_lost: Callable[[], None] | None = None
        """Called once, when the relay ended the link or is lost while the stream still depends on it."""
        self.closed = False
        """Whether the link was closed, here or by the relay."""
        self._client = client
        self._token = token
        self._stream = stream
        self._closing: asyncio.Task[None] | None = None
        client.on_lost = self._lost
        stream.on_forgotten = self.close

    def carries(self, socket: Socket | None, source: Address) -> bool:
        """Tell whether a packet that arrived on `socket` from `source` came through the relay."""
        return socket is self.socket and source == self.address

    def close(self) -> None:
        """Give the link back, as when the stream has found a direct way; the connection to the relay ends behind."""
        if self.closed:
            return
        self.closed = True
        self._stream.on_forgotten = self.on_lost = None
        self._client.unpair(self._token)
        self._closing = asyncio.get_running_loop().create_task(self._client.close())

    async def wait_closed(self) -> None:
        """Wait until the connection to the relay has ended, after `close`."""
        if self._closing is not None:
            await self._closing

    def _lost(self, token: bytes) -> None:
        on_lost, depends = self.on_lost, self._is_used()
        self.close()
        if on_lost is not None and depends:
            on_lost()

    def _is_used(self) -> bool:
        stream = self._stream
        return not stream.core.closed and stream.socket is self.socket and stream.address == self.address


async def open_link(
    connect: Connect,
    relay_public_key: bytes,
    token: bytes,
    is_initiator: bool,
    stream: Stream,
    timeout: float = LINK_TIMEOUT,
) -> RelayLink:
    """Connect to a relay by `connect`, meet the other side there under `token`, and send the stream's packets that way.

    A stream that has found a way of its own meanwhile is left on it. The link takes over the stream's `on_forgotten`.
    Raises RelayFailed after `timeout` seconds or when the relay cannot be reached or refuses, with the cause;
    Suspended, Destroyed.
    """
    try:
        async with asyncio.timeout(timeout):
            client = RelayClient(await connect(relay_public_key, timeout=timeout))
            try:
                client.connection.set_keep_alive(KEEP_ALIVE)
                remote_id = await client.pair(token, is_initiator, stream)
            except BaseException:
                client.connection.abort()
                raise
    except (Suspended, Destroyed, RelayFailed):
        raise
    except TimeoutError as error:
        raise RelayFailed(f"no link through the relay within {timeout:g} seconds") from error
    except HyperDHTError as error:
        raise RelayFailed(f"the relay cannot be reached: {error}") from error
    link = RelayLink(client, token, stream, remote_id)
    if stream.core.closed:
        link.close()
        raise RelayFailed("the stream was over before the relay had linked it")
    if not stream.core.connected:
        stream.connect(link.socket, remote_id, link.address)
    return link
