"""What finding peers, serving them and punching holes need of the node they run on (ring 2).

`dht` makes one `PeerContext` for each node and hands it to every attempt to connect and to every server. So `peer`
knows nothing of the object above it, and what it takes from there stands in one place.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..crypto import KeyPair
from ..encoding import Address
from ..net.streams import StreamSet
from ..node.node import Node
from .router import Router

if TYPE_CHECKING:
    from ..relay.relay_client import Connect
    from .punch_throttle import PunchThrottle

MAX_REMEMBERED_PEERS: Final = 512


class KnownRelays:
    """The nodes that led to each server the last time; the server that was used the longest ago goes first."""

    def __init__(self) -> None:
        self._relays: OrderedDict[bytes, tuple[Address, ...]] = OrderedDict()

    def remember(self, public_key: bytes, relays: Sequence[Address]) -> None:
        """Keep the nodes that led to a server, and its own address if it has one, for the next time."""
        self._relays[public_key] = tuple(relays)
        self._relays.move_to_end(public_key)
        while len(self._relays) > MAX_REMEMBERED_PEERS:
            self._relays.popitem(last=False)

    def of(self, public_key: bytes) -> tuple[Address, ...]:
        """Return what was remembered of a server; nothing for one that was never met."""
        return self._relays.get(public_key, ())


class PeerContext:
    """One node, as its peers' side of the library sees it.

    `key_pair` is that of connections and servers that name no other, `keep_alive` the seconds after which an idle
    connection sends an empty message (0 for never). `check_usable` raises Suspended or Destroyed. `connect` leads to
    a blind relay, which is a server as any other.
    """

    def __init__(
        self,
        node: Node,
        streams: StreamSet,
        router: Router,
        rng: random.Random,
        *,
        key_pair: KeyPair,
        keep_alive: float,
        check_usable: Callable[[], None],
        connect: Connect,
    ) -> None:
        self.node = node
        self.streams = streams
        self.router = router
        self.rng = rng
        self.key_pair = key_pair
        self.keep_alive = keep_alive
        self.check_usable = check_usable
        self.connect = connect
        self.known_relays = KnownRelays()
        self.handlers: set[asyncio.Task[None]] = set()
        """The tasks that serve connections, those of closed servers included."""
        self._throttle: PunchThrottle | None = None

    @property
    def throttle(self) -> PunchThrottle:
        """What keeps random hole punching rare, for the whole node."""
        if self._throttle is None:
            from .punch_throttle import PunchThrottle  # here: a client that punches no hole never needs it

            self._throttle = PunchThrottle()
        return self._throttle

    def spawn_handler(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what serves a connection in a task of its own, which the node waits for when it leaves."""
        task = asyncio.create_task(work)
        self.handlers.add(task)
        task.add_done_callback(self.handlers.discard)

    def local_addresses(self) -> list[str]:
        """Return the host's IPv4 addresses other than loopback."""
        return [host for host in self.node.endpoint.network.interfaces() if not host.startswith("127.")]

    def own_addresses(self) -> tuple[Address, ...]:
        """Return where this node may be reached: its public address if it is open, then those of its interfaces."""
        host, port = self.server_address()
        hosts = [host] if host != "0.0.0.0" else self.local_addresses() or ["127.0.0.1"]
        open_address = self.node.remote_address()
        addresses = [] if open_address is None else [open_address]
        return tuple(dict.fromkeys([*addresses, *((host, port) for host in hosts)]))

    def server_address(self) -> Address:
        """Return the local address of the server socket. Raises RuntimeError before the node is started."""
        socket = self.node.server_socket
        if socket is None:
            raise RuntimeError("the node is not started")
        return socket.address
