"""A node of the DHT: sockets, start, ticks, sleep and end (ring 2).

Between `rpc` below and `dht` above: internal commands are answered here, all others go to `on_request`. Source:
dht-rpc index.js. A node may be asked and may ask as soon as `start` returns; `bootstrapped` comes later, and only
those who need a well filled table wait for it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Unpack

from ..constants import ID_BYTES, ErrorCode, InternalCommand
from ..encoding import Address
from ..errors import Destroyed, HyperDHTError, Suspended
from ..net.endpoint import Endpoint
from ..net.sockets import Socket
from ..rpc.messages import node_id
from ..rpc.requests import DEFAULT_RETRIES, IncomingRequest, OutgoingRequest, Reply, RequestOptions
from ..rpc.rpc import Rpc
from .bootstrap import Bootstrap, is_ipv4
from .health import HealthMonitor
from .internal import MAX_PING_DELAY_MS, InternalCommands
from .query import Query, QueryOptions
from .reachability import Reachability
from .routing import RoutingTable
from .upkeep import Upkeep, is_usable

logger = logging.getLogger(__name__)

TICK_SECONDS: Final = 5.0
SLEEP_SECONDS: Final = 3 * TICK_SECONDS  # a gap between ticks that means the host slept
REFRESH_TICKS: Final = 60  # 5 min without a query
EMPTY_REFRESH_TICKS: Final = 2
PORT_TRIES: Final = 5  # ports after the wanted one, if that is taken
BACKGROUND_CONCURRENCY: Final = 2


def host_sleep() -> float:
    """Return the seconds this host has slept since it booted, which the event loop's clock leaves out."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if hasattr(time, "CLOCK_UPTIME_RAW"):  # macOS, whose CLOCK_MONOTONIC goes on
        return time.clock_gettime(time.CLOCK_MONOTONIC) - time.clock_gettime(time.CLOCK_UPTIME_RAW)
    return 0.0


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
        self.endpoint = endpoint
        self.rpc = Rpc(endpoint, rng)
        self.table = RoutingTable(rng.randbytes(ID_BYTES))
        self.bootstrap = Bootstrap(bootstrap, endpoint.network.resolve, remembered)
        self.upkeep = Upkeep(self.rpc, self.table, rng, max_bootstrap_samples=len(bootstrap))
        self.health = HealthMonitor()
        self.bootstrapped = asyncio.Event()
        self.suspended = False
        self.destroyed = False
        self.on_request: Callable[[IncomingRequest], bool] = _refuse
        """Gets every command that is not internal; False has it answered with UNKNOWN_COMMAND."""
        self.on_persistent: list[Callable[[], None]] = []
        self.on_ephemeral: list[Callable[[], None]] = []
        self.on_nat_update: list[Callable[[], None]] = []
        self.on_network_change: list[Callable[[], None]] = []  # the host has other addresses
        self.on_network_update: list[Callable[[], None]] = []  # that, or `online` or `degraded` changed
        self.on_wakeup: list[Callable[[], None]] = []
        self._internal = InternalCommands(self.upkeep)
        self._reachability = Reachability(self, ephemeral=ephemeral, firewalled=firewalled)
        self._rng = rng
        self._host, self._port, self._any_port = host, port, any_port
        self._public_address = public_address
        self._slept = slept
        self._bound_ports = (0, 0)
        self._refresh_ticks = rng.randint(REFRESH_TICKS // 2 + 1, REFRESH_TICKS)
        self._interfaces: frozenset[str] | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order, so that simulations replay
        self._ticker: asyncio.TimerHandle | None = None
        self._last_tick = (0.0, 0.0)
        self.rpc.own.firewalled = firewalled
        self.rpc.own.closest = self._closest
        self.rpc.on_request = self._on_request
        self.rpc.on_response = self.upkeep.heard_reply
        self.rpc.on_timeout = self.upkeep.on_timeout
        self.upkeep.on_nat_update = lambda: self._emit(self.on_nat_update)

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
        return self._host

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

    def accepts(self, address: Address) -> bool:
        """Tell whether an address that another node named may be asked."""
        return is_usable(address)

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
        return Query(self, command, target, **options)

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

    # what `query` needs

    def send_down_hint(self, to: Address, down: Address) -> None:
        """Tell a node that one it named does not answer."""
        self.upkeep.send_down_hint(to, down)

    def forget(self, call: OutgoingRequest) -> None:
        """Remove the node that left a request unanswered from the table."""
        self.upkeep.forget(call)

    def suspect(self, address: Address) -> None:
        """Ping a node that is slow to answer, and remove it if it stays silent."""
        self.upkeep.suspect(address)

    # start and end

    async def start(self) -> None:
        """Bind both sockets and begin to bootstrap. Raises OSError if no port is to be had."""
        await self._bind()
        self._begin_ticks()
        if self._public_address is None and not len(self.bootstrap) and self._host != "0.0.0.0":
            self._public_address = self._host, self._bound_ports[0]  # alone, there is nobody to tell us
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
        self._begin_ticks()
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
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self._internal.close()
        self.rpc.close(reason)
        for socket in (self.server_socket, self.client_socket):
            if socket is not None:
                socket.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await self.bootstrap.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bind(self) -> None:
        server = await self._bind_server()
        try:
            client = await self._bind_any(self._bound_ports[1])
        except OSError:
            server.close()
            raise
        if self.destroyed:  # meanwhile
            server.close()
            client.close()
            raise Destroyed("the node is destroyed")
        self.rpc.own.server_socket, self.rpc.own.client_socket = server, client
        self._bound_ports = server.address[1], client.address[1]

    async def _bind_server(self) -> Socket:
        if not self._port:
            return await self._bind_any(self._bound_ports[0])
        wanted = [self._bound_ports[0]] if self._bound_ports[0] else []
        wanted += range(self._port, min(self._port + (PORT_TRIES if self._any_port else 1), 65536))
        for port in wanted:
            try:
                return await self.endpoint.bind(self._host, port)
            except OSError:
                if not self._any_port:
                    raise
        return await self.endpoint.bind(self._host, 0)

    async def _bind_any(self, port: int) -> Socket:
        if port:
            try:
                return await self.endpoint.bind(self._host, port)
            except OSError:
                pass  # taken while we were suspended
        return await self.endpoint.bind(self._host, 0)

    # ticks

    def _begin_ticks(self) -> None:
        loop = asyncio.get_running_loop()
        self._last_tick = loop.time(), self._slept()
        self._ticker = loop.call_later(TICK_SECONDS, self._on_timer)

    def _on_timer(self) -> None:
        loop = asyncio.get_running_loop()
        last, self._last_tick = self._last_tick, (loop.time(), self._slept())
        self._ticker = loop.call_later(TICK_SECONDS, self._on_timer)
        slept = sum(self._last_tick) - sum(last) > SLEEP_SECONDS
        try:
            self._tick(slept)
        except Exception:
            logger.exception("a tick failed")

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
            self._emit(self.on_network_update)

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
            self._emit(self.on_network_update)
        self._reachability.reconsider()
        self._emit(self.on_wakeup)

    def _watch_interfaces(self) -> None:
        current = frozenset(self.endpoint.network.interfaces())
        if self._interfaces is not None and current != self._interfaces:
            self._reachability.reconsider()
            self._emit(self.on_network_change)
            self._emit(self.on_network_update)
        self._interfaces = current

    # identity

    def set_identity(self, identity: bytes | None) -> None:
        """Become persistent under an id, or ephemeral again."""
        if identity == self.rpc.own.identity:
            return
        self.rpc.own.identity = identity
        if identity is None:
            self._emit(self.on_ephemeral)
            return
        if identity != self.table.id:
            self.table.remove(identity)
            self.table.rebuild(identity)
            if self.bootstrapped.is_set():
                self.refresh()  # we have other neighbours now
        self._emit(self.on_persistent)

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
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)

    def _emit(self, listeners: Sequence[Callable[[], None]]) -> None:
        for listener in list(listeners):
            try:
                listener()
            except Exception:
                logger.exception("a listener failed")


def _refuse(request: IncomingRequest) -> bool:
    return False


__all__ = ["Node", "node_id"]
