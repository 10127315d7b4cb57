"""The DHT node alone, below connections, among Node's: it joins, is known, answers and stores byte by byte."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from interop.harness import Peer, missing_node, peers_on

from p2pclaude.hyperdht.constants import Command, ErrorCode, InternalCommand
from p2pclaude.hyperdht.crypto import NS_ANNOUNCE, KeyPair, announce_signable, hash, sign
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import Timeout
from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.net.udp import UdpNetwork
from p2pclaude.hyperdht.node.forwards import ForwardStore
from p2pclaude.hyperdht.node.node import Node
from p2pclaude.hyperdht.peer.router import Router
from p2pclaude.hyperdht.rpc.messages import Announce, encode_announce, encode_peer, node_id
from p2pclaude.hyperdht.rpc.messages import Peer as PeerRecord
from p2pclaude.hyperdht.storage.persistent import Persistent

SEED = "interop node"
KEYS = KeyPair.from_seed(hash(b"interop node"))
TARGET = hash(KEYS.public_key)


@dataclass(frozen=True)
class Net:
    """A Node network, and one more persistent Node node that can be told to ask questions."""

    bootstrap: list[str]
    asking: Peer


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """Run a network of this module's own: the nodes that come and go here would slow others down."""
    missing = missing_node()
    if missing:
        pytest.skip(missing)
    with peers_on([]) as group:
        bootstrap = group.start("node", "testnet", size=6).ready["bootstrap"]
        yield Net(bootstrap, group.start("node", "table", bootstrap=bootstrap))


@asynccontextmanager
async def python_node(bootstrap: list[str], **options: Any) -> AsyncIterator[Node]:
    """Run a node with storage, as `dht` puts it together."""
    rng = random.Random(SEED)
    endpoint = Endpoint(UdpNetwork(), rng)
    node = Node(endpoint, random.SystemRandom(), bootstrap=bootstrap, host="127.0.0.1", **options)
    node.on_request = Persistent(node, Router(ForwardStore()), rng).handle
    try:
        await node.start()
        await node.bootstrapped.wait()
        yield node
    finally:
        await node.destroy()
        endpoint.close()


async def ask(peer: Peer, cmd: str, **fields: Any) -> Any:
    """Have a Node process do something while our loop runs."""
    return await asyncio.to_thread(peer.ask, cmd, **fields)


def name_of(node: Node) -> str:
    """Return the node's server address as Node prints it."""
    assert node.server_socket is not None
    return f"127.0.0.1:{node.server_socket.address[1]}"


def address_of(name: str) -> Address:
    """Return the address of what Node printed."""
    host, _, port = name.partition(":")
    return host, int(port)


def persistent_among_nodes(net: Net, body: Callable[[Node, Peer], Awaitable[None]]) -> None:
    """Run a persistent Python node in the network, with a Node process to ask questions."""

    async def main() -> None:
        async with python_node(net.bootstrap, ephemeral=False, firewalled=False) as node:
            await body(node, net.asking)

    asyncio.run(main())


def test_a_node_bootstraps_and_finds_that_it_is_not_firewalled(net: Net) -> None:
    async def main() -> None:
        async with asyncio.timeout(40), python_node(net.bootstrap) as node:
            assert len(node.table) >= 5
            assert not node.firewalled and node.ephemeral
            assert node.remote_address() == address_of(name_of(node))
            query = node.find_node(TARGET)
            await query.finished()
            ids = [reply.id for reply in query.closest_replies if reply.id is not None]
            goal = int.from_bytes(TARGET, "big")
            assert len(ids) >= 6 and ids == sorted(ids, key=lambda id: int.from_bytes(id, "big") ^ goal)

    asyncio.run(main())


def test_a_query_needs_no_bootstrapping_first(net: Net) -> None:
    async def main() -> None:
        rng = random.Random(SEED)
        endpoint = Endpoint(UdpNetwork(), rng)
        node = Node(endpoint, rng, bootstrap=net.bootstrap, host="127.0.0.1")
        await node.start()
        assert not node.bootstrapped.is_set()
        async with asyncio.timeout(20):
            query = node.find_node(TARGET)
            await query.finished()
        assert len(query.closest_replies) >= 6
        await node.destroy()
        endpoint.close()

    asyncio.run(main())


