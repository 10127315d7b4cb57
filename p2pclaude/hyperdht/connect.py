"""A client's way to a server: find it, shake hands through a relay, open the stream (ring 2).

    FIND_PEER -> nodes that know the server -> handshake through two of them at a time -> the server's addresses
    -> the stream, on whichever path the server's first packet arrives

A connection is handed out when the server's first bytes have arrived and decrypted, never before. Source: hyperdht
lib/connect.js.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, Final

from .connection import Connection
from .constants import Command, Firewall, HandshakeError, InternalCommand, Mode
from .crypto import KeyPair
from .crypto import hash as blake2b
from .encoding import Address
from .endpoint import Socket
from .errors import (
    ConnectionClosed,
    DecodeError,
    HandshakeFailed,
    HolepunchError,
    HyperDHTError,
    PeerConnectionFailed,
    PeerNotFound,
    Timeout,
)
from .handshakes import (
    Handshake,
    NoisePayload,
    UdxInfo,
    decode_handshake,
    decode_noise_payload,
    encode_handshake,
    encode_noise_payload,
)
from .noise import NoiseIK
from .query import Query
from .requests import Reply

if TYPE_CHECKING:
    from .dht import HyperDHT

log = logging.getLogger(__name__)

PARALLEL_HANDSHAKES: Final = 2
PATH_TIMEOUT: Final = 10.0  # as long as a server keeps the stream of a handshake


@dataclass(frozen=True, slots=True)
class Shaken:
    """A handshake that is through."""

    noise: NoiseIK
    payload: NoisePayload
    relay_address: Address
    server_address: Address
    client_address: Address
    socket: Socket

    @property
    def relayed(self) -> bool:
        """Whether another node passed the handshake on."""
        return self.server_address != self.relay_address


class ClientConnect:
    """One attempt to connect; `run` it once."""

    def __init__(
        self, dht: "HyperDHT", public_key: bytes, key_pair: KeyPair, relay_addresses: Sequence[Address] = ()
    ) -> None:
        self._dht = dht
        self._public_key = public_key
        self._target = blake2b(public_key)
        self._relay_addresses = relay_addresses
        self._noise = NoiseIK.initiator(key_pair, public_key, KeyPair.generate(dht.rng))
        self._stream = dht.endpoint.streams.create()
        self._connection = Connection(
            self._stream,
            key_pair.public_key,
            public_key,
            is_initiator=True,
            keep_alive=dht.connection_keep_alive,
            rng=dht.rng,
        )
        self._remote_id: int | None = None
        self._early_path: tuple[Socket, Address] | None = None
        self._stream.firewall = self._firewall

    async def run(self, timeout: float) -> Connection:
        """Connect within `timeout` seconds.

        Raises PeerNotFound, PeerConnectionFailed, HandshakeFailed, HolepunchError, Timeout, Suspended or Destroyed:
        the true cause. Nothing of a failed attempt is left behind.
        """
        try:
            async with asyncio.timeout(timeout):
                shaken = await self._shake_hands()
                await self._open(shaken)
        except TimeoutError as error:
            self._connection.abort()
            if isinstance(error, HyperDHTError):
                raise
            raise Timeout(f"not connected after {timeout:g} seconds") from error
        except BaseException:
            self._connection.abort()
            raise
        self._dht.remember_relays(self._public_key, shaken.payload.relay_addresses or (shaken.relay_address,))
        return self._connection

    def _firewall(self, socket: Socket, source: Address) -> bool:
        """Take the path the server's first packet shows; one that comes before its handshake is kept in mind."""
        if self._remote_id is None:
            self._early_path = self._early_path or (socket, source)
        elif not self._connection.opened:
            self._stream.connect(socket, self._remote_id, source)
        return True

    # Handshake

    async def _shake_hands(self) -> Shaken:
        """Return the first valid handshake that any relay brings back."""
        message = self._noise.write_message(encode_noise_payload(self._payload()))
        tried: set[Address] = set()
        failures: list[HyperDHTError] = []
        if known := self._known_relays():
            shaken = await self._first_of(message, None, known, tried, failures)
            if shaken is not None:
                return shaken
        query = self._dht.node.query(Command.FIND_PEER, self._target, retries=3)
        try:
            shaken = await self._first_of(message, query, (), tried, failures)
        finally:
            query.cancel()
        if shaken is not None:
            return shaken
        if refusals := [failure for failure in failures if isinstance(failure, HandshakeFailed)]:
            raise refusals[0]
        if failures:
            raise PeerConnectionFailed("the peer is announced but did not answer its handshake") from failures[-1]
        raise PeerNotFound("no node of the DHT knows the peer")

    def _known_relays(self) -> tuple[Address, ...]:
        if self._relay_addresses:
            return tuple(self._relay_addresses)
        forward = self._dht.router.get(self._target, asyncio.get_running_loop().time())
        own = () if forward is None or forward.relay is None else (forward.relay,)
        return own + self._dht.remembered_relays(self._public_key)

    def _payload(self) -> NoisePayload:
        return NoisePayload(
            firewall=Firewall.UNKNOWN if self._dht.node.remote_address() is None else Firewall.OPEN,
            addresses4=self._dht.own_addresses(),
            udx=UdxInfo(reusable_socket=False, id=self._stream.id),
            secret_stream=True,
        )

    async def _first_of(
        self,
        message: bytes,
        query: Query | None,
        known: Iterable[Address],
        tried: set[Address],
        failures: list[HyperDHTError],
    ) -> Shaken | None:
        """Shake hands through `known` relays and those a query finds, a few at a time, until one succeeds."""
        waiting: list[Address] = list(known)
        running: list[asyncio.Task[Shaken]] = []  # in order, so that a simulation replays
        replies = None if query is None else aiter(query)
        search = None if replies is None else asyncio.create_task(_next_relay(replies))
        try:
            while True:
                while waiting and len(running) < PARALLEL_HANDSHAKES:
                    relay = waiting.pop(0)
                    if relay not in tried:
                        tried.add(relay)
                        running.append(asyncio.create_task(self._shake_hands_through(relay, message)))
                pending = [*running] if search is None else [*running, search]
                if not pending:
                    return None
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if search is not None and replies is not None and search.done():
                    found = search.result()
                    search = None if found is None else asyncio.create_task(_next_relay(replies))
                    waiting.extend(() if found is None else (found.source,))
                for task in [task for task in running if task.done()]:
                    running.remove(task)
                    if (error := task.exception()) is None:
                        return task.result()
                    if not isinstance(error, HyperDHTError):
                        raise error
                    failures.append(error)
        finally:
            for leftover in (*running, *(() if search is None else (search,))):
                leftover.cancel()
                leftover.add_done_callback(_ignore_outcome)

    async def _shake_hands_through(self, relay: Address, message: bytes) -> Shaken:
        reply = await self._dht.node.rpc.request(
            relay,
            Command.PEER_HANDSHAKE,
            target=self._target,
            value=encode_handshake(Handshake(Mode.FROM_CLIENT, message)),
        )
        try:
            answer = decode_handshake(reply.value or b"")
            if answer.mode != Mode.REPLY:
                raise DecodeError("not a handshake's reply")
            noise = self._noise.copy()  # a bad reply must not spoil the attempt for the good one
            payload = decode_noise_payload(noise.read_message(answer.noise))
        except DecodeError as error:
            raise PeerConnectionFailed("a node brought back no valid handshake") from error
        if payload.version != 1:
            raise HandshakeFailed(f"the peer speaks version {payload.version} of the handshake")
        if payload.error != HandshakeError.NONE or payload.udx is None:
            raise HandshakeFailed(f"the peer refused the handshake (error {payload.error})")
        return Shaken(noise, payload, relay, answer.peer_address or relay, reply.to, reply.socket)

    # Paths

    async def _open(self, shaken: Shaken) -> None:
        """Send on the likeliest path, ask the others, and wait for the server's first bytes on any."""
        assert shaken.payload.udx is not None
        self._remote_id = shaken.payload.udx.id
        self._connection.start(shaken.noise)
        candidates = self._candidates(shaken)
        socket, address = self._early_path or (shaken.socket, candidates[0])
        self._stream.connect(socket, self._remote_id, address)
        probes = [asyncio.create_task(self._probe(candidate)) for candidate in candidates if shaken.relayed]
        try:
            async with asyncio.timeout(PATH_TIMEOUT):
                await self._connection.wait_opened()
        except TimeoutError as error:
            raise HolepunchError(
                "the peer answered through a DHT node, but no packet of it arrived: a NAT or firewall stands between"
            ) from error
        except ConnectionClosed as error:
            self._dht.check_usable()  # else we ended it ourselves
            raise PeerConnectionFailed("the peer broke the connection off at once") from error
        finally:
            for probe in probes:
                probe.cancel()

    def _candidates(self, shaken: Shaken) -> list[Address]:
        """Return the addresses where the server may be reached, the likeliest first."""
        named = shaken.payload.addresses4
        if not shaken.relayed:
            return [shaken.server_address]
        candidates: list[Address] = []
        if shaken.client_address[0] == shaken.server_address[0]:  # behind the same NAT, or on the same host
            local = [address for address in named if not IPv4Address(address[0]).is_reserved]
            candidates += sorted(local, key=self._distance)
        elif shaken.payload.firewall == Firewall.OPEN:
            candidates += [address for address in named if IPv4Address(address[0]).is_global]
        return list(dict.fromkeys([*candidates, shaken.server_address]))

    def _distance(self, address: Address) -> int:
        """Return how far an address is from ours: a small number for one in the same network."""
        theirs = int(IPv4Address(address[0]))
        own = self._dht.node.endpoint.network.interfaces()
        return min((theirs ^ int(IPv4Address(host)) for host in own), default=theirs)

    async def _probe(self, address: Address) -> None:
        """Move to an address that answers a ping while nothing has arrived on the present one."""
        try:
            reply = await self._dht.node.rpc.request(address, InternalCommand.PING, internal=True)
        except HyperDHTError:
            return
        if not self._connection.opened and self._stream.core.srtt is None and self._remote_id is not None:
            self._stream.connect(reply.socket, self._remote_id, address)


def _ignore_outcome(task: "asyncio.Task[Any]") -> None:
    """Look at what became of a task that nobody awaits, so that asyncio does not report it as lost."""
    if not task.cancelled():
        task.exception()


async def _next_relay(replies: AsyncIterator[Reply]) -> Reply | None:
    """Return the next node that knows the peer, None when the query has ended."""
    async for reply in replies:
        if reply.value is not None and reply.error == 0:
            return reply
    return None
