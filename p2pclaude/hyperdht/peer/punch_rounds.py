"""Hole punching: the rounds two sides exchange through relays before their probes meet (ring 2).

    client                              relay                server
    round 0: my NAT, your address   ->          ->   its NAT, a token; perhaps a probe at once
    round 1: punching, the token    ->          ->   punching; both send probes (`puncher`)

Payloads are sealed under the handshake's secret. The token proves to each side that the other receives at the address
it claims, before anything is sent there in numbers. Source: hyperdht lib/connect.js, lib/server.js.
"""

import asyncio
import hmac
import logging
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from ..constants import Command, Firewall, HandshakeError, Mode
from ..crypto import HolepunchBox, keyed_hash
from ..encoding import Address
from ..errors import DecodeError, HolepunchError, HyperDHTError, TryLater
from ..node.node import Node
from ..rpc.requests import RELAYED_RETRIES, IncomingRequest
from ..tasks import cancel_all
from .puncher import Puncher
from .router import Answer
from .setup_messages import (
    Holepunch,
    HolepunchPayload,
    RelayedPath,
    decode_holepunch,
    decode_holepunch_payload,
    encode_holepunch,
    encode_holepunch_payload,
)

if TYPE_CHECKING:
    from .announcer import Announcer

log = logging.getLogger(__name__)

SECRET_BYTES: Final = 32
MAX_WAYS: Final = 3  # relays that a round is sent through
SINGLE_PAUSE: Final = 0.5  # seconds at least before a round that must not be repeated without need is repeated
SINGLE_TURNS: Final = 6
SINGLE_TIMEOUT: Final = 3.0  # a late answer is one too
REMOTE_ANALYSIS_PAUSE: Final = 0.5  # what the other side may need to classify its NAT

BOTH_RANDOM: Final = "both sides are behind NATs with random ports; only a relay could help"


class Secrets:
    """What protects the rounds of one handshake: the box and the tokens."""

    def __init__(self, rng: random.Random, holepunch_secret: bytes) -> None:
        self._rng = rng
        self._box = HolepunchBox(holepunch_secret)
        self._token_secret = rng.randbytes(SECRET_BYTES)

    def seal(self, payload: HolepunchPayload) -> bytes:
        """Return a payload as it travels."""
        return self._box.seal(encode_holepunch_payload(payload), self._rng)

    def open(self, data: bytes) -> HolepunchPayload:
        """Return a received payload; DecodeError if it is forged or malformed."""
        return decode_holepunch_payload(self._box.open(data))

    def token(self, address: Address) -> bytes:
        """Return the token that only who receives at the address's host can know."""
        return keyed_hash(address[0].encode(), self._token_secret)


class RoundReply(NamedTuple):
    """What came back for a round: the payload, the server's address as the relay saw it, and the relay."""

    payload: HolepunchPayload
    peer_address: Address
    relay: Address


