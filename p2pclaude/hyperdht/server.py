"""A server: answers handshakes for one public key and hands out connections (ring 2).

`router` brings the handshakes, through a relay or directly; each one that is welcome gets a UDX stream that waits for
the client's first packet. A connection is handed out when that packet has arrived and decrypted. Source: hyperdht
lib/server.js.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from .announcer import Announcer
from .connection import Connection
from .constants import Firewall, HandshakeError
from .crypto import KeyPair
from .encoding import Address
from .endpoint import Socket
from .errors import ConnectionClosed, DecodeError, HyperDHTError
from .handshakes import (
    Handshake,
    Holepunch,
    NoisePayload,
    UdxInfo,
    decode_noise_payload,
    encode_noise_payload,
)
from .noise import NoiseIK
from .requests import IncomingRequest
from .router import Answer
from .streams import Stream

if TYPE_CHECKING:
    from .dht import HyperDHT

log = logging.getLogger(__name__)

MAX_HANDSHAKES: Final = 256  # handshakes whose client has not shown up yet
HANDSHAKE_TIMEOUT: Final = 10.0  # for the client's first packet; also how long a handshake may be repeated

OnConnection = Callable[[Connection], Awaitable[None]]
Allow = Callable[[bytes, Address], bool]


class Server:
    """Serves one key pair; made by `HyperDHT.create_server`."""

    def __init__(self, dht: "HyperDHT", on_connection: OnConnection, allow: Allow | None) -> None:
        self._dht = dht
        self._on_connection = on_connection
        self._allow = allow
        self._key_pair: KeyPair | None = None
        self._announcer: Announcer | None = None
        self._answers: dict[bytes, Answer | None] = {}  # by Noise message: relays and repeats get the same answer
        self._expiries: dict[bytes, asyncio.TimerHandle] = {}
        self._waiting: dict[Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False
        """Whether `close` was called."""

    @property
    def public_key(self) -> bytes:
        """The key clients connect to; RuntimeError before `listen`."""
        if self._key_pair is None:
            raise RuntimeError("the server does not listen")
        return self._key_pair.public_key

    @property
    def record(self) -> bytes:
        """The encoded peer record FIND_PEER answers with."""
        if self._announcer is None:
            raise RuntimeError("the server does not listen")
        return self._announcer.record

    @property
    def relay_addresses(self) -> tuple[Address, ...]:
        """The DHT nodes that lead clients here; empty in a network of one node."""
        return () if self._announcer is None else self._announcer.relay_addresses

    async def listen(self, key_pair: KeyPair | None = None) -> None:
        """Answer for a key pair (default: the node's) and announce it; returns after the first announcement.

        Raises ValueError if another server of this node has the key. A failed announcement is retried behind.
        """
        if self._key_pair is not None:
            raise RuntimeError("the server listens already")
        key_pair = key_pair or self._dht.key_pair
        self._dht.router.add_server(key_pair.public_key, self)
        self._key_pair = key_pair
        self._announcer = Announcer(self._dht.node, key_pair)
        self._dht.servers.add(self)
        await self._announcer.start()

    def refresh(self) -> None:
        """Announce anew as soon as possible, as after a change of the network."""
        if self._announcer is not None:
            self._announcer.refresh()

    async def close(self) -> None:
        """Stop serving and take the announcement back; open connections stay open."""
        if self.closed:
            return
        self.closed = True
        self._dht.servers.discard(self)
        if self._key_pair is not None:
            self._dht.router.remove_server(self._key_pair.public_key)
        for expiry in self._expiries.values():
            expiry.cancel()
        for connection in list(self._waiting):
            connection.abort()
        if self._announcer is not None:
            await self._announcer.stop()

    async def suspend(self) -> None:
        """Take the announcement back until `resume`."""
        if self._announcer is not None:
            await self._announcer.stop()

    async def resume(self) -> None:
        """Announce again."""
        if self._announcer is not None and not self.closed:
            await self._announcer.start()

    # LocalServer

    async def handle_handshake(self, message: Handshake, request: IncomingRequest) -> Answer | None:
        """Answer a client's Noise message, the same one always alike; None to stay silent."""
        if message.noise in self._answers:
            return self._answers[message.noise]
        if self.closed or len(self._answers) >= MAX_HANDSHAKES:
            return None
        answer = self._answer(message, request)
        self._answers[message.noise] = answer
        loop = asyncio.get_running_loop()
        self._expiries[message.noise] = loop.call_later(HANDSHAKE_TIMEOUT, self._forget, message.noise)
        return answer

    def _forget(self, noise: bytes) -> None:
        del self._answers[noise], self._expiries[noise]

    async def handle_holepunch(self, message: Holepunch, request: IncomingRequest) -> Answer | None:
        """Stay silent: no handshake of ours offers hole punching."""
        return None

    def _answer(self, message: Handshake, request: IncomingRequest) -> Answer | None:
        assert self._key_pair is not None
        noise = NoiseIK.responder(self._key_pair, KeyPair.generate(self._dht.rng))
        try:
            payload = decode_noise_payload(noise.read_message(message.noise))
        except DecodeError:
            return None
        client_address = message.peer_address or request.source
        if not self._allows(noise.remote_public_key, client_address):
            return None
        if payload.version != 1 or payload.udx is None:
            error = HandshakeError.VERSION_MISMATCH if payload.version != 1 else HandshakeError.ABORTED
            return Answer(noise.write_message(encode_noise_payload(self._payload(error, 0))))
        try:
            stream = self._dht.endpoint.streams.create()
        except HyperDHTError:
            return None
        answer = noise.write_message(encode_noise_payload(self._payload(HandshakeError.NONE, stream.id)))
        self._await_client(stream, noise, payload.udx.id)
        if message.peer_address is None:
            stream.connect(request.socket, payload.udx.id, client_address)
        elif payload.firewall == Firewall.OPEN:
            stream.connect(self._dht.node.socket, payload.udx.id, client_address)
        return Answer(answer)

    def _allows(self, public_key: bytes, address: Address) -> bool:
        if self._allow is None:
            return True
        try:
            return self._allow(public_key, address)
        except Exception:  # in doubt nobody gets in
            log.exception("the server's firewall function failed")
            return False

    def _payload(self, error: HandshakeError, stream_id: int) -> NoisePayload:
        open_address = self._dht.node.remote_address()
        return NoisePayload(
            error=error,
            firewall=Firewall.UNKNOWN if open_address is None else Firewall.OPEN,
            addresses4=self._dht.own_addresses(),
            udx=UdxInfo(reusable_socket=False, id=stream_id),
            secret_stream=True,
            relay_addresses=self.relay_addresses or None,
        )

    def _await_client(self, stream: Stream, noise: NoiseIK, remote_id: int) -> None:
        """Let the client's first packet, wherever it comes from, set the path; hand the connection out then."""
        connection = Connection(
            stream,
            self.public_key,
            noise.remote_public_key,
            is_initiator=False,
            keep_alive=self._dht.connection_keep_alive,
            rng=self._dht.rng,
        )

        def firewall(socket: Socket, source: Address) -> bool:
            stream.connect(socket, remote_id, source)
            return True

        stream.firewall = firewall
        connection.start(noise)
        self._waiting[connection] = None
        task = asyncio.create_task(self._hand_out(connection, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_out(self, connection: Connection, stream: Stream) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await connection.wait_opened()
        except (TimeoutError, ConnectionClosed):
            connection.abort()
            return
        finally:
            self._waiting.pop(connection, None)
        try:
            await self._on_connection(connection)
        except ConnectionClosed as error:
            log.debug("a connection ended: %s", error)  # peers vanish: nothing a handler must foresee
        except Exception:
            log.exception("a connection's handler failed")
            connection.abort()
        finally:
            await connection.close()
