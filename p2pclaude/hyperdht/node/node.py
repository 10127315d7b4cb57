"""A node of the DHT: sockets, start, ticks, sleep and end (ring 2).

Between `rpc` below and `dht` above: internal commands are answered here, all others go to `on_request`. Source:
dht-rpc index.js. A node may be asked and may ask as soon as `start` returns; `bootstrapped` comes later, and only
those who need a well filled table wait for it.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Unpack

from ..constants import ID_BYTES, ErrorCode, InternalCommand
from ..encoding import Address
from ..errors import Destroyed, HyperDHTError, Suspended
from ..net.endpoint import Endpoint
from ..net.sockets import Socket
from ..rpc.requests import DEFAULT_RETRIES, IncomingRequest, Reply, RequestOptions
from ..rpc.rpc import Rpc
from .bootstrap import Bootstrap, is_ipv4
from .health import HealthMonitor
from .internal import MAX_PING_DELAY_MS, InternalCommands
from .ports import Ports
from .query import Contacts, Query, QueryOptions
from .reachability import NodeActions, Reachability
from .routing import RoutingTable
from .ticks import Ticker, host_sleep
from .upkeep import Upkeep

logger = logging.getLogger(__name__)

REFRESH_TICKS: Final = 60  # 5 min without a query
EMPTY_REFRESH_TICKS: Final = 2
BACKGROUND_CONCURRENCY: Final = 2


class NodeEvents:
    """Who wants to know when something happens to a node: lists of functions, called without arguments."""

    __slots__ = ("ephemeral", "nat_update", "network_change", "network_update", "persistent", "wakeup")

    def __init__(self) -> None:
        self.persistent: list[Callable[[], None]] = []
        self.ephemeral: list[Callable[[], None]] = []
        self.nat_update: list[Callable[[], None]] = []
        self.network_change: list[Callable[[], None]] = []  # the host has other addresses
        self.network_update: list[Callable[[], None]] = []  # that, or `online` or `degraded` changed
        self.wakeup: list[Callable[[], None]] = []


class _Background:
    """A node's tasks: none of them outlives it, and a failure is logged."""

    __slots__ = ("_tasks",)

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order, so that simulations replay

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._finished)
        return task

    def cancel(self) -> list[asyncio.Task[None]]:
        """Cancel every task but the one that asks, and return them."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        return tasks

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)


class Node:
    """A DHT node on two sockets of `endpoint`.

    `bootstrap` are "HOST:PORT" or "IP@HOST:PORT" strings or pairs; with none the node is a network of its own. `host`
    is an IPv4 address, as that of `public_address` is; ValueError for another.
    `port` 0 is any port; else one of the next five is taken if it is in use, and any other if they all are, unless
    `any_port` is False. `ephemeral` None lets the node decide. `public_address` is for a node that knows where it is
    reached, as a bootstrap node does. `slept` tells how long the host has slept in all.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        rng: random.Random,
        *,
        bootstrap: Sequence[Address | str] = (),
        remembered: Sequence[Address] = (),
        host: str = "0.0.0.0",
        port: int = 0,
        ephemeral: bool | None = None,
        firewalled: bool = True,
        any_port: bool = True,
        public_address: Address | None = None,
        slept: Callable[[], float] = host_sleep,
    ) -> None:
        if not is_ipv4(host) or (public_address is not None and not is_ipv4(public_address[0])):
            raise ValueError("a node needs IPv4 addresses")
        rpc = Rpc(endpoint, rng)
        table = RoutingTable(rng.randbytes(ID_BYTES))
        names = Bootstrap(bootstrap, endpoint.network.resolve, remembered)
        upkeep = Upkeep(rpc, table, rng, max_bootstrap_samples=len(bootstrap))
        self.endpoint = endpoint
        self.contacts = Contacts(rpc, table, names, upkeep)
        """Whom the node knows, and how it asks them."""
        self.health = HealthMonitor()
        self.bootstrapped = asyncio.Event()
        self.suspended = False
        self.destroyed = False
        self.on_request: Callable[[IncomingRequest], bool] = _refuse
        """Gets every command that is not internal; False has it answered with UNKNOWN_COMMAND."""
        self.events = NodeEvents()
        self._internal = InternalCommands(upkeep)
        self._reachability = Reachability(
            self.contacts,
            NodeActions(self._walk, self.refresh, self.set_identity, self.spawn),
            self.bootstrapped,
            ephemeral=ephemeral,
            firewalled=firewalled,
        )
        self._rng = rng
        self._ports = Ports(endpoint, host, port, any_port=any_port)
        self._public_address = public_address
        self._refresh_ticks = rng.randint(REFRESH_TICKS // 2 + 1, REFRESH_TICKS)
        self._interfaces: frozenset[str] | None = None
        self._background = _Background()
        self._ticker = Ticker(self._tick, slept)
        rpc.own.firewalled = firewalled
        rpc.own.closest = self._closest
        rpc.on_request = self._on_request
        rpc.on_response = upkeep.heard_reply
        rpc.on_timeout = upkeep.on_timeout
        upkeep.on_nat_update = lambda: self._emit(self.events.nat_update)

    @property
    def rpc(self) -> Rpc:
        """The engine that asks and is asked."""
        return self.contacts.rpc

    @property
    def table(self) -> RoutingTable:
        """The nodes we know."""
        return self.contacts.table

    @property
    def bootstrap(self) -> Bootstrap:
        """The nodes to begin with."""
        return self.contacts.bootstrap

    @property
    def upkeep(self) -> Upkeep:
        """What keeps the table true, and knows how others see us."""
        return self.contacts.upkeep

    # what we are

    @property
    def server_socket(self) -> Socket | None:
        """The socket on the known port, where others may reach us."""
        return self.rpc.own.server_socket

    @property
    def client_socket(self) -> Socket | None:
        """The socket on a port of chance, which our requests leave from while we are firewalled."""
        return self.rpc.own.client_socket

    @property
    def bind_host(self) -> str:
        """The local host all sockets are bound to."""
        return self._ports.host

    @property
    def socket(self) -> Socket:
        """The socket our requests leave from."""
        return self.rpc.own.socket

    @property
    def id(self) -> bytes | None:
        """Our id, None while ephemeral."""
        return self.rpc.own.identity

    @property
    def ephemeral(self) -> bool:
        """Whether we have no id: others neither keep us in their tables nor store anything here."""
        return self.rpc.own.identity is None

    @property
    def firewalled(self) -> bool:
        """Whether strangers cannot reach our server socket, as far as we know."""
        return self.rpc.own.firewalled

    @property
    def host(self) -> str | None:
        """Our public host, as others see it; None while they do not agree."""
        return self.upkeep.nat.host

    @property
    def port(self) -> int:
        """The public port of the socket our requests leave from; 0 if unknown, or another for everybody."""
        return self.upkeep.nat.port

    @property
    def online(self) -> bool:
        """Whether the network answers."""
        return self.health.online

    @property
    def degraded(self) -> bool:
        """Whether most of what we ask is not answered."""
        return self.health.degraded

    def remote_address(self) -> Address | None:
        """Return the public address at which anybody can reach us, None if there is none."""
        socket, host, port = self.server_socket, self.host, self.port
        if self.firewalled or host is None or socket is None or port != socket.address[1]:
            return None
        return host, port

    # asking

    async def request(self, to: Address, command: int, **options: Unpack[RequestOptions]) -> Reply:
        """Ask one node, as `Rpc.request`."""
        return await self.rpc.request(to, command, **options)

    async def ping(self, to: Address, *, retries: int = DEFAULT_RETRIES) -> Reply:
        """Ask a node for nothing but an answer."""
        return await self.rpc.request(to, InternalCommand.PING, internal=True, retries=retries)

    async def delayed_ping(self, to: Address, delay: float) -> Reply:
        """Ask a node to answer after `delay` seconds (at most 10): does a NAT keep its mapping that long?"""
        delay_ms = round(delay * 1000)
        if not 0 <= delay_ms <= MAX_PING_DELAY_MS:
            raise ValueError(f"a delay of 0 to {MAX_PING_DELAY_MS} ms")
        value = delay_ms.to_bytes(4, "little")
        return await self.rpc.request(to, InternalCommand.DELAYED_PING, internal=True, value=value, timeout=delay + 1.0)

    def query(self, command: int, target: bytes, **options: Unpack[QueryOptions]) -> Query:
        """Return a walk towards `target`; it starts from the bootstrap nodes if need be, and waits for nothing."""
        self._refresh_ticks = REFRESH_TICKS
        return Query(self.contacts, command, target, **options)

    def find_node(self, target: bytes) -> Query:
        """Return a walk to the nodes closest to `target`."""
        return self.query(InternalCommand.FIND_NODE, target, internal=True)

    def background_query(self, target: bytes, *, concurrency: int = BACKGROUND_CONCURRENCY) -> Query:
        """Return a walk that gives way to other traffic."""
        return self.query(InternalCommand.FIND_NODE, target, internal=True, concurrency=concurrency)

    def refresh(self) -> None:
        """Walk to a random place in the background, so that the table stays full and fresh."""
        if self.suspended or self.destroyed:
            return
        known = self.table.random(self._rng)
        query = self.background_query(self.table.id if known is None else known.id)
        self._reachability.watch(query)
        query.start()

    def _walk(self, target: bytes, concurrency: int) -> Query:
        return self.background_query(target, concurrency=concurrency)

    # start and end

    async def start(self) -> None:
        """Bind both sockets and begin to bootstrap. Raises OSError if no port is to be had."""
        await self._bind()
        self._ticker.start()
        if self._public_address is None and not len(self.bootstrap) and self.bind_host != "0.0.0.0":
            self._public_address = self.bind_host, self._ports.bound[0]  # alone, there is nobody to tell us
        if self._public_address is not None and not self.firewalled:
            self.upkeep.sample(self._public_address)
        self.spawn(self._bootstrap())

    async def _bootstrap(self) -> None:
        try:
            await self._reachability.bootstrap()
        except HyperDHTError as error:
            logger.debug("bootstrapping ended early: %s", type(error).__name__)
        if not self.suspended:
            self.upkeep.ready = True
            self.bootstrapped.set()

    async def suspend(self) -> None:
        """Close the sockets and fail what is under way with Suspended, until `resume`."""
        if self.suspended or self.destroyed:
            return
        self.suspended = True
        await self._halt(lambda: Suspended("the node is suspended"))

    async def resume(self) -> None:
        """Bind the same ports again, or others if they are taken, and go on."""
        if not self.suspended or self.destroyed:
            return
        await self._bind()
        self.suspended = False
        self.rpc.open()
        self._ticker.start()
        self._wake_up()
        if self.bootstrapped.is_set():
            self.refresh()
        else:
            self.spawn(self._bootstrap())

    async def destroy(self) -> None:
        """Stop for good; what is under way fails with Destroyed."""
        if self.destroyed:
            return
        self.destroyed = True
        try:
            await self._halt(lambda: Destroyed("the node is destroyed"))
        finally:
            self.bootstrapped.set()  # nobody shall wait for it any longer

    async def _halt(self, reason: Callable[[], HyperDHTError]) -> None:
        self._ticker.stop()
        self._internal.close()
        self.rpc.close(reason)
        for socket in (self.server_socket, self.client_socket):
            if socket is not None:
                socket.close()
        tasks = self._background.cancel()
        await self.bootstrap.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bind(self) -> None:
        server, client = await self._ports.bind()
        if self.destroyed:  # meanwhile
            server.close()
            client.close()
            raise Destroyed("the node is destroyed")
        self.rpc.own.server_socket, self.rpc.own.client_socket = server, client

    # ticks

    def _tick(self, slept: bool) -> None:
        if slept:
            self._wake_up()
        else:
            self.upkeep.begin_tick(woken=False)
        self._watch_interfaces()
        if not self.bootstrapped.is_set():
            return
        self._reachability.tick()
        if self.upkeep.tick % 8 == 0:
            self.upkeep.ping_some()
        self._refresh_if_due()
        if self.health.update(self.rpc.stats.responses, self.rpc.stats.timeouts):
            self._emit(self.events.network_update)

    def _refresh_if_due(self) -> None:
        self._refresh_ticks -= 1
        empty = not len(self.table) and len(self.bootstrap) > 0
        sparse = len(self.table) < self.table.k and self.upkeep.tick % 64 == 0
        if self._refresh_ticks <= 0 or sparse or (empty and self.upkeep.tick % EMPTY_REFRESH_TICKS == 0):
            self.refresh()

    def _wake_up(self) -> None:
        self.upkeep.begin_tick(woken=True)
        self._refresh_ticks = 1  # in a tick: the network needs its time to wake up too
        if self.health.reset():
            self._emit(self.events.network_update)
        self._reachability.reconsider()
        self._emit(self.events.wakeup)

    def _watch_interfaces(self) -> None:
        current = frozenset(self.endpoint.network.interfaces())
        if self._interfaces is not None and current != self._interfaces:
            self._reachability.reconsider()
            self._emit(self.events.network_change)
            self._emit(self.events.network_update)
        self._interfaces = current

    # identity

    def set_identity(self, identity: bytes | None) -> None:
        """Become persistent under an id, or ephemeral again."""
        if identity == self.rpc.own.identity:
            return
        self.rpc.own.identity = identity
        if identity is None:
            self._emit(self.events.ephemeral)
            return
        if identity != self.table.id:
            self.table.remove(identity)
            self.table.rebuild(identity)
            if self.bootstrapped.is_set():
                self.refresh()  # we have other neighbours now
        self._emit(self.events.persistent)

    # being asked

    def _on_request(self, request: IncomingRequest, external: bool) -> None:
        if request.id is not None:
            self.upkeep.heard_request(request.id, request.source)
        if request.internal:
            self._internal.handle(request)
        elif not self.on_request(request):
            request.error(ErrorCode.UNKNOWN_COMMAND)

    def _closest(self, target: bytes) -> list[Address]:
        return [node.address for node in self.table.closest(target)]

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the background until the node ends; its failure is logged."""
        return self._background.spawn(work)

    def _emit(self, listeners: Sequence[Callable[[], None]]) -> None:
        for listener in list(listeners):
            try:
                listener()
            except Exception:
                logger.exception("a listener failed")


def _refuse(request: IncomingRequest) -> bool:
    return False
