"""Blind relaying with Node: its relay between Python peers, ours between Node's peers, and links that end."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from interop.harness import Event, Peer, Peers
from kit.sim_dht import ask, echo
from kit.sim_relay import Side, pair_of

from p2pclaude.hyperdht import HyperDHT, KeyPair, LinkClosed, LinkOpened, RelayEvent, RelayLimits, RelayServer
from p2pclaude.hyperdht.relay.relay_client import RelayClient

TOKEN = bytes(range(32))
SIZE = 1 << 20


@asynccontextmanager
async def two_nodes(bootstrap: list[str]) -> AsyncIterator[tuple[HyperDHT, HyperDHT]]:
    """Run two Python nodes in the network."""
    options = {"host": "127.0.0.1", "ephemeral": True, "port": 0}
    async with HyperDHT(bootstrap=bootstrap, **options) as one, HyperDHT(bootstrap=bootstrap, **options) as two:  # type: ignore[arg-type]
        yield one, two


@asynccontextmanager
async def python_relay(
    bootstrap: list[str], limits: RelayLimits | None = None
) -> AsyncIterator[tuple[RelayServer, list[RelayEvent]]]:
    """Run a Python relay in the network."""
    events: list[RelayEvent] = []
    async with HyperDHT(bootstrap=bootstrap, host="127.0.0.1", port=0, ephemeral=True) as dht:
        relay = RelayServer(dht, limits, events.append)
        await relay.listen(KeyPair.generate())
        try:
            yield relay, events
        finally:
            await relay.close()


async def tell(peer: Peer, cmd: str, event: str, **fields: object) -> Event:
    """Give a Node process a command and return the event that answers it, while our loop runs."""
    peer.tell(cmd, **fields)
    return await asyncio.to_thread(peer.expect, event)


def test_python_peers_on_nodes_relay(peers: Peers) -> None:
    """Two Python peers meet at a relay of the npm package, in either order; the link ends with them."""

    async def meet(relay: bytes, sides: tuple[Side, Side], first: int) -> None:
        joining = asyncio.create_task(sides[first].join(relay, TOKEN))
        await asyncio.sleep(0.3)
        await sides[1 - first].join(relay, TOKEN)
        await joining
        serving = asyncio.create_task(echo(sides[1].connection))
        data = random.Random(first).randbytes(SIZE)
        assert await ask(sides[0].connection, data) == data
        await sides[0].connection.close()
        await serving
        for side in sides:
            await side.leave()

    async def main(node: Peer) -> None:
        relay = bytes.fromhex(node.ready["publicKey"])
        async with two_nodes(peers.bootstrap) as nodes:
            for first in range(2):
                await meet(relay, pair_of(*nodes, random.Random(f"pair {first}")), first)
        while (stats := await asyncio.to_thread(node.ask, "stats"))["active"]:
            await asyncio.sleep(0.05)
        assert (stats["matched"], stats["pending"]) == (2, 0)

    asyncio.run(main(peers.start("node", "relay")))


def test_unpair_at_nodes_relay(peers: Peers) -> None:
    """A wish that is taken back is gone there, and the connection serves for another."""

    async def main(node: Peer) -> None:
        relay = bytes.fromhex(node.ready["publicKey"])
        async with two_nodes(peers.bootstrap) as nodes:
            sides = pair_of(*nodes, random.Random("pair"))
            client = RelayClient(await nodes[0].connect(relay))
            waiting = asyncio.create_task(client.pair(TOKEN, True, sides[0].stream))
            while not (await asyncio.to_thread(node.ask, "stats"))["pending"]:
                await asyncio.sleep(0.05)
            waiting.cancel()
            while (await asyncio.to_thread(node.ask, "stats"))["pending"]:
                await asyncio.sleep(0.05)
            await client.close()

    asyncio.run(main(peers.start("node", "relay")))


@pytest.mark.parametrize("named_by", ["client", "server", "both"])
def test_node_peers_on_our_relay(peers: Peers, named_by: str) -> None:
    """Node's hyperdht reaches a server that punches no holes through our relay, whichever side names it."""

    async def main() -> None:
        async with python_relay(peers.bootstrap) as (relay, events):
            key = relay.public_key.hex()

            def start(serve: bool, role: str) -> Peer:
                named = key if named_by in (role, "both") else None
                return peers.start("node", "relayed", serve=serve, relay=named)

            server = await asyncio.to_thread(start, True, "server")
            client = await asyncio.to_thread(start, False, "client")
            result = await tell(client, "connect", "result", key=server.ready["publicKey"], bytes=SIZE)
            assert result["ok"], result
            opened = [event for event in events if isinstance(event, LinkOpened)]
            assert len(opened) == 1
            await tell(client, "end", "ended")
            await asyncio.to_thread(server.expect, "closed")
            assert not client.events("lost") and not server.events("lost")
            while relay.links:
                await asyncio.sleep(0.1)
            closed = next(event for event in events if isinstance(event, LinkClosed))
            assert closed.reason == "client"
            assert closed.bytes > 2 * SIZE

    asyncio.run(main())


def test_our_relays_limit_ends_nodes_connection(peers: Peers) -> None:
    """Node's peers learn at once that a link is over, as if each other had broken off."""

    async def main() -> None:
        async with python_relay(peers.bootstrap, RelayLimits(link_bytes=SIZE)) as (relay, events):
            key = relay.public_key.hex()
            server = await asyncio.to_thread(lambda: peers.start("node", "relayed", serve=True))
            client = await asyncio.to_thread(lambda: peers.start("node", "relayed", relay=key))
            result = await tell(client, "connect", "result", key=server.ready["publicKey"], bytes=2 * SIZE)
            assert not result["ok"]
            assert result["error"]["code"] == "ECONNRESET"
            assert [event.reason for event in events if isinstance(event, LinkClosed)] == ["bytes"]
            assert relay.links == 0

    asyncio.run(main())