class ClientHolepunch:
    """The client's side of one attempt; `run` it once."""

    def __init__(
        self,
        node: Node,
        target: bytes,
        secrets: Secrets,
        puncher: Puncher,
        *,
        slot: int,
        relays: tuple[RelayedPath, ...],
        relay_address: Address,
        server_address: Address,
    ) -> None:
        self._node = node
        self._target = target
        self._secrets = secrets
        self._puncher = puncher
        self._slot = slot
        self._relay_address = relay_address
        self._server_address = server_address
        # The server's NAT is open towards its own relays; the one that brought the handshake is known to work.
        first = sorted(relays, key=lambda path: path.relay_address != relay_address)[:MAX_WAYS]
        self._relays = [(path.relay_address, path.peer_address) for path in first]
        self._round = 0

    async def run(self) -> None:
        """Exchange the rounds and send probes until the attempt is over.

        The path shows itself to the puncher meanwhile. Raises HolepunchError with the cause, TryLater when the server
        is busy with other punches.
        """
        token = await self._probe_rounds()
        await self._punch_round(token)
        await self._puncher.wait_exhausted()
        raise HolepunchError("no probe got through the NATs")

    async def _probe_rounds(self) -> bytes | None:
        """Tell each other the NATs' kinds; returns the server's token."""
        puncher = self._puncher
        puncher.open_session(self._server_address)
        reply = await self._probe_round()
        for _ in range(2):
            if puncher.remote.firewall == Firewall.UNKNOWN:
                await asyncio.sleep(REMOTE_ANALYSIS_PAUSE)
            stable = await puncher.analyse(reopen=False) or await puncher.analyse(reopen=True)
            if stable and puncher.remote.firewall != Firewall.UNKNOWN and reply.payload.token is not None:
                break
            reply = await self._probe_round()
        await self._check_kinds()
        if reply.relay == self._relay_address and reply.peer_address != self._server_address:
            self._server_address = reply.peer_address  # the server opened another socket
            puncher.open_session(self._server_address)
        return reply.payload.token

    async def _probe_round(self) -> RoundReply:
        return await self._exchange(self._relays, remote_address=self._server_address)

    async def _check_kinds(self) -> None:
        kinds = self._puncher.nat.firewall, self._puncher.remote.firewall
        if Firewall.UNKNOWN in kinds:
            await self._abort()
            raise HolepunchError("too few nodes answered to tell what kind of NAT stands between")
        if kinds == (Firewall.RANDOM, Firewall.RANDOM):
            await self._abort()
            raise HolepunchError(BOTH_RANDOM)

    async def _punch_round(self, remote_token: bytes | None) -> None:
        """Agree to punch, and begin."""
        puncher = self._puncher
        puncher.nat.freeze()
        if not puncher.may_punch():
            raise TryLater("this node is busy with other hole punches")
        own = (self._relay_address, self._server_address)
        await self._exchange(
            [own, *(way for way in self._relays if way[0] != self._relay_address)],
            in_turn=puncher.needs_random,
            punching=True,
            token=self._secrets.token(self._server_address),
            remote_token=remote_token,
        )
        if not puncher.remote.punching:
            raise HolepunchError("the other side does not punch")
        if not puncher.punch():
            raise HolepunchError("the other side's address could not be verified")

    async def _exchange(
        self,
        ways: Sequence[tuple[Address, Address]],
        *,
        in_turn: bool = False,
        punching: bool = False,
        remote_address: Address | None = None,
        token: bytes | None = None,
        remote_token: bytes | None = None,
    ) -> RoundReply:
        """Send one round through relays and take in what the server says."""
        nat = self._puncher.nat
        payload = HolepunchPayload(
            firewall=nat.firewall,
            round=self._round,
            punching=punching,
            addresses=nat.addresses or None,
            remote_address=remote_address,
            token=token,
            remote_token=remote_token,
        )
        reply = await (self._send_in_turn if in_turn else self._send)(ways, payload)
        self._check_error(reply.payload)
        echoed = token is not None and hmac.compare_digest(reply.payload.remote_token or b"", token)
        self._puncher.update_remote(
            reply.payload.firewall,
            reply.payload.addresses or (),
            reply.payload.punching,
            reply.peer_address[0] if echoed else None,
        )
        return reply

    async def _send(self, ways: Sequence[tuple[Address, Address]], payload: HolepunchPayload) -> RoundReply:
        """Send a round through several relays at once and return the first valid answer.

        A packet lost on one of the four legs then costs no time; a relay that spoils rounds spoils nothing. The server
        takes each copy for a repetition.
        """
        self._round += 1
        sealed = self._secrets.seal(payload)
        failure: HyperDHTError | None = None
        asking = [asyncio.create_task(self._send_through(relay, peer, sealed)) for relay, peer in ways]
        try:
            for answered in asyncio.as_completed(asking):
                try:
                    return await answered
                except HyperDHTError as error:
                    failure = error
            raise HolepunchError("no relay brought back a valid answer of the other side") from failure
        finally:
            cancel_all(asking)

    async def _send_in_turn(self, ways: Sequence[tuple[Address, Address]], payload: HolepunchPayload) -> RoundReply:
        """Send a round through one relay after the other and return the first valid answer.

        For the round that starts random punching: an upstream server takes a copy of it for a second random punch,
        answers TRY_LATER and abandons the one under way.
        """
        self._round += 1
        sealed = self._secrets.seal(payload)
        pause = max(SINGLE_PAUSE, 2 * self._node.rpc.timeouts.get_relayed(1))
        asking: set[asyncio.Task[RoundReply]] = set()
        try:
            for relay, peer in [*ways] * SINGLE_TURNS:
                single = self._send_through(relay, peer, sealed, retries=0, timeout=SINGLE_TIMEOUT)
                asking.add(asyncio.create_task(single))
                if (reply := await _first_answer(asking, pause)) is not None:
                    return reply
            if (reply := await _first_answer(asking, SINGLE_TIMEOUT)) is not None:
                return reply
        finally:
            cancel_all(asking)
        raise HolepunchError("no relay brought back a valid answer of the other side")

    async def _send_through(
        self, relay: Address, peer: Address, sealed: bytes, retries: int = RELAYED_RETRIES, timeout: float | None = None
    ) -> RoundReply:
        message = Holepunch(Mode.FROM_CLIENT, self._slot, sealed, peer)
        reply = await self._node.rpc.request(
            relay,
            Command.PEER_HOLEPUNCH,
            target=self._target,
            value=encode_holepunch(message),
            socket=self._puncher.socket,
            retries=retries,
            timeout=timeout,
        )
        if reply.socket is self._puncher.socket:
            self._puncher.learn(reply.to, reply.source)
        answer = decode_holepunch(reply.value or b"")
        if answer.mode != Mode.REPLY:
            raise DecodeError("not the reply of a round")
        return RoundReply(self._secrets.open(answer.payload), answer.peer_address or relay, relay)

    def _check_error(self, payload: HolepunchPayload) -> None:
        if payload.error == HandshakeError.TRY_LATER:
            raise TryLater("the other side is busy with other hole punches")
        if payload.error != HandshakeError.NONE:
            both_random = payload.firewall == self._puncher.nat.firewall == Firewall.RANDOM
            raise HolepunchError(BOTH_RANDOM if both_random else "the other side gave the hole punch up")

    async def give_up(self) -> None:
        """Tell the server that it need not go on, so that it has room for other punches."""
        payload = HolepunchPayload(error=HandshakeError.ABORTED, round=self._round)
        sealed = self._secrets.seal(payload)
        telling = (self._send_through(relay, peer, sealed, retries=2) for relay, peer in self._relays)
        await asyncio.gather(*telling, return_exceptions=True)

    async def _abort(self) -> None:
        """Tell the server that we give up, so that it need not wait."""
        payload = HolepunchPayload(error=HandshakeError.ABORTED, round=self._round)
        try:
            await self._send(self._relays, payload)
        except HyperDHTError:
            pass  # it will notice by itself


