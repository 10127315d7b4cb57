"""A client whose handshake is answered and whose first packet has yet to come (ring 2).

`server` makes one for each welcome handshake: a stream that waits for the client on any path, and behind a NAT a
puncher that makes one. Source: hyperdht lib/server.js.
"""

import asyncio
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final

from .connection import Connection
from .constants import Firewall
from .encoding import Address
from .endpoint import Socket
from .errors import ConnectionClosed
from .handshakes import Handshake, Holepunch, NoisePayload
from .holepunch import Secrets, ServerHolepunch
from .noise import NoiseIK
from .puncher import Puncher
from .requests import IncomingRequest
from .router import Answer

if TYPE_CHECKING:
    from .announcer import Announcer
    from .dht import HyperDHT

HANDSHAKE_TIMEOUT: Final = 10.0  # for the client's first packet
SETTLE_INTERVAL: Final = 0.1
PUNCH_TIMEOUT: Final = 40.0  # once probes are being sent; random ports take up to 35 s


class PendingClient:
    """One answered handshake, from the answer to the client's first packet."""

    def __init__(self, dht: "HyperDHT", announcer: "Announcer", public_key: bytes, noise: NoiseIK) -> None:
        self._dht = dht
        self._announcer = announcer
        self._noise = noise
        self._stream = dht.endpoint.streams.create()
        self._puncher: Puncher | None = None
        self._holepunch: ServerHolepunch | None = None
        self._deadline: asyncio.Timeout | None = None
        self._remote_id = 0
        self.socket: Socket | None = None
        """The socket the answer must leave from, so that the relay sees its NAT mapping; None for any."""
        self.connection = Connection(
            self._stream,
            public_key,
            noise.remote_public_key,
            is_initiator=False,
            keep_alive=dht.connection_keep_alive,
            rng=dht.rng,
        )

    @property
    def stream_id(self) -> int:
        """The id the client shall send to."""
        return self._stream.id

    async def prepare(self, payload: NoisePayload, message: Handshake, request: IncomingRequest) -> None:
        """Open a socket to punch from, if there will be a hole to punch."""
        open_here = self._dht.node.remote_address() is not None
        if message.peer_address is None or payload.firewall == Firewall.OPEN or open_here:
            return
        self._puncher = Puncher(self._dht.node, self._dht.rng, self._dht.throttle, is_initiator=False)
        await self._puncher.open()
        if not self._is_local(payload, message.peer_address, request):
            self.socket = self._puncher.socket

    def _is_local(self, payload: NoisePayload, client: Address, request: IncomingRequest) -> bool:
        """Tell whether the client seems to be in our own network; then the usual socket must stay its goal."""
        if client[0] != request.to[0]:
            return False
        own = {_network(address) for address in self._dht.own_addresses()}
        return any(_network(address) in own for address in payload.addresses4 if IPv4Address(address[0]).is_private)

    def start(self, payload: NoisePayload, message: Handshake, request: IncomingRequest) -> None:
        """Begin to listen for the client, and go towards it where the way is known. Call it with keys complete."""
        assert payload.udx is not None
        self._remote_id = payload.udx.id
        self._stream.firewall = self._firewall
        self.connection.start(self._noise)
        if self._puncher is not None:
            secrets = Secrets(self._dht, self._noise.holepunch_secret)
            self._holepunch = ServerHolepunch(self._dht, self._announcer, secrets, self._puncher, self._on_punch)
        if message.peer_address is None:
            self._stream.connect(request.socket, self._remote_id, request.source)
        elif payload.firewall == Firewall.OPEN:
            self._stream.connect(self._dht.node.socket, self._remote_id, message.peer_address)

    def _firewall(self, socket: Socket, source: Address) -> bool:
        """Follow the client to the path its packets come on, until one is known to work both ways.

        Its first acknowledgement comes on the path it has settled for (see `connect`), so both sides settle for the
        same. What arrives on another one later was under way already, and is as good.
        """
        if self._stream.core.srtt is None:
            self._stream.connect(socket, self._remote_id, source)
        return True

    async def handle_holepunch(self, message: Holepunch, request: IncomingRequest) -> Answer | None:
        """Answer a hole punching round."""
        return None if self._holepunch is None else await self._holepunch.handle(message, request)

    def _on_punch(self) -> None:
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + PUNCH_TIMEOUT)

    async def wait_opened(self) -> bool:
        """Wait for the client; False, and nothing left behind, if it does not come in time."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT) as self._deadline:
                await self.connection.wait_opened()
        except (TimeoutError, ConnectionClosed):
            self.connection.abort()
            return False
        finally:
            self._deadline = None
        return True

    async def settle(self) -> None:
        """Wait until the path is settled, and close the sockets it does not need."""
        if self._puncher is None:
            return
        while self._stream.core.srtt is None and not self.connection.closed:
            await asyncio.sleep(SETTLE_INTERVAL)
        self._puncher.hand_over(self._stream)
        if self._stream.own_socket is not None:
            self.connection.how = "punched"


def _network(address: Address) -> int:
    """Return the /16 of an address: upstream takes hosts that share as much for neighbours."""
    return int(IPv4Address(address[0])) >> 16
