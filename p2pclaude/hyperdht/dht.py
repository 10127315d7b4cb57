"""HyperDHT: the face of the library (ring 2).

One object is one node of the DHT: it finds peers and connects to them, serves, and stores and finds records.

    async with HyperDHT(bootstrap=[("127.0.0.1", 49737)]) as dht:
        connection = await dht.connect(public_key)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final, Self

from .constants import DEFAULT_PORT, KEY_BYTES
from .crypto import KeyPair
from .encoding import Address
from .errors import Destroyed, HyperDHTError, Suspended
from .net.endpoint import Endpoint
from .net.sockets import Network
from .net.udp import UdpNetwork
from .node.bootstrap import PUBLIC_NODES
from .node.forwards import ForwardStore
from .node.node import Node
from .peer.context import PeerContext
from .peer.dial import connect
from .peer.router import Router
from .secure.connection import Connection

if TYPE_CHECKING:
    from .peer.server import Allow, OnConnection, Server
    from .rpc.requests import IncomingRequest, Reply
    from .storage.persistent import Persistent
    from .storage.put_get import LookupResult, MutableRecord, Storage

CONNECT_TIMEOUT: Final = 20.0
DESTROY_TIMEOUT: Final = 5.0
HANDLER_GRACE: Final = 1.0
KEEP_ALIVE: Final = 3.0  # with UDX's patience a dead peer is noticed within 15 seconds


class HyperDHT:
    """A node of the DHT, with servers and connections on it.

    `bootstrap` lists the nodes to begin with: pairs of host and port, or strings `host:port`; None is the public
    network, an empty list a network of one's own. `remembered` are nodes that answered in an earlier life, which
    `latest_nodes` gave; they are asked beside those. `ephemeral` False makes the node store for others at once, True
    never, None once it has proved stable and reachable. `host` is the IPv4 address to bind, by default all of the
    host's. When `port` is taken, one of the next ones is used and then any, unless `any_port` is False.
    `public_address` is for a host that knows where it is reached and that no firewall stands before. `network` and
    `rng` are for simulations. Raises ValueError for what is no address.
    """

    def __init__(
        self,
        *,
        bootstrap: Sequence[Address | str] | None = None,
        remembered: Sequence[Address] = (),
        host: str = "0.0.0.0",
        port: int = DEFAULT_PORT,
        any_port: bool = True,
        key_pair: KeyPair | None = None,
        ephemeral: bool | None = None,
        public_address: Address | None = None,
        connection_keep_alive: float = KEEP_ALIVE,
        network: Network | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.rng = rng or random.SystemRandom()
        own_key_pair = key_pair or KeyPair.generate(self.rng)
        self.endpoint = Endpoint(network or UdpNetwork(), self.rng)
        self.router = Router(ForwardStore())
        self.node = Node(
            self.endpoint,
            self.rng,
            bootstrap=PUBLIC_NODES if bootstrap is None else bootstrap,
            remembered=remembered,
            host=host,
            port=port,
            any_port=any_port,
            ephemeral=ephemeral,
            firewalled=public_address is None,
            public_address=public_address,
        )
        self.servers: list[Server] = []
        """The servers that listen on this node."""
        self.context = PeerContext(
            self.node,
            self.endpoint.streams,
            self.router,
            self.rng,
            key_pair=own_key_pair,
            keep_alive=connection_keep_alive,
            check_usable=self.check_usable,
            connect=self.connect,
        )
        """What connections and servers share of this node."""
        self._suspended = False
        self._sleep_lock = asyncio.Lock()  # `suspend` and `resume` come one after the other
        self._destroyed = False
        self.node.on_request = self._handle_request
        self.node.events.network_change.append(self.refresh)
        self.node.events.wakeup.append(self.refresh)  # the announcements have grown older than the loop's clock says

    @property
    def key_pair(self) -> KeyPair:
        """The key pair of connections and servers that name no other; of those to come it may be changed."""
        return self.context.key_pair

    @key_pair.setter
    def key_pair(self, key_pair: KeyPair) -> None:
        self.context.key_pair = key_pair

    @property
    def connection_keep_alive(self) -> float:
        """The seconds after which an idle connection sends something, 0 for never; changed, for those to come."""
        return self.context.keep_alive

    @connection_keep_alive.setter
    def connection_keep_alive(self, seconds: float) -> None:
        self.context.keep_alive = seconds

    # What a client that only connects never needs is loaded when it is first used.

    @cached_property
    def _persistent(self) -> Persistent:
        from .storage.persistent import Persistent

        return Persistent(self.node, self.router, self.rng)

    @cached_property
    def _storage(self) -> Storage:
        from .storage.put_get import Storage

        return Storage(self.node, self._persistent)

    @classmethod
    def bootstrapper(
        cls,
        port: int,
        host: str,
        *,
        bind: str = "0.0.0.0",
        key_pair: KeyPair | None = None,
        network: Network | None = None,
        rng: random.Random | None = None,
    ) -> Self:
        """Return a node that is a network of its own, for others to begin with: they reach it at `host` and `port`."""
        return cls(
            bootstrap=(),
            host=bind,
            port=port,
            any_port=False,
            ephemeral=False,
            public_address=(host, port),
            key_pair=key_pair,
            network=network,
            rng=rng,
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.destroy()

    async def start(self) -> None:
        """Bind the sockets and begin to join the network, which goes on behind.

        Raises OSError if the port is taken. Everything else may be called right after.
        """
        await self.node.start()

    async def destroy(self, timeout: float = DESTROY_TIMEOUT) -> None:
        """Take announcements back within `timeout` seconds, break all connections off and leave.

        Handlers that hang have one more second. Whoever is cancelled meanwhile leaves all the same, at once.
        """
        if self._destroyed:
            return
        self._destroyed = True
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(server.close() for server in list(self.servers)), return_exceptions=True)
        except TimeoutError:
            pass  # the nodes that store the announcements will forget them
        finally:
            await self._leave()

    async def _leave(self) -> None:
        self.router.close()
        self.endpoint.streams.close()
        try:
            await self._end_handlers()
        finally:
            try:
                await self.node.destroy()
            finally:
                self.endpoint.close()

    async def _end_handlers(self) -> None:
        """Let handlers, whose connections are over, finish; cancel those that wait for something else."""
        handlers = self.context.handlers - {asyncio.current_task()}
        try:
            if handlers:
                await asyncio.wait(handlers, timeout=HANDLER_GRACE)
        finally:
            for handler in handlers:
                handler.cancel()

    async def suspend(self) -> None:
        """Go quiet, as before the machine sleeps: announcements are taken back, connections broken off."""
        async with self._sleep_lock:
            if self._suspended:
                return
            self._suspended = True
            try:
                await asyncio.gather(*(server.suspend() for server in self.servers))
            finally:  # also for who is cancelled: `_suspended` says that it is done
                self.endpoint.streams.close()
                await self.node.suspend()

    async def resume(self) -> None:
        """Come back on the same ports and announce again, once a `suspend` under way is done."""
        async with self._sleep_lock:
            if not self._suspended:
                return
            await self.node.resume()
            self._suspended = False
            announcing = asyncio.gather(*(server.resume() for server in self.servers))
        await asyncio.shield(announcing)  # which another `suspend` ends; who is cancelled leaves them to it

    def refresh(self) -> None:
        """Look around anew, as after a change of the network: every server announces again."""
        for server in self.servers:
            server.refresh()

    @property
    def bootstrapped(self) -> asyncio.Event:
        """Set once the node has joined the network, or found out that nobody answers."""
        return self.node.bootstrapped

    async def ping_bootstrap_nodes(self) -> dict[Address, float | None]:
        """Ask each bootstrap node whose address is known for an answer; give the seconds it took, None for silence."""

        async def ping(address: Address) -> float | None:
            try:
                return (await self.node.ping(address)).rtt
            except HyperDHTError:
                return None

        nodes = self.node.bootstrap.known()
        return dict(zip(nodes, await asyncio.gather(*map(ping, nodes)), strict=True))

    @property
    def seen_address(self) -> tuple[str | None, int]:
        """Where other nodes see this one: the port is 0 where a NAT chooses one for each, the host None if unknown."""
        return self.node.host, self.node.port

    @property
    def remote_address(self) -> Address | None:
        """The public address, if it is known and no firewall stands before it."""
        return self.node.remote_address()

    @property
    def local_addresses(self) -> list[str]:
        """The host's IPv4 addresses other than loopback."""
        return self.context.local_addresses()

    @property
    def port(self) -> int:
        """The port of the server socket."""
        return self.context.server_address()[1]

    def latest_nodes(self, count: int) -> tuple[Address, ...]:
        """Return up to `count` nodes of the network, the last heard of first."""
        return tuple(node.address for node in self.node.table.latest(count))

    def own_addresses(self) -> tuple[Address, ...]:
        """Return where this node may be reached: its public address if it is open, then those of its interfaces."""
        return self.context.own_addresses()

    # Connections

    def create_server(
        self, on_connection: OnConnection, *, allow: Allow | None = None, relay_through: bytes | None = None
    ) -> Server:
        """Make a server that awaits `on_connection(connection)` for each client, in a task of its own.

        The connection is closed when that returns. `allow(public_key, address)` may turn clients away: silently, so
        that a stranger does not learn that there is a server. `relay_through` is the public key of a blind relay where
        clients meet the server while no direct way is found.
        """
        from .peer.server import Server

        self.check_usable()
        return Server(self.context, self.servers, on_connection, allow, relay_through)

    async def connect(
        self,
        public_key: bytes,
        *,
        key_pair: KeyPair | None = None,
        relay_addresses: Sequence[Address] = (),
        relay_through: bytes | None = None,
        early_data: bytes = b"",
        timeout: float = CONNECT_TIMEOUT,
    ) -> Connection:
        """Connect to the server with that public key.

        `relay_addresses` are DHT nodes said to know it, or its own address, tried while others are searched for.
        `early_data` are the first bytes to send: they leave with the first packet instead of waiting for the server's.
        When a path fails they are sent again on a new connection, so they must be harmless twice. `relay_through` is
        the public key of a blind relay to meet at while no direct way is found; a server that names one itself needs
        none here. Returns when the server's first bytes have arrived. Raises PeerNotFound, TooFewNodes,
        PeerConnectionFailed, HandshakeFailed, HolepunchError, Timeout, Suspended, Destroyed: the cause; ValueError for
        a key of another length than 32 bytes, DecodeError for 32 that are no key.
        """
        if len(public_key) != KEY_BYTES:
            raise ValueError(f"a public key has {KEY_BYTES} bytes")
        self.check_usable()
        own = key_pair or self.key_pair
        return await connect(self.context, public_key, own, relay_addresses, relay_through, early_data, timeout)

    def remember_relays(self, public_key: bytes, relays: Sequence[Address]) -> None:
        """Keep the nodes that led to a server, and its own address if it has one, for the next time."""
        self.context.known_relays.remember(public_key, relays)

    def remembered_relays(self, public_key: bytes) -> tuple[Address, ...]:
        """Return the nodes that led to a server the last time, and its own address if it has one."""
        return self.context.known_relays.of(public_key)

    # Records

    async def mutable_put(self, key_pair: KeyPair, value: bytes, seq: int = 0) -> None:
        """Store up to 1,000 bytes under a key, signed by it; a later record needs a larger `seq`.

        Raises RemoteError (`SEQ_REUSED`, `SEQ_TOO_LOW`) when the nodes hold a newer record, TooFewNodes when nobody
        stored it, ValueError for a value that is too long.
        """
        await self._storage.mutable_put(key_pair, value, seq)

    async def mutable_get(self, public_key: bytes, seq: int = 0, latest: bool = True) -> MutableRecord | None:
        """Return the record under a key with at least that sequence number, None if no node has one.

        With `latest` all nodes near the key are asked for the newest one; else the first one found will do.
        """
        return await self._storage.mutable_get(public_key, seq, latest)

    async def immutable_put(self, value: bytes) -> bytes:
        """Store up to 1,000 bytes under their hash, which is returned. Raises as `mutable_put` does."""
        return await self._storage.immutable_put(value)

    async def immutable_get(self, target: bytes) -> bytes | None:
        """Return the value with that hash, None if no node has it."""
        return await self._storage.immutable_get(target)

    async def announce(
        self,
        target: bytes,
        key_pair: KeyPair | None = None,
        *,
        relay_addresses: Sequence[Address] = (),
        bump: int = 0,
    ) -> None:
        """Announce a key (default: the node's) under a 32-byte topic. Raises TooFewNodes or RemoteError."""
        await self._storage.announce(target, key_pair or self.key_pair, tuple(relay_addresses), bump)

    async def unannounce(self, target: bytes, key_pair: KeyPair | None = None) -> None:
        """Take an announcement back; a node that does not answer forgets it by itself."""
        await self._storage.unannounce(target, key_pair or self.key_pair)

    def lookup(self, target: bytes) -> AsyncIterator[LookupResult]:
        """Iterate over what the nodes near a topic know: who announced itself under it."""
        return self._storage.lookup(target)

    def find_peer(self, public_key: bytes) -> AsyncIterator[Reply]:
        """Iterate over the nodes that lead to the server with that key."""
        return self._storage.find_peer(public_key)

    def check_usable(self) -> None:
        """Raise Destroyed or Suspended if the node is."""
        if self._destroyed:
            raise Destroyed("the node is destroyed")
        if self._suspended:
            raise Suspended("the node is suspended")

    def _handle_request(self, request: IncomingRequest) -> bool:
        return self.router.handle(request) or (not self.node.ephemeral and self._persistent.handle(request))
