"""A client's way to a server: find it, shake hands through a relay, open the stream (ring 2).

    FIND_PEER -> nodes that know the server -> handshake through two of them at a time -> the server's addresses
    -> pings and hole punching -> the stream, on whichever path the server's first packet arrives

A connection is handed out when the server's first bytes have arrived and decrypted, never before. Source: hyperdht
lib/connect.js.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, Final

from .connection import Connection
from .constants import TOKEN_BYTES, Command, Firewall, HandshakeError, InternalCommand, Mode
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
    RelayThrough,
    UdxInfo,
    decode_handshake,
    decode_noise_payload,
    encode_handshake,
    encode_noise_payload,
)
from .holepunch import RELAYED_RETRIES, ClientHolepunch, Secrets
from .node import Node
from .noise import NoiseIK
from .paths import Paths
from .puncher import Puncher
from .query import Query
from .relay import open_link
from .tasks import cancel_all

if TYPE_CHECKING:
    from .dht import HyperDHT

log = logging.getLogger(__name__)

PARALLEL_HANDSHAKES: Final = 3
HANDSHAKES: Final = 3  # through all relays, while answers get lost
LOOKUPS: Final = 3  # while answers get lost
ENOUGH_RELAYS: Final = 3  # as many as a server has
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
    dht: "HyperDHT",
    public_key: bytes,
    key_pair: KeyPair,
    relay_addresses: Sequence[Address],
    relay_through: bytes | None,
    timeout: float,
) -> Connection:
    """Connect within `timeout` seconds, in several attempts if NATs make it a matter of luck.

    Raises PeerNotFound, PeerConnectionFailed, HandshakeFailed, HolepunchError, Timeout, Suspended or Destroyed: the
    true cause. Nothing of a failed attempt is left behind.
    """
    cause: HolepunchError | None = None
    avoid: set[Address] = set()  # relays that led to no path: another may
    failures = 0
    latest = asyncio.get_running_loop().time() + timeout - min(LAST_CHANCE, timeout / 10)
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    attempt = Attempt(dht, public_key, key_pair, relay_addresses, relay_through, avoid, latest)
                    return await attempt.run()
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


class RelaySearch:
    """Finds the nodes that know a peer; the search begins with the first `next`."""

    def __init__(self, node: Node, target: bytes) -> None:
        self._node = node
        self._target = target
        self._found: set[Address] = set()
        self._lookups = 1
        self._query = self._look_up()

    @property
    def is_lossy(self) -> bool:
        """Whether an answer of the last lookup got lost."""
        return self._query.resends > 0

    def _look_up(self) -> Query:
        return self._node.query(Command.FIND_PEER, self._target, retries=3)

    async def next(self) -> Address | None:
        """Return another node that knows the peer, None when there is none.

        Looks again when answers got lost: nodes that know the peer are few, and theirs may be among them.
        """
        while True:
            async for reply in self._query:
                if reply.value is not None and reply.error == 0 and reply.source not in self._found:
                    self._found.add(reply.source)
                    return reply.source
            if not self._query.resends or len(self._found) >= ENOUGH_RELAYS or self._lookups == LOOKUPS:
                return None
            self._lookups += 1
            self._query = self._look_up()

    def cancel(self) -> None:
        """End the search."""
        self._query.cancel()


class Attempt:
    """One handshake and the search for a path; `run` it once. The relay it took is added to `avoid`."""

    def __init__(
        self,
        dht: "HyperDHT",
        public_key: bytes,
        key_pair: KeyPair,
        relay_addresses: Sequence[Address],
        relay_through: bytes | None,
        avoid: set[Address],
        latest: float,
    ) -> None:
        self._dht = dht
        self._public_key = public_key
        self._target = blake2b(public_key)
        self._relay_addresses = relay_addresses
        self._relay_through = (
            None if relay_through is None else RelayThrough(relay_through, dht.rng.randbytes(TOKEN_BYTES))
        )
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
        self._paths = Paths(dht.node, self._stream, self._connection)
        self._paths.latest = latest

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

    # Handshake

    async def _shake_hands(self) -> Shaken:
        """Return the first valid handshake that any relay brings back."""
        message = self._noise.write_message(encode_noise_payload(self._payload()))
        failures: list[HyperDHTError] = []
        for _ in range(HANDSHAKES):
            search = RelaySearch(self._dht.node, self._target)
            try:
                shaken = await self._first_of(message, search, self._known_relays(), failures)
            finally:
                search.cancel()
            if shaken is not None:
                return shaken
            if not search.is_lossy or not failures or not all(isinstance(failure, Timeout) for failure in failures):
                break
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
            relay_through=self._relay_through,
        )

    async def _first_of(
        self, message: bytes, search: "RelaySearch", known: Sequence[Address], failures: list[HyperDHTError]
    ) -> Shaken | None:
        """Shake hands through `known` relays and those a search finds, a few at a time, until one succeeds."""
        waiting: list[Address] = sorted(known, key=self._avoid.__contains__)
        tried: set[Address] = set()
        running: list[asyncio.Task[Shaken]] = []  # in order, so that a simulation replays
        finding: asyncio.Task[Address | None] | None = asyncio.create_task(search.next())
        try:
            while True:
                # A relay that led nowhere before is asked when no other one is to be had.
                while waiting and len(running) < PARALLEL_HANDSHAKES and (waiting[0] not in self._avoid or not finding):
                    relay = waiting.pop(0)
                    if relay not in tried:
                        tried.add(relay)
                        running.append(asyncio.create_task(self._shake_hands_through(relay, message)))
                pending = [*running] if finding is None else [*running, finding]
                if not pending:
                    return None
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if finding is not None and finding.done():
                    found = finding.result()
                    finding = None if found is None else asyncio.create_task(search.next())
                    waiting.extend(() if found is None else (found,))
                    waiting.sort(key=self._avoid.__contains__)
                for task in [task for task in running if task.done()]:
                    running.remove(task)
                    if (error := task.exception()) is None:
                        return task.result()
                    if not isinstance(error, HyperDHTError):
                        raise error
                    failures.append(error)
        finally:
            cancel_all((*running, *(() if finding is None else (finding,))))

    async def _shake_hands_through(self, relay: Address, message: bytes) -> Shaken:
        reply = await self._dht.node.rpc.request(
            relay,
            Command.PEER_HANDSHAKE,
            target=self._target,
            value=encode_handshake(Handshake(Mode.FROM_CLIENT, message)),
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
        paths = self._paths
        paths.remote_id = shaken.payload.udx.id
        if paths.early is not None:
            paths.take(*paths.early)
        self._connection.start(shaken.noise)
        puncher = await self._make_puncher(shaken)
        candidates = self._candidates(shaken)
        if puncher is None and paths.early is None:
            paths.take(shaken.socket, candidates[0])  # nothing to lose by sending at once
        probes = [asyncio.create_task(self._probe(candidate)) for candidate in candidates if shaken.relayed]
        efforts = [asyncio.create_task(effort) for effort in self._efforts(shaken, puncher)]
        try:
            await self._wait_opened(efforts)
        except BaseException:
            self._connection.abort()
            if puncher is not None:
                puncher.hand_over(self._stream)  # the server is told that this is over
            cancel_all(efforts)
            raise
        finally:
            cancel_all(probes)
        self._dht.node.spawn(self._settle(puncher, efforts))

    def _efforts(self, shaken: Shaken, puncher: Puncher | None) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield what may lead to a path; it has failed when the last of them ends."""
        if puncher is not None:
            yield self._punch(shaken, puncher)
        else:
            yield asyncio.sleep(PATH_TIMEOUT)
        if (through := shaken.payload.relay_through) is not None:
            yield self._link(through, is_initiator=False)
        elif self._relay_through is not None:
            yield self._link(self._relay_through, is_initiator=True)

    async def _wait_opened(self, efforts: Sequence[asyncio.Task[None]]) -> None:
        """Wait until the connection is open, or all efforts have come to nothing."""
        opened = asyncio.create_task(self._connection.wait_opened())
        pending = set(efforts)
        try:
            while pending and not opened.done():
                _, rest = await asyncio.wait({opened, *pending}, return_when=asyncio.FIRST_COMPLETED)
                pending &= rest
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
        causes = [task.exception() for task in efforts]
        raise next(
            (cause for cause in causes if isinstance(cause, HolepunchError)),
            HolepunchError(
                "the peer answered through a DHT node, but no packet of it arrived: a NAT or firewall stands between"
            ),
        )

    async def _make_puncher(self, shaken: Shaken) -> Puncher | None:
        """Return an open puncher if there is a hole to punch; an open side needs none, the other one comes to it."""
        holepunch = shaken.payload.holepunch
        if not shaken.relayed or self._open_address is not None or holepunch is None or not holepunch.relays:
            return None
        puncher = Puncher(
            self._dht.node, self._dht.rng, self._dht.throttle, is_initiator=True, on_path=self._paths.hear_probe
        )
        await puncher.open()
        return puncher

    async def _punch(self, shaken: Shaken, puncher: Puncher) -> None:
        assert shaken.payload.holepunch is not None
        holepunch = ClientHolepunch(
            self._dht,
            self._target,
            Secrets(self._dht, shaken.noise.holepunch_secret),
            puncher,
            slot=shaken.payload.holepunch.id,
            relays=shaken.payload.holepunch.relays,
            relay_address=shaken.relay_address,
            server_address=shaken.server_address,
        )
        try:
            await self._run_holepunch(holepunch)
        finally:
            if not self._connection.opened:
                self._dht.node.spawn(holepunch.give_up())

    async def _run_holepunch(self, holepunch: ClientHolepunch) -> None:
        while True:
            try:
                return await holepunch.run()
            except TryLater:
                if not self._paths.on_relay:  # else there is time
                    raise
                await asyncio.sleep(self._dht.rng.uniform(*TRY_LATER_PAUSE))

    async def _link(self, through: RelayThrough, *, is_initiator: bool) -> None:
        """Meet the server at a blind relay, and give it time to show that it is there."""
        link = await open_link(self._dht, through.public_key, through.token, is_initiator, self._stream)
        self._paths.use_relay(link)
        await asyncio.sleep(PATH_TIMEOUT)

    async def _settle(self, puncher: Puncher | None, efforts: Sequence[asyncio.Task[None]]) -> None:
        try:
            await self._paths.settle(puncher)
        finally:
            cancel_all(efforts)
            if puncher is not None:
                puncher.close(keep=self._stream.own_socket)

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
        if not self._stream.acknowledged:
            self._paths.take(reply.socket, address)
