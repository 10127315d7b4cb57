"""A client's way to a server: find it, shake hands through a relay, open the stream (ring 2).

    FIND_PEER -> nodes that know the server -> handshake through two of them at a time -> the server's addresses
    -> pings and hole punching -> the stream, on whichever path the server's first packet arrives

A connection is handed out when the server's first bytes have arrived and decrypted, never before. Source: hyperdht
lib/connect.js.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
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
    TryLater,
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
from .holepunch import RELAYED_RETRIES, RELAYED_TIMEOUT, ClientHolepunch, Secrets
from .noise import NoiseIK
from .puncher import Puncher
from .query import Query
from .requests import Reply

if TYPE_CHECKING:
    from .dht import HyperDHT

log = logging.getLogger(__name__)

PARALLEL_HANDSHAKES: Final = 2
PATH_TIMEOUT: Final = 10.0  # as long as a server keeps the stream of a handshake
LAST_CHANCE: Final = 1.0
MAX_PUNCHES: Final = 3
TRY_LATER_PAUSE: Final = (2.0, 4.0)  # seconds


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


async def connect(
    dht: "HyperDHT", public_key: bytes, key_pair: KeyPair, relay_addresses: Sequence[Address], timeout: float
) -> Connection:
    """Connect within `timeout` seconds, in several attempts if NATs make it a matter of luck.

    Raises PeerNotFound, PeerConnectionFailed, HandshakeFailed, HolepunchError, Timeout, Suspended or Destroyed: the
    true cause. Nothing of a failed attempt is left behind.
    """
    cause: HolepunchError | None = None
    avoid: set[Address] = set()  # relays that led to no path: another may
    failures = 0
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    return await Attempt(dht, public_key, key_pair, relay_addresses, avoid).run()
                except TryLater as error:
                    cause = error
                    await asyncio.sleep(dht.rng.uniform(*TRY_LATER_PAUSE))
                except HolepunchError as error:
                    cause = error
                    failures += 1
                    if failures == MAX_PUNCHES:
                        raise
    except TimeoutError as error:
        if isinstance(error, HyperDHTError):
            raise
        if cause is not None:
            raise cause from None
        raise Timeout(f"not connected after {timeout:g} seconds") from error


class Attempt:
    """One handshake and the search for a path; `run` it once. The relay it took is added to `avoid`."""

    def __init__(
        self,
        dht: "HyperDHT",
        public_key: bytes,
        key_pair: KeyPair,
        relay_addresses: Sequence[Address],
        avoid: set[Address],
    ) -> None:
        self._dht = dht
        self._public_key = public_key
        self._target = blake2b(public_key)
        self._relay_addresses = relay_addresses
        self._avoid = avoid
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
        self._open_address = dht.node.remote_address()
        self._remote_id: int | None = None
        self._early_path: tuple[Socket, Address] | None = None
        self._stream.firewall = self._firewall

    async def run(self) -> Connection:
        """Return the connection, open; raises as `connect` does, but knows no deadline."""
        try:
            shaken = await self._shake_hands()
            self._avoid.add(shaken.relay_address)
            await self._open(shaken)
        except BaseException:
            self._connection.abort()
            raise
        self._dht.remember_relays(self._public_key, shaken.payload.relay_addresses or (shaken.relay_address,))
        return self._connection

    def _firewall(self, socket: Socket, source: Address) -> bool:
        """Take the path the server's first packet shows; one that comes before its handshake is kept in mind."""
        if self._remote_id is None:
            self._early_path = self._early_path or (socket, source)
        else:
            self._take_path(socket, source)
        return True

    # Handshake

    async def _shake_hands(self) -> Shaken:
        """Return the first valid handshake that any relay brings back."""
        message = self._noise.write_message(encode_noise_payload(self._payload()))
        failures: list[HyperDHTError] = []
        query = self._dht.node.query(Command.FIND_PEER, self._target, retries=3)
        try:
            shaken = await self._first_of(message, query, self._known_relays(), failures)
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
            firewall=Firewall.UNKNOWN if self._open_address is None else Firewall.OPEN,
            addresses4=self._dht.own_addresses(),
            udx=UdxInfo(reusable_socket=False, id=self._stream.id),
            secret_stream=True,
        )

    async def _first_of(
        self, message: bytes, query: Query, known: Sequence[Address], failures: list[HyperDHTError]
    ) -> Shaken | None:
        """Shake hands through `known` relays and those a query finds, a few at a time, until one succeeds."""
        waiting: list[Address] = sorted(known, key=self._avoid.__contains__)
        tried: set[Address] = set()
        running: list[asyncio.Task[Shaken]] = []  # in order, so that a simulation replays
        replies = aiter(query)
        search: asyncio.Task[Reply | None] | None = asyncio.create_task(_next_relay(replies))
        try:
            while True:
                # A relay that led nowhere before is asked when no other one is to be had.
                while waiting and len(running) < PARALLEL_HANDSHAKES and (waiting[0] not in self._avoid or not search):
                    relay = waiting.pop(0)
                    if relay not in tried:
                        tried.add(relay)
                        running.append(asyncio.create_task(self._shake_hands_through(relay, message)))
                pending = [*running] if search is None else [*running, search]
                if not pending:
                    return None
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if search is not None and search.done():
                    found = search.result()
                    search = None if found is None else asyncio.create_task(_next_relay(replies))
                    waiting.extend(() if found is None else (found.source,))
                    waiting.sort(key=self._avoid.__contains__)
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
            timeout=RELAYED_TIMEOUT,
            retries=RELAYED_RETRIES,
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
        """Try all paths at once and wait for the server's first bytes on any."""
        assert shaken.payload.udx is not None
        self._remote_id = shaken.payload.udx.id
        if self._early_path is not None:
            self._take_path(*self._early_path)
        self._connection.start(shaken.noise)
        puncher = await self._make_puncher(shaken)
        candidates = self._candidates(shaken)
        if puncher is None and self._early_path is None:
            self._take_path(shaken.socket, candidates[0])  # nothing to lose by sending at once
        probes = [asyncio.create_task(self._probe(candidate)) for candidate in candidates if shaken.relayed]
        punch = None if puncher is None else asyncio.create_task(self._punch(shaken, puncher))
        try:
            await self._wait_opened(punch)
        finally:
            for task in (*probes, *(() if punch is None else (punch,))):
                task.cancel()
                task.add_done_callback(_ignore_outcome)
            if puncher is not None:
                puncher.hand_over(self._stream)
        if self._stream.own_socket is not None:
            self._connection.how = "punched"

    async def _wait_opened(self, punch: "asyncio.Task[None] | None") -> None:
        """Wait until the connection is open, the hole punching has failed or too much time has passed."""
        opened = asyncio.create_task(self._connection.wait_opened())
        try:
            waiting = {opened} if punch is None else {opened, punch}
            await asyncio.wait(
                waiting, timeout=PATH_TIMEOUT if punch is None else None, return_when=asyncio.FIRST_COMPLETED
            )
            if not opened.done():  # a last chance for what may be under way
                await asyncio.wait({opened}, timeout=LAST_CHANCE)
            if opened.done():
                opened.result()
                return
        except ConnectionClosed as error:
            self._dht.check_usable()  # else we ended it ourselves
            raise PeerConnectionFailed("the peer broke the connection off at once") from error
        finally:
            opened.cancel()
        cause = None if punch is None or punch.cancelled() else punch.exception()
        if isinstance(cause, HolepunchError):
            raise cause
        raise HolepunchError(
            "the peer answered through a DHT node, but no packet of it arrived: a NAT or firewall stands between"
        ) from cause

    async def _make_puncher(self, shaken: Shaken) -> Puncher | None:
        """Return an open puncher if there is a hole to punch; an open side needs none, the other one comes to it."""
        holepunch = shaken.payload.holepunch
        if not shaken.relayed or self._open_address is not None or holepunch is None or not holepunch.relays:
            return None
        puncher = Puncher(
            self._dht.node, self._dht.rng, self._dht.throttle, is_initiator=True, on_path=self._take_path
        )
        await puncher.open()
        return puncher

    async def _punch(self, shaken: Shaken, puncher: Puncher) -> None:
        assert shaken.payload.holepunch is not None
        await ClientHolepunch(
            self._dht,
            self._target,
            Secrets(self._dht, shaken.noise.holepunch_secret),
            puncher,
            slot=shaken.payload.holepunch.id,
            relays=shaken.payload.holepunch.relays,
            relay_address=shaken.relay_address,
            server_address=shaken.server_address,
        ).run()

    def _take_path(self, socket: Socket, address: Address) -> None:
        """Send there from now on, unless the server has answered on another path already."""
        if not self._connection.opened and self._remote_id is not None:
            self._stream.connect(socket, self._remote_id, address)

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
        if self._stream.core.srtt is None:
            self._take_path(reply.socket, address)


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
