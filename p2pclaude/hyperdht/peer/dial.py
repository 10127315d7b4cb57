"""A client's way to a server: find it, shake hands through a relay, open the stream (ring 2).

    FIND_PEER -> nodes that know the server -> handshake (`client_handshake`) -> the server's addresses -> pings and
    hole punching -> the stream, on whichever path the server's first packet arrives

A connection is handed out when the server's first bytes have arrived and decrypted, never before; the own first bytes
may leave earlier, with the first packet on every path. Source: hyperdht lib/connect.js.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..constants import TOKEN_BYTES, Firewall, InternalCommand
from ..crypto import KeyPair
from ..crypto import hash as blake2b
from ..encoding import Address, ipv4_number
from ..errors import (
    ConnectionClosed,
    HolepunchError,
    HyperDHTError,
    PeerConnectionFailed,
    Timeout,
    TryLater,
)
from ..secure.connection import Connection
from ..secure.noise import NoiseIK
from ..tasks import cancel_all
from .attempt_life import AttemptLife, Event
from .client_handshake import Handshaking, Shaken
from .context import PeerContext
from .paths import Paths
from .setup_messages import NoisePayload, RelayThrough, UdxInfo, encode_noise_payload

if TYPE_CHECKING:
    from .puncher import Puncher

log = logging.getLogger(__name__)

PATH_TIMEOUT: Final = 10.0  # as long as a server keeps the stream of a handshake
LAST_CHANCE: Final = 1.0
NEAR_HEAD_START: Final = 0.02  # seconds for the first packet to reach a neighbour, before a hole is punched to it
RESERVED: Final = ipv4_number("240.0.0.0")  # and above
MAX_CANDIDATES: Final = 32  # addresses of a server that are tried; a host may have many interfaces
TRY_LATER_PAUSE: Final = (2.0, 4.0)  # seconds


async def connect(
    context: PeerContext,
    public_key: bytes,
    key_pair: KeyPair,
    relay_addresses: Sequence[Address],
    relay_through: bytes | None,
    early_data: bytes,
    timeout: float,
) -> Connection:
    """Connect within `timeout` seconds, in several attempts if NATs make it a matter of luck.

    `early_data` are the first bytes of every attempt's stream.
    Raises PeerNotFound, TooFewNodes, PeerConnectionFailed, HandshakeFailed, HolepunchError, Timeout, Suspended or
    Destroyed: the true cause. Nothing of a failed attempt is left behind.
    """
    cause: HolepunchError | None = None
    avoid: set[Address] = set()  # relays that led to no path: another may
    life = AttemptLife()
    latest = asyncio.get_running_loop().time() + timeout - min(LAST_CHANCE, timeout / 10)
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    attempt = Attempt(
                        context, life, public_key, key_pair, relay_addresses, relay_through, early_data, avoid, latest
                    )
                    return await attempt.run()
                except TryLater as error:
                    cause = error
                    life.see(Event.TOLD_TO_WAIT)
                    await asyncio.sleep(context.rng.uniform(*TRY_LATER_PAUSE))
                    life.see(Event.RESTED)
                except HolepunchError as error:
                    cause = error
                    life.see_no_way()
                    if life.is_over:
                        raise
    except TimeoutError as error:
        if isinstance(error, HyperDHTError):
            raise
        if cause is not None:
            raise cause from None
        raise Timeout(f"not connected after {timeout:g} seconds") from error
    finally:
        life.give_up()


class Attempt:
    """One handshake and the search for a path; `run` it once. The relay it took is added to `avoid`."""

    def __init__(
        self,
        context: PeerContext,
        life: AttemptLife,
        public_key: bytes,
        key_pair: KeyPair,
        relay_addresses: Sequence[Address],
        relay_through: bytes | None,
        early_data: bytes,
        avoid: set[Address],
        latest: float,
    ) -> None:
        self._context = context
        self._life = life
        self._node = context.node
        self._public_key = public_key
        self._target = blake2b(public_key)
        self._relay_addresses = relay_addresses
        self._relay_through = (
            None if relay_through is None else RelayThrough(relay_through, context.rng.randbytes(TOKEN_BYTES))
        )
        self._early_data = early_data
        self._avoid = avoid
        self._noise = NoiseIK.initiator(key_pair, public_key, KeyPair.generate(context.rng))
        self._stream = context.streams.create()
        self._connection = Connection(
            self._stream,
            key_pair.public_key,
            public_key,
            is_initiator=True,
            keep_alive=context.keep_alive,
            rng=context.rng,
        )
        self._open_address = context.node.remote_address()
        self._paths = Paths(context.node, self._stream, self._connection)
        self._paths.latest = latest

    async def run(self) -> Connection:
        """Return the connection, open; raises as `connect` does, but knows no deadline."""
        try:
            handshaking = Handshaking(self._node, self._public_key, self._noise, self._hints(), self._avoid)
            shaken = await self._shake_hands(handshaking)
            self._avoid.add(shaken.relay_address)
            await self._open(shaken)
        except ConnectionClosed as error:
            self._context.check_usable()  # else we ended it ourselves
            self._life.see(Event.BROKEN_OFF)
            raise PeerConnectionFailed("the peer broke the connection off at once") from error
        except BaseException:
            self._connection.abort()
            raise
        assert self._connection.opened
        self._life.see(Event.OPENED)
        self._remember(shaken)
        return self._connection

    async def _shake_hands(self, handshaking: Handshaking) -> Shaken:
        try:
            shaken = await handshaking.run(encode_noise_payload(self._payload()))
        except HyperDHTError:
            self._life.see(Event.UNANSWERED)
            raise
        self._life.see(Event.SHAKEN)
        return shaken

    def _hints(self) -> tuple[Address, ...]:
        """Return the nodes that may know the server, or be it."""
        forward = self._context.router.get(self._target, asyncio.get_running_loop().time())
        own = () if forward is None or forward.relay is None else (forward.relay,)
        return (*self._relay_addresses, *own, *self._context.known_relays.of(self._public_key))

    def _remember(self, shaken: Shaken) -> None:
        """Keep what led to the server, and where it answers by itself: at an address that it names and we see."""
        seen = self._connection.remote_address
        named = [address for address in shaken.payload.addresses4 if seen is not None and address[0] == seen[0]]
        direct = named[:1] if shaken.relayed else [shaken.relay_address]
        self._context.known_relays.remember(
            self._public_key, (*direct, *(shaken.payload.relay_addresses or (shaken.relay_address,)))
        )

    def _payload(self) -> NoisePayload:
        return NoisePayload(
            firewall=Firewall.UNKNOWN if self._open_address is None else Firewall.OPEN,
            addresses4=self._context.own_addresses(),
            udx=UdxInfo(reusable_socket=False, id=self._stream.id),
            secret_stream=True,
            relay_through=self._relay_through,
        )

    # Paths

    async def _open(self, shaken: Shaken) -> None:
        """Try all paths at once and wait for the server's first bytes on any."""
        assert shaken.payload.udx is not None
        paths = self._paths
        paths.remote_id = shaken.payload.udx.id
        if paths.early is not None:
            paths.take(*paths.early)
        self._connection.start(shaken.noise, self._early_data)
        candidates = self._candidates(shaken)
        if paths.early is None:
            paths.take(shaken.socket, candidates[0])  # nothing to lose by sending at once
        if shaken.relayed and _is_near(shaken) and await self._opens_within(NEAR_HEAD_START):
            self._settle(None, ())
            return
        self._life.see(Event.HELP_NEEDED)
        puncher = await self._make_puncher(shaken)
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
        self._settle(puncher, efforts)

    async def _opens_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._connection.wait_opened()
        except (TimeoutError, ConnectionClosed):
            return False  # `_wait_opened` says why
        return True

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
        from .puncher import Puncher  # here and below: most connections need no hole

        puncher = Puncher(
            self._node, self._context.rng, self._context.throttle, is_initiator=True, on_path=self._paths.hear_probe
        )
        try:
            await puncher.open()
        except OSError:  # too many open files: there may be another way
            log.warning("no socket for hole punching is to be had")
            return None
        return puncher

    async def _punch(self, shaken: Shaken, puncher: Puncher) -> None:
        from .punch_rounds import ClientHolepunch, Secrets

        assert shaken.payload.holepunch is not None
        holepunch = ClientHolepunch(
            self._node,
            self._target,
            Secrets(self._context.rng, shaken.noise.holepunch_secret),
            puncher,
            slot=shaken.payload.holepunch.id,
            relays=shaken.payload.holepunch.relays,
            relay_address=shaken.relay_address,
            server_address=shaken.server_address,
        )
        try:
            await self._run_holepunch(holepunch.run)
        finally:
            if not self._connection.opened:
                self._node.spawn(holepunch.give_up())

    async def _run_holepunch(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                return await run()
            except TryLater:
                if not self._paths.on_relay:  # else there is time
                    raise
                await asyncio.sleep(self._context.rng.uniform(*TRY_LATER_PAUSE))

    async def _link(self, through: RelayThrough, *, is_initiator: bool) -> None:
        """Meet the server at a blind relay, and give it time to show that it is there."""
        from ..relay.relay_client import open_link

        link = await open_link(self._context.connect, through.public_key, through.token, is_initiator, self._stream)
        self._paths.use_relay(link)
        await asyncio.sleep(PATH_TIMEOUT)

    def _settle(self, puncher: Puncher | None, efforts: Sequence[asyncio.Task[None]]) -> None:
        """Let the way settle in the background, and end the efforts then."""

        def end(_: asyncio.Task[None]) -> None:
            cancel_all(efforts)
            if puncher is not None:
                puncher.close(keep=self._stream.own_socket)

        # A callback: a task that is cancelled before its first turn (the node may leave at once) gets to no `finally`.
        self._node.spawn(self._paths.settle(puncher)).add_done_callback(end)

    def _candidates(self, shaken: Shaken) -> list[Address]:
        """Return the addresses where the server may be reached, the likeliest first."""
        named = shaken.payload.addresses4
        if not shaken.relayed:
            return [shaken.server_address]
        candidates: list[Address] = []
        if _is_near(shaken):
            local = [address for address in named if ipv4_number(address[0]) < RESERVED]
            candidates += sorted(local, key=self._distance)
        elif shaken.payload.firewall == Firewall.OPEN:
            from ipaddress import IPv4Address

            candidates += [address for address in named if IPv4Address(address[0]).is_global]
        return list(dict.fromkeys([*candidates[:MAX_CANDIDATES], shaken.server_address]))

    def _distance(self, address: Address) -> int:
        """Return how far an address is from ours: a small number for one in the same network."""
        theirs = ipv4_number(address[0])
        own = self._node.endpoint.network.interfaces()
        return min((theirs ^ ipv4_number(host) for host in own), default=theirs)

    async def _probe(self, address: Address) -> None:
        """Move to an address that answers a ping while nothing has arrived on the present one."""
        try:
            reply = await self._node.rpc.request(address, InternalCommand.PING, internal=True)
        except HyperDHTError:
            return
        if not self._stream.acknowledged:
            self._paths.take(reply.socket, address)


def _is_near(shaken: Shaken) -> bool:
    """Tell whether both sides show the same host to the world: behind the same NAT, or on one machine."""
    return shaken.client_address[0] == shaken.server_address[0]