def test_nodes_know_a_persistent_python_node_and_it_answers_them(net: Net) -> None:
    async def body(node: Node, peer: Peer) -> None:
        name = name_of(node)
        assert not node.ephemeral and node.id == node_id(address_of(name))
        assert name in (await ask(peer, "table"))["nodes"]
        assert name in (await ask(peer, "find-node", target=node.id.hex()))["closest"][:1]
        found = await ask(peer, "ask", node=name, command=InternalCommand.FIND_NODE, internal=True, target="07" * 32)
        where = await ask(peer, "where")
        assert found["id"] == node.id.hex() and len(found["closer"]) >= 6
        assert (found["token"], found["value"], found["error"]) == (None, None, 0)
        assert found["to"] == where["address"]
        pong = await ask(peer, "ask", node=name, command=InternalCommand.PING, internal=True)
        assert (pong["closer"], pong["token"], pong["id"]) == ([], None, node.id.hex())
        unknown = await ask(peer, "ask", node=name, command=99, target="07" * 32)
        assert unknown["error"] == ErrorCode.UNKNOWN_COMMAND and unknown["closer"] and not unknown["token"]

    persistent_among_nodes(net, body)


def announcement(node_id: bytes, token: bytes, target: bytes) -> bytes:
    """Return the signed value of an ANNOUNCE."""
    peer = PeerRecord(KEYS.public_key, (("127.0.0.1", 1),))
    signable = announce_signable(target, node_id, token, encode_peer(peer), None, NS_ANNOUNCE)
    return encode_announce(Announce(peer, None, sign(KEYS, signable)))


@pytest.mark.parametrize("target", [TARGET, b"\x07" * 32], ids=["self", "topic"])
def test_a_python_node_stores_announcements_for_node(net: Net, target: bytes) -> None:
    async def body(node: Node, peer: Peer) -> None:
        name, own_id = name_of(node), node.id
        assert own_id is not None
        before = await ask(peer, "ask", node=name, command=Command.LOOKUP, target=target.hex())
        assert before["value"] is None and before["token"]
        refused = await ask(
            peer, "ask", node=name, command=Command.ANNOUNCE, target=target.hex(), token="00" * 32, value="00"
        )
        assert refused["error"] == ErrorCode.INVALID_TOKEN and refused["token"]
        token = bytes.fromhex(refused["token"])
        value = announcement(own_id, token, target)
        stored = await ask(
            peer, "ask", node=name, command=Command.ANNOUNCE, target=target.hex(), token=token.hex(), value=value.hex()
        )
        assert (stored["error"], stored["token"], stored["closer"]) == (0, None, [])
        record = encode_peer(PeerRecord(KEYS.public_key, (("127.0.0.1", 1),)))
        found = await ask(peer, "ask", node=name, command=Command.LOOKUP, target=target.hex())
        assert bytes.fromhex(found["value"]) == b"\x01" + record + b"\x00"
        peer_found = await ask(peer, "ask", node=name, command=Command.FIND_PEER, target=target.hex())
        assert peer_found["value"] == (record.hex() if target == TARGET else None)

    persistent_among_nodes(net, body)


def test_node_stores_what_a_python_query_commits(net: Net) -> None:
    async def body(node: Node, peer: Peer) -> None:
        query = node.query(Command.LOOKUP, TARGET)

        async def store(reply: Any) -> None:
            await node.request(
                reply.source,
                Command.ANNOUNCE,
                target=TARGET,
                token=b"\x00" * 32,  # refused: the value has to be signed anew for the token that comes back
                value=lambda token: announcement(reply.id, token, TARGET),
            )

        assert await query.commit(store) >= 6
        where = await ask(peer, "where")
        reply = await node.request(address_of(where["address"]), Command.FIND_PEER, target=TARGET)
        assert reply.value is not None and reply.value[:32] == KEYS.public_key

    persistent_among_nodes(net, body)


def test_delayed_pings_and_silence(net: Net) -> None:
    async def body(node: Node, peer: Peer) -> None:
        address = address_of((await ask(peer, "where"))["address"])
        loop = asyncio.get_running_loop()
        start = loop.time()
        await node.delayed_ping(address, 0.2)
        assert loop.time() - start >= 0.19  # Node's timers may be a millisecond early
        delayed = InternalCommand.DELAYED_PING
        await ask(peer, "ask", node=name_of(node), command=delayed, internal=True, value="64000000")
        with pytest.raises(Timeout):
            await node.rpc.request(address, InternalCommand.FIND_NODE, internal=True, retries=0)  # no target

    persistent_among_nodes(net, body)
