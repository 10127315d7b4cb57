"""A node that leaves in the middle of something, or is cancelled while it leaves, keeps nothing."""

import asyncio

import pytest
from kit.sim_dht import Swarm, cone, serve, swarm
from sim import Dependence, PortChoice, run

from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.secure.connection import Connection


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
            assert not leaving.done() and not node.servers and node.context.handlers  # it waits for the handler
            leaving.cancel()
            await asyncio.wait([leaving])
            assert leaving.cancelled()
            assert not node.endpoint.sockets
            await asyncio.sleep(0.1)
            assert not node.context.handlers

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


@pytest.mark.parametrize("leave", ["destroy", "suspend"])
@pytest.mark.parametrize("mapping", [Dependence.ENDPOINT, Dependence.ADDRESS_AND_PORT])
def test_a_client_that_leaves_as_soon_as_it_is_connected_keeps_no_socket(leave: str, mapping: Dependence) -> None:
    """What was under way beside the way that won ends too, and counts no longer as a hole punch."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            net = network.net
            node = await network.join(cone(net, 1))
            host = net.nat("5.8.0.2", mapping=mapping, ports=PortChoice.RANDOM).host("192.168.2.2")
            client = await network.join(host)
            await asyncio.sleep(5)
            server = await serve(node, node.key_pair)
            connection = await client.connect(server.public_key)
            assert connection.how == "punched"
            await (client.destroy() if leave == "destroy" else client.suspend())
            await asyncio.sleep(0.1)
            assert not host.sockets
            await asyncio.sleep(30)
            assert client.context.throttle._active == 0

    run(main(), seed=1)


def test_resume_waits_for_a_suspend_under_way() -> None:
    """As when a machine is woken right after it went to sleep: the node is awake in the end, and announced once."""

    async def main() -> None:
        async with swarm(1, 4) as network:
            node, client = await join(network, 1), await join(network, 2)
            server = await serve(node, node.key_pair)
            sleeping = asyncio.create_task(node.suspend())
            await asyncio.sleep(0.01)
            assert not sleeping.done()
            await node.resume()
            assert sleeping.done()
            async with await client.connect(server.public_key):
                pass
            await node.suspend()
            waking = asyncio.create_task(node.resume())
            await asyncio.sleep(0)
            await asyncio.wait_for(node.suspend(), 0.2)  # does not wait for the announcement
            await waking
            await node.resume()
            assert server.relay_addresses
            assert server._announcer is not None
            await server.close()
            await asyncio.sleep(60)
            assert not server._announcer.relays  # no second announcer goes on

    run(main(), seed=1)
