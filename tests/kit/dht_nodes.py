"""DHT nodes on the simulator, for tests of the lower half of the library's second ring."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from sim import Host, SimNetwork

from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.node.node import Node
from p2pclaude.hyperdht.rpc.rpc import Rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PORT = 49737


def make_node(machine: Host, *, seed: object = 0, **options: Any) -> Node:
    """Return a node on a simulated host that was not started yet."""
    rng = random.Random(f"{seed} {machine.addresses[0]}")
    return Node(Endpoint(machine, rng), rng, **{"port": PORT, **options})


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """Start nodes and destroy them at the end."""
    async with AsyncExitStack() as stack:
        for node in nodes:
            stack.push_async_callback(node.destroy)
            await node.start()
        yield


@asynccontextmanager
async def dht(net: SimNetwork, size: int, *, seed: object = 0, **options: Any) -> AsyncIterator[list[Node]]:
    """Run a network of persistent nodes, each on a host of its own; the first is the bootstrap node."""
    hosts = net.hosts(size)
    first = make_node(
        hosts[0], seed=seed, host=hosts[0].addresses[0], ephemeral=False, firewalled=False, any_port=False, **options
    )
    nodes = [first]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(first))
        for host in hosts[1:]:
            node = make_node(
                host, seed=seed, bootstrap=[address_of(first)], ephemeral=False, firewalled=False, **options
            )
            await stack.enter_async_context(running(node))
            await node.bootstrapped.wait()
            nodes.append(node)
        yield nodes


def address_of(node: Node) -> Address:
    """Return the address others reach a node's server socket at."""
    socket = node.server_socket
    assert socket is not None
    host = node.endpoint.network.interfaces()[-1]
    return host, socket.address[1]


class Peer:
    """A bare RPC engine on one socket: what the other end of a test says, word by word."""

    def __init__(self, host: Host, seed: object = 1) -> None:
        self.host = host
        self.endpoint = Endpoint(host, random.Random(f"{seed}"))
        self.rpc = Rpc(self.endpoint, random.Random(f"{seed}"))

    async def start(self, port: int = PORT) -> Peer:
        """Bind the socket, which is server and client socket at once."""
        self.rpc.own.server_socket = self.rpc.own.client_socket = await self.endpoint.bind("0.0.0.0", port)
        return self

    @property
    def address(self) -> Address:
        """The socket's address."""
        return self.host.addresses[0], self.rpc.own.socket.address[1]

    def close(self) -> None:
        """Close the sockets."""
        self.endpoint.close()


def sorted_by_distance(target: bytes, ids: Sequence[bytes]) -> list[bytes]:
    """Return ids, closest to `target` first."""
    goal = int.from_bytes(target, "big")
    return sorted(ids, key=lambda id: int.from_bytes(id, "big") ^ goal)
