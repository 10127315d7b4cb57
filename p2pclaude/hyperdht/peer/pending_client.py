"""A client whose handshake is answered and whose first packet has yet to come (ring 2).

`server` makes one for each welcome handshake: a stream that waits for the client on any path, and behind a NAT a
puncher that makes one. Source: hyperdht lib/server.js.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from ..constants import TOKEN_BYTES, Firewall
from ..encoding import Address, ipv4_number
from ..errors import ConnectionClosed, HyperDHTError
from ..net.sockets import Socket
from ..relay.relay_client import open_link
from ..rpc.requests import IncomingRequest
from ..secure.connection import Connection
from ..secure.noise import NoiseIK
from .context import PeerContext
from .paths import Paths
from .punch_rounds import Secrets, ServerHolepunch
from .puncher import Puncher
from .router import Answer
from .setup_messages import Handshake, Holepunch, NoisePayload, RelayThrough

if TYPE_CHECKING:
    from .announcer import Announcer

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT: Final = 10.0  # for the client's first packet
PUNCH_TIMEOUT: Final = 40.0  # once probes are being sent; random ports take up to 35 s


class PendingClient:
    """One answered handshake, from the answer to the client's first packet."""

    def __init__(
        self,
        context: PeerContext,
        announcer: "Announcer",
        public_key: bytes,
        noise: NoiseIK,
        relay_through: bytes | None,
    ) -> None:
        self._context = context
        self._announcer = announcer
        self._noise = noise
        self._stream = context.streams.create()
        self._puncher: Puncher | None = None
        self._holepunch: ServerHolepunch | None = None
        self._deadline: asyncio.Timeout | None = None
        self._linking: asyncio.Task[None] | None = None
        self.relay_through = (
            None if relay_through is None else RelayThrough(relay_through, context.rng.randbytes(TOKEN_BYTES))
        )
        """The blind relay to meet the client at, for the answer."""
        self.socket: Socket | None = None
        """The socket the answer must leave from, so that the relay sees its NAT mapping; None for any."""
        self.connection = Connection(
            self._stream,
            public_key,
            noise.remote_public_key,
            is_initiator=False,
            keep_alive=context.keep_alive,
            rng=context.rng,
        )
        self._paths = Paths(context.node, self._stream, self.connection)

    @property
    def stream_id(self) -> int:
        """The id the client shall send to."""
        return self._stream.id

    async def prepare(self, payload: NoisePayload, message: Handshake, request: IncomingRequest) -> None:
        """Open a socket to punch from, if there will be a hole to punch."""
        open_here = self._context.node.remote_address() is not None
        if message.peer_address is None or payload.firewall == Firewall.OPEN or open_here:
            return
        self._puncher = Puncher(self._context.node, self._context.rng, self._context.throttle, is_initiator=False)
        await self._puncher.open()
        if not self._is_local(payload, message.peer_address, request):
            self.socket = self._puncher.socket

    def _is_local(self, payload: NoisePayload, client: Address, request: IncomingRequest) -> bool:
        """Tell whether the client seems to be in our own network; then the usual socket must stay its goal."""
        if client[0] != request.to[0]:
            return False
        from ipaddress import IPv4Address  # here: clients never need it

        own = {_network(address) for address in self._context.own_addresses()}
        return any(_network(address) in own for address in payload.addresses4 if IPv4Address(address[0]).is_private)

    def start(self, payload: NoisePayload, message: Handshake, request: IncomingRequest) -> None:
        """Begin to listen for the client, and go towards it where the way is known. Call it with keys complete."""
        assert payload.udx is not None
        self._paths.remote_id = payload.udx.id
        self.connection.start(self._noise)
        if self._puncher is not None:
            node, secrets = self._context.node, Secrets(self._context.rng, self._noise.holepunch_secret)
            self._holepunch = ServerHolepunch(node, self._announcer, secrets, self._puncher, self._on_punch)
        if message.peer_address is None:
            self._paths.take(request.socket, request.source)
        elif payload.firewall == Firewall.OPEN or message.peer_address[0] in dict(payload.addresses4):
            # No NAT changes the client's address: if nothing else holds our first packet up, it comes with the answer.
            self._paths.take(self.socket or self._context.node.socket, message.peer_address)
        elif self.relay_through is not None:
            self._linking = asyncio.create_task(self._link(self.relay_through, is_initiator=True))
        elif payload.relay_through is not None:
            self._linking = asyncio.create_task(self._link(payload.relay_through, is_initiator=False))

    async def handle_holepunch(self, message: Holepunch, request: IncomingRequest) -> Answer | None:
        """Answer a hole punching round."""
        return None if self._holepunch is None else await self._holepunch.handle(message, request)

    def _on_punch(self) -> None:
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time() + PUNCH_TIMEOUT)

    async def wait_opened(self) -> bool:
        """Wait for the client; False, and nothing left behind, if it does not come in time."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT) as self._deadline:
                if self._linking is not None:
                    self._on_punch()
                await self.connection.wait_opened()
        except (TimeoutError, ConnectionClosed):
            self.connection.abort()
            return False
        finally:
            self._deadline = None
            if not self.connection.opened:
                self.close()
        return True

    async def settle(self) -> None:
        """Wait until the way is settled, after `wait_opened`."""
        try:
            await self._paths.settle(self._puncher)
        finally:
            self.close()

    def close(self) -> None:
        """Stop looking for a way; the stream keeps the one it has."""
        if self._puncher is not None:
            self._puncher.hand_over(self._stream)
            self._holepunch = None  # it knows us
        if self._linking is not None:
            self._linking.cancel()

    async def _link(self, through: RelayThrough, *, is_initiator: bool) -> None:
        """Meet the client at a blind relay."""
        try:
            link = await open_link(self._context.connect, through.public_key, through.token, is_initiator, self._stream)
        except HyperDHTError as error:
            log.debug("no way through the relay: %s", error)
        else:
            self._paths.use_relay(link)


def _network(address: Address) -> int:
    """Return the /16 of an address: upstream takes hosts that share as much for neighbours."""
    return ipv4_number(address[0]) >> 16
