"""Passes handshakes and hole punching rounds on between clients, relays and servers (ring 2).

Every node does this for others: a server's announcement leaves its address with the nodes closest to its key, and a
client's first message takes the way client -> relay (-> second relay) -> server and back. Source: hyperdht
lib/router.js.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol

from ..constants import Command, Mode
from ..crypto import hash as blake2b
from ..encoding import Address
from ..errors import DecodeError
from ..net.sockets import Socket
from ..node.forwards import Forward, ForwardStore
from ..rpc.rpc import IncomingRequest
from .setup_messages import (
    Handshake,
    Holepunch,
    decode_handshake,
    decode_holepunch,
    encode_handshake,
    encode_holepunch,
)

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A server's answer to a handshake or round, and the socket it must leave from (None: where it was asked)."""

    payload: bytes
    socket: Socket | None = None


class LocalServer(Protocol):
    """A server on this node."""

    @property
    def record(self) -> bytes:
        """The encoded peer record FIND_PEER answers with."""

    async def handle_handshake(self, message: Handshake, request: IncomingRequest) -> Answer | None:
        """Answer a client's first Noise message, or stay silent."""

    async def handle_holepunch(self, message: Holepunch, request: IncomingRequest) -> Answer | None:
        """Answer a hole punching round, or stay silent."""


class Router:
    """The servers on this node, and the way to the servers that announced themselves to it."""

    def __init__(self, forwards: ForwardStore) -> None:
        self._forwards = forwards
        self._servers: dict[bytes, LocalServer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def add_server(self, public_key: bytes, server: LocalServer) -> None:
        """Answer for a server here; nobody's announcement can take its place. ValueError if the key is taken."""
        target = blake2b(public_key)
        if target in self._servers:
            raise ValueError("a server listens on this key pair already")
        self._servers[target] = server

    def remove_server(self, public_key: bytes) -> None:
        """Stop answering for a server."""
        self._servers.pop(blake2b(public_key), None)

    def get(self, target: bytes, now: float) -> Forward | None:
        """Return what FIND_PEER answers for a target: a local server's record, or an announced one."""
        server = self._servers.get(target)
        return Forward(None, server.record) if server is not None else self._forwards.get(target, now)

    def set(self, target: bytes, relay: Address, record: bytes, now: float) -> None:
        """Keep an announced server's record and the address it announced itself from."""
        if target not in self._servers:
            self._forwards.set(target, Forward(relay, record), now)

    def remove(self, target: bytes) -> None:
        """Forget an announced server."""
        self._forwards.delete(target)

    def close(self) -> None:
        """Drop what is being answered."""
        for task in self._tasks:
            task.cancel()

    def handle(self, request: IncomingRequest) -> bool:
        """Take PEER_HANDSHAKE and PEER_HOLEPUNCH; tells whether it was one of them. Malformed ones are dropped."""
        if request.command not in (Command.PEER_HANDSHAKE, Command.PEER_HOLEPUNCH):
            return False
        if request.target is None or request.value is None:
            return True
        try:
            if request.command == Command.PEER_HANDSHAKE:
                self._handle_handshake(request, request.target, decode_handshake(request.value))
            else:
                self._handle_holepunch(request, request.target, decode_holepunch(request.value))
        except DecodeError:
            pass
        return True

    def _handle_handshake(self, request: IncomingRequest, target: bytes, message: Handshake) -> None:
        server = self._servers.get(target)
        if server is not None:
            self._spawn(self._answer_handshake(server, request, message))
        else:
            self._forward_handshake(request, self._relay_of(target), message)

    async def _answer_handshake(self, server: LocalServer, request: IncomingRequest, message: Handshake) -> None:
        if message.mode not in (Mode.FROM_CLIENT, Mode.FROM_RELAY, Mode.FROM_SECOND_RELAY) or not message.noise:
            return
        answer = await server.handle_handshake(message, request)
        if answer is None:
            return
        if message.mode == Mode.FROM_CLIENT:
            value = encode_handshake(Handshake(Mode.REPLY, answer.payload))
            request.reply(value, token=False, closer_nodes=False, socket=answer.socket)
            return
        to = request.source if message.mode == Mode.FROM_RELAY else message.relay_address
        if to is not None:
            value = encode_handshake(Handshake(Mode.FROM_SERVER, answer.payload, message.peer_address))
            request.relay(value, to, socket=answer.socket)

    def _forward_handshake(self, request: IncomingRequest, relay: Address | None, message: Handshake) -> None:
        match message:
            case Handshake(noise=b""):
                return
            case Handshake(Mode.FROM_CLIENT, noise, _, named):
                to = named or relay
                if to is None:
                    request.reply(None, token=False)  # the closer nodes may know the way
                    return
                request.relay(encode_handshake(Handshake(Mode.FROM_RELAY, noise, request.source)), to)
            case Handshake(Mode.FROM_RELAY, noise, peer, _) if relay is not None:
                value = encode_handshake(Handshake(Mode.FROM_SECOND_RELAY, noise, peer, request.source))
                request.relay(value, relay)
            case Handshake(Mode.FROM_SERVER, noise, peer, _) if peer is not None:
                value = encode_handshake(Handshake(Mode.REPLY, noise, request.source))
                request.reply(value, token=False, closer_nodes=False, to=peer)

    def _handle_holepunch(self, request: IncomingRequest, target: bytes, message: Holepunch) -> None:
        match message:
            case Holepunch(Mode.FROM_CLIENT, number, payload, peer):
                to = peer or self._relay_of(target)
                if to is not None:
                    request.relay(encode_holepunch(Holepunch(Mode.FROM_RELAY, number, payload, request.source)), to)
            case Holepunch(Mode.FROM_RELAY, _, _, peer) if peer is not None:
                server = self._servers.get(target)
                if server is not None:
                    self._spawn(self._answer_holepunch(server, request, message))
            case Holepunch(Mode.FROM_SERVER, number, payload, peer) if peer is not None:
                value = encode_holepunch(Holepunch(Mode.REPLY, number, payload, request.source))
                request.reply(value, token=False, closer_nodes=False, to=peer)

    async def _answer_holepunch(self, server: LocalServer, request: IncomingRequest, message: Holepunch) -> None:
        answer = await server.handle_holepunch(message, request)
        if answer is not None:
            value = encode_holepunch(Holepunch(Mode.FROM_SERVER, 0, answer.payload, message.peer_address))
            request.relay(value, request.source, socket=answer.socket)

    def _relay_of(self, target: bytes) -> Address | None:
        forward = self._forwards.get(target, asyncio.get_running_loop().time())
        return None if forward is None else forward.relay

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("answering a handshake failed", exc_info=error)