async def _first_answer(asking: "set[asyncio.Task[RoundReply]]", seconds: float) -> RoundReply | None:
    """Wait so long for a valid answer to one of some requests, and forget those that failed."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while asking and (left := until - loop.time()) > 0:
        done, _ = await asyncio.wait(asking, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        asking -= done
        for task in done:
            error = task.exception()
            if error is None:
                return task.result()
            if not isinstance(error, HyperDHTError):
                raise error
    return None


class ServerHolepunch:
    """The server's side of one handshake's hole punching."""

    def __init__(
        self,
        node: Node,
        announcer: "Announcer",
        secrets: Secrets,
        puncher: Puncher,
        on_punch: Callable[[], None],
    ) -> None:
        self._node = node
        self._announcer = announcer
        self._secrets = secrets
        self.puncher = puncher
        self._on_punch = on_punch
        self._round = 0

    async def handle(self, message: Holepunch, request: IncomingRequest) -> Answer | None:
        """Answer a round; None to stay silent, as to everything that is not the client's."""
        peer = message.peer_address
        try:
            payload = self._secrets.open(message.payload)
        except DecodeError:
            return None
        if peer is None or self.puncher.closed:
            return None
        if payload.error != HandshakeError.NONE:
            return self._abort()
        self._learn(payload, peer, request)
        puncher = self.puncher
        stable = await puncher.analyse(reopen=False) or puncher.remote.punching
        if not stable and not await puncher.analyse(reopen=True):
            return self._abort()
        if puncher.closed:
            return None
        if puncher.nat.firewall != Firewall.RANDOM and payload.remote_address in puncher.nat.addresses:
            puncher.probe(peer)  # the client's NAT is open for it: this alone may do
        if puncher.remote.punching:
            if not puncher.may_punch():
                return self._reply(payload, peer, request, HandshakeError.TRY_LATER)
            begins = not puncher.punching and not puncher.exhausted
            if not puncher.punch():
                return self._abort()
            if begins:  # who says it again gets no more time: sockets, and one of few random punches, are held
                self._on_punch()
        if puncher.nat.firewall != Firewall.UNKNOWN:
            puncher.nat.freeze()
        return self._reply(payload, peer, request, HandshakeError.NONE)

    def _learn(self, payload: HolepunchPayload, peer: Address, request: IncomingRequest) -> None:
        if request.socket is self.puncher.socket:
            self.puncher.learn(request.to, request.source)
        if payload.round < self._round:
            return
        self._round = payload.round
        # A relay of ours sees the address a round really comes from; a stranger could name a victim's.
        token = payload.remote_token or b""
        echoed = self._announcer.is_relay(request.source) and hmac.compare_digest(token, self._secrets.token(peer))
        self.puncher.update_remote(
            payload.firewall, payload.addresses or (), payload.punching, peer[0] if echoed else None
        )

    def _reply(
        self, payload: HolepunchPayload, peer: Address, request: IncomingRequest, error: HandshakeError
    ) -> Answer:
        nat = self.puncher.nat
        answer = HolepunchPayload(
            error=error,
            firewall=nat.firewall,
            round=self._round,
            punching=self.puncher.punching,
            addresses=nat.addresses or None,
            token=self._secrets.token(peer) if self._announcer.is_relay(request.source) else None,
            remote_token=payload.token,
        )
        return Answer(self._secrets.seal(answer), self.puncher.socket)

    def _abort(self) -> Answer:
        self.puncher.close()
        # The kind of our NAT tells the client why; upstream leaves it out and ignores it.
        answer = HolepunchPayload(error=HandshakeError.ABORTED, firewall=self.puncher.nat.firewall, round=self._round)
        return Answer(self._secrets.seal(answer), self._node.socket)
