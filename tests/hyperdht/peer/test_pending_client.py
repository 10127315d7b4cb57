"""A client whose handshake was answered: what it holds while it waits, and that nothing stays when it never comes."""

import asyncio
from contextlib import suppress

import pytest
from kit.sim_dht import Swarm, cone, echo, is_clean, swarm, symmetric
from sim import Host, run

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import HolepunchError, HyperDHTError
from p2pclaude.hyperdht.peer import pending_client
from p2pclaude.hyperdht.peer.announcer import Announcer
from p2pclaude.hyperdht.peer.punch_rounds import ClientHolepunch
from p2pclaude.hyperdht.secure.noise import NoiseIK
from p2pclaude.hyperdht.udx.packet import PREFIX


async def joined(network: Swarm, host: Host) -> HyperDHT:
    node = await network.join(host)
    await asyncio.sleep(5)
    return node


@pytest.mark.parametrize("kind", ["cone", "symmetric"])
@pytest.mark.parametrize("after", [0.15, 0.3, 1.5])
def test_a_client_that_vanishes_leaves_nothing_behind(kind: str, after: float) -> None:
    """Before the rounds, during them, and while 256 sockets send probes."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            net = network.net
            server_node = await joined(network, (cone if kind == "cone" else symmetric)(net, 1))
            client_host = cone(net, 2)
            client = await joined(network, client_host)
            server = server_node.create_server(echo)
            await server.listen()
            attempt = asyncio.create_task(client.connect(server.public_key))
            await asyncio.sleep(after)
            client_host.up = False
            await asyncio.sleep(1)
            attempt.cancel()
            await asyncio.wait([attempt])
            await asyncio.sleep(pending_client.PUNCH_TIMEOUT + pending_client.HANDSHAKE_TIMEOUT)
            assert is_clean(server_node)
            assert server_node.context.throttle.allows(asyncio.get_running_loop().time())
            client_host.up = True
            async with await client.connect(server.public_key, timeout=40):
                pass

    run(main(), seed=1)


@pytest.mark.parametrize("kind", ["cone", "symmetric"])
def test_a_client_that_says_again_that_it_punches_gets_no_more_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or anybody could hold hundreds of sockets, and both of the random punches that go on at a time, for good."""

    async def insist(self: ClientHolepunch) -> None:
        token = await self._probe_rounds()
        while True:
            with suppress(HolepunchError):
                await self._punch_round(token)
            await asyncio.sleep(5)

    async def main() -> None:
        async with swarm(1, 12) as network:
            server_node = await joined(network, (cone if kind == "cone" else symmetric)(network.net, 1))
            client = await joined(network, cone(network.net, 2))
            server = server_node.create_server(echo)
            await server.listen()
            network.net.intercept = lambda packet: len(packet.data) == 1 or packet.data[:2] == PREFIX  # no path
            attempt = asyncio.create_task(client.connect(server.public_key, timeout=100))
            await asyncio.sleep(5)
            assert len(server_node.endpoint.sockets) == (3 if kind == "cone" else 642)
            await asyncio.sleep(pending_client.HANDSHAKE_TIMEOUT + pending_client.PUNCH_TIMEOUT - 5)
            assert not attempt.done()
            assert is_clean(server_node) and not server_node.context.throttle._active
            attempt.cancel()
            await asyncio.wait([attempt])

    monkeypatch.setattr(ClientHolepunch, "run", insist)
    run(main(), seed=1)


def test_a_client_that_gives_up_frees_the_server_soon() -> None:
    """Both NATs random, no relay: the client says that it gives up."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            server_node = await joined(network, symmetric(network.net, 1))
            client = await joined(network, symmetric(network.net, 2))
            server = server_node.create_server(echo)
            await server.listen()
            with pytest.raises(HyperDHTError):
                await client.connect(server.public_key)
            await asyncio.sleep(pending_client.HANDSHAKE_TIMEOUT + 16)
            assert is_clean(server_node) and is_clean(client)

    run(main(), seed=1)


def test_probes_begin_in_the_moment_in_which_the_time_is_over() -> None:
    """Then it is over; the round is answered all the same."""

    async def main() -> None:
        async with swarm(1, 4) as network:
            node = await network.join(network.net.host("5.8.0.1"))
            announcer = Announcer(node.node, node.key_pair)
            keys = [KeyPair.generate(network.net.random(f"key {number}")) for number in range(4)]
            initiator = NoiseIK.initiator(keys[0], keys[1].public_key, keys[2])
            responder = NoiseIK.responder(keys[1], keys[3])
            responder.read_message(initiator.write_message(b""))
            client = pending_client.PendingClient(node.context, announcer, keys[1].public_key, responder, None)
            waiting = asyncio.create_task(client.wait_opened())
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(pending_client.HANDSHAKE_TIMEOUT, client._on_punch)
            assert not await waiting
            assert asyncio.get_running_loop().time() < pending_client.PUNCH_TIMEOUT

    run(main(), seed=1)
