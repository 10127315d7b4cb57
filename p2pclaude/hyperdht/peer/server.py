"""A server: answers handshakes for one public key and hands out connections (ring 2).

`router` brings the handshakes, through a relay or directly; each one that is welcome gets a UDX stream that waits for
the client's first packet. A connection is handed out when that packet has arrived and decrypted. Source: hyperdht
lib/server.js.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from ..constants import Firewall, HandshakeError
from ..crypto import KeyPair
from ..encoding import Address
from ..errors import ConnectionClosed, DecodeError, HyperDHTError
from ..expiring import ExpiringMap
from ..node.budget import VerifyBudget
from ..rpc.requests import IncomingRequest
from ..secure.connection import Connection
from ..secure.noise import NoiseIK
from .announcer import Announcer
from .context import PeerContext
from .pending_client import HANDSHAKE_TIMEOUT, PendingClient
from .router import Answer
from .setup_messages import (
    Handshake,
    Holepunch,
    HolepunchInfo,
    NoisePayload,
    UdxInfo,
    decode_noise_payload,
    encode_noise_payload,
)
from .slots import Slots
from .turns import Turns

log = logging.getLogger(__name__)

HANDSHAKES_OF_HOST: Final = 100.0  # a second; each costs about a millisecond, with all that follows
HANDSHAKES_OF_ALL: Final = 200.0
MAX_ANSWERS: Final = 4096  # answers kept for repeats

OnConnection = Callable[[Connection], Awaitable[None]]
Allow = Callable[[bytes, Address], bool]


class Server:
    """Serves one key pair; made by `HyperDHT.create_server`.

    `listening` are the servers of the node that listen: this one is among them from `listen` to `close`.
    """

    def __init__(
        self,
        context: PeerContext,
        listening: "list[Server]",
        on_connection: OnConnection,
        allow: Allow | None,
        relay_through: bytes | None,
    ) -> None:
        self._context = context
        self._listening = listening
        self._relay_through = relay_through
        self._on_connection = on_connection
        self._allow = allow
        self._key_pair: KeyPair | None = None
        self._announcer: Announcer | None = None
        # By Noise message, so that all relays and repeats get the same answer.
        self._answers: ExpiringMap[bytes, asyncio.Task[Answer | None]] = ExpiringMap(MAX_ANSWERS, HANDSHAKE_TIMEOUT)
        self._budget = VerifyBudget(HANDSHAKES_OF_HOST)
        self._slots = Slots()
        self._turns = Turns(HANDSHAKES_OF_ALL, self._slots.held)
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

        Raises ValueError if another server of this node has the key; Suspended, Destroyed. A failed announcement is
        retried behind.
        """
        self._context.check_usable()
        if self.closed:
            raise RuntimeError("the server is closed")
        if self._key_pair is not None:
            raise RuntimeError("the server listens already")
        key_pair = key_pair or self._context.key_pair
        self._context.router.add_server(key_pair.public_key, self)
        self._key_pair = key_pair
        self._announcer = Announcer(self._context.node, key_pair)
        self._listening.append(self)
        await self._announcer.start()

    @property
    def is_announced(self) -> bool:
        """Tell whether the last announcement succeeded."""
        return self._announcer is not None and self._announcer.has_succeeded

    def refresh(self) -> None:
        """Announce anew as soon as possible, as after a change of the network."""
        if self._announcer is not None:
            self._announcer.refresh()

    async def close(self) -> None:
        """Stop serving and take the announcement back; open connections stay open."""
        if self.closed:
            return
        self.closed = True
        if self in self._listening:
            self._listening.remove(self)
        if self._key_pair is not None:
            self._context.router.remove_server(self._key_pair.public_key)
        self._slots.abort()
        if self._announcer is not None:
            await self._announcer.stop()

    async def suspend(self) -> None:
        """Take the announcement back until `resume`."""
        if self._announcer is not None:
            await self._announcer.stop()

    async def resume(self) -> None:
        """Announce again."""
        self._answers.clear()  # they name streams that are gone
        if self._announcer is not None and not self.closed:
            await self._announcer.start()

    # LocalServer

    async def handle_handshake(self, message: Handshake, request: IncomingRequest) -> Answer | None:
        """Answer a client's Noise message, the same one always alike; None to stay silent."""
        now = asyncio.get_running_loop().time()
        answering = self._answers.get(message.noise, now)
        if answering is None:
            client = message.peer_address or request.source
            if self.closed or not self._turns.has_room(client[0]) or not self._budget.take(client[0], now):
                return None
            answering = asyncio.create_task(self._answer(message, request))
            self._answers.set(message.noise, answering, now)
        return await asyncio.shield(answering)

    async def handle_holepunch(self, message: Holepunch, request: IncomingRequest) -> Answer | None:
        """Answer a hole punching round of a handshake that was answered before."""
        pending = self._slots.find(message.id)
        return None if pending is None else await pending.handle_holepunch(message, request)

    async def _answer(self, message: Handshake, request: IncomingRequest) -> Answer | None:
        client = message.peer_address or request.source
        if not await self._turns.wait(client[0]) or self.closed or self._context.node.suspended:
            self._answers.delete(message.noise)  # when it comes again there may be room
            return None
        assert self._key_pair is not None
        noise = NoiseIK.responder(self._key_pair, KeyPair.generate(self._context.rng))
        try:
            payload = decode_noise_payload(noise.read_message(message.noise))
        except DecodeError:
            return None
        if not self._allows(noise.remote_public_key, client):
            return None
        if payload.version != 1 or payload.udx is None:
            error = HandshakeError.VERSION_MISMATCH if payload.version != 1 else HandshakeError.ABORTED
            return Answer(noise.write_message(encode_noise_payload(self._payload(error))))
        if not self._slots.make_room(client[0]):  # only a client that knows the key may take another's place
            self._answers.delete(message.noise)  # as above
            return None
        return await self._admit(client[0], noise, payload, message, request)

    async def _admit(
        self, host: str, noise: NoiseIK, payload: NoisePayload, message: Handshake, request: IncomingRequest
    ) -> Answer | None:
        """Answer a welcome client, and wait for it in a slot."""
        assert self._announcer is not None
        try:
            pending = PendingClient(self._context, self._announcer, self.public_key, noise, self._relay_through)
        except HyperDHTError:
            return None  # too many streams
        slot = self._slots.take(pending, host)
        try:
            try:
                await pending.prepare(payload, message, request)
            except OSError:
                log.warning("no socket for hole punching is to be had")
            answer = noise.write_message(encode_noise_payload(self._payload(HandshakeError.NONE, pending, slot)))
            pending.start(payload, message, request)
        except BaseException:  # it gets no answer: nothing shall wait for it
            pending.connection.abort()
            pending.close()
            self._slots.give_back(slot)
            raise
        self._context.spawn_handler(self._hand_out(pending, slot))
        return Answer(answer, pending.socket)

    def _allows(self, public_key: bytes, address: Address) -> bool:
        if self._allow is None:
            return True
        try:
            return self._allow(public_key, address)
        except Exception:  # in doubt nobody gets in
            log.exception("the server's firewall function failed")
            return False

    def _payload(self, error: HandshakeError, pending: PendingClient | None = None, slot: int = 0) -> NoisePayload:
        open_address = self._context.node.remote_address()
        relays = () if self._announcer is None else self._announcer.relays
        return NoisePayload(
            error=error,
            firewall=Firewall.UNKNOWN if open_address is None else Firewall.OPEN,
            holepunch=HolepunchInfo(slot, relays) if relays and open_address is None else None,
            addresses4=self._context.own_addresses(),
            udx=UdxInfo(reusable_socket=False, id=0 if pending is None else pending.stream_id),
            secret_stream=True,
            relay_through=None if pending is None else pending.relay_through,
            relay_addresses=self.relay_addresses or None,
        )

    async def _settle(self, pending: PendingClient, slot: int) -> None:
        try:
            await pending.settle()
        finally:
            self._slots.end_settling(slot)

    async def _hand_out(self, pending: PendingClient, slot: int) -> None:
        """Give the connection to the application once the client is there."""
        connection = pending.connection
        try:
            if not await pending.wait_opened():
                return
            self._slots.begin_settling(slot, pending)
            self._context.spawn_handler(self._settle(pending, slot))
        finally:
            self._slots.give_back(slot)
        try:
            await self._on_connection(connection)
        except ConnectionClosed as error:
            log.debug("a connection ended: %s", error)  # peers vanish: nothing a handler must foresee
        except Exception:
            log.exception("a connection's handler failed")
            connection.abort()
        finally:
            await connection.close()
