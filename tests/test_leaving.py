"""A node that leaves in the middle of something, or is cancelled while it leaves, keeps nothing."""

import asyncio

from sim import run
from sim_dht import Swarm, serve, swarm

from p2pclaude.hyperdht.connection import Connection
from p2pclaude.hyperdht.dht import HyperDHT


async def join(network: Swarm, number: int) -> HyperDHT:
    """Start a node that everybody can reach."""
    return await network.join(network.net.host(f"5.8.0.{number}"))


def test_destroy_cancelled_while_a_handler_hangs_has_destroyed_all_the_same() -> None:
    async def hang(_connection: Connection) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with swarm(1, 4) as network:
            node, client = await join(network, 1), await join(network, 2)
            server = node.create_server(hang)
            await server.listen()
            await client.connect(server.public_key)
            await asyncio.sleep(1)
            leaving = asyncio.create_task(node.destroy())
            await asyncio.sleep(0.5)
            assert not leaving.done() and not node.servers and node.handlers  # it waits for the handler
            leaving.cancel()
            await asyncio.wait([leaving])
            assert leaving.cancelled()
            assert not node.endpoint.sockets
            await asyncio.sleep(0.1)
            assert not node.handlers

    run(main(), seed=1)


def test_suspend_cancelled_in_the_middle_has_suspended_all_the_same() -> None:
    async def main() -> None:
        async with swarm(1, 4) as network:
            node, client = await join(network, 1), await join(network, 2)
            server = await serve(node, node.key_pair)
            sleeping = asyncio.create_task(node.suspend())
            await asyncio.sleep(0.01)
            assert not sleeping.done()  # the announcement is being taken back
            sleeping.cancel()
            await asyncio.wait([sleeping])
            assert not node.endpoint.sockets
            await node.resume()
            async with await client.connect(server.public_key):
                pass

    run(main(), seed=1)
