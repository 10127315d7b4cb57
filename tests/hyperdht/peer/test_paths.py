"""The ways of one stream: from a relay to a direct way and back, after a peer that moved; not a byte is lost."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from kit.sim_dht import DEADLINE, Swarm, ask, echo, eventually, internet, swarm
from kit.sim_peers import seeds
from sim import Dependence, Host, Nat, PortChoice, SimNetwork, run
from sim.realm import Packet

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import ConnectionClosed, HolepunchError
from p2pclaude.hyperdht.peer.paths import LOST_GRACE
from p2pclaude.hyperdht.relay.relay_server import RelayServer
from p2pclaude.hyperdht.secure.connection import Connection

RELAY = "5.8.8.8"
SIZE = 2_000_000


def nat(net: SimNetwork, kind: str, number: int) -> Nat:
    """Return a NAT that lets in only who was asked."""
    if kind == "cone":
        return net.nat(f"5.9.0.{number}")
    return net.nat(f"5.9.0.{number}", mapping=Dependence.ADDRESS_AND_PORT, ports=PortChoice.RANDOM)


@dataclass
class Pair:
    """A server and a client, each behind a NAT of its own, and a relay that the server names."""

    network: Swarm
    server_nat: Nat
    client_nat: Nat
    server_node: HyperDHT
    client: HyperDHT
    relay: RelayServer
    key: bytes = b""

    async def serve(self) -> None:
        server = self.server_node.create_server(echo, relay_through=self.relay.public_key)
        await server.listen(KeyPair.generate(self.network.net.random("server")))
        self.key = server.public_key
        await asyncio.sleep(5)

    def is_direct(self, packet: Packet) -> bool:
        """Tell whether a packet is on its way from one peer to the other without a relay between."""
        own = {*self.server_nat.addresses, *self.client_nat.addresses}
        return (
            packet.destination[0] in own
            and isinstance(packet.origin, Host)
            and packet.origin.realm
            in (
                self.server_nat.lan,
                self.client_nat.lan,
            )
        )

    def hold_probes_back(self, seconds: float) -> None:
        """Let no probe through for a while, so that the relay is there first."""
        net = self.network.net
        until = net.loop.now + seconds
        net.intercept = lambda packet: len(packet.data) == 1 and self.is_direct(packet) and net.loop.now < until

    def is_clean(self) -> bool:
        """Tell whether both nodes hold nothing but their own two sockets."""
        return all(
            not node.endpoint.streams and len(node.endpoint.sockets) == 2 for node in (self.server_node, self.client)
        )


@asynccontextmanager
async def pair(seed: int, server: str, client: str, loss: float = 0.0) -> AsyncIterator[Pair]:
    """Run a network with a server behind one kind of NAT and a client behind another."""
    async with swarm(seed, 12) as network:
        net = network.net
        nats = nat(net, server, 1), nat(net, client, 2)
        nodes = [await network.join(made.host(f"192.168.{i}.2")) for i, made in enumerate(nats)]
        relay = RelayServer(await network.join(net.host(RELAY)))
        await relay.listen(KeyPair.generate(net.random("relay")))
        net.internet.link = internet(loss)
        made = Pair(network, *nats, nodes[0], nodes[1], relay)
        await made.serve()
        try:
            yield made
        finally:
            await relay.close()


async def bulk(connection: Connection, data: bytes) -> None:
    """Send `data` to an echo server and compare what comes back, while both are under way."""
    received = hashlib.sha256()

    async def read() -> None:
        left = len(data)
        while left and (part := await connection.read()):
            received.update(part)
            left -= len(part)

    reading = asyncio.create_task(read())
    for start in range(0, len(data), 20_000):
        await connection.write(data[start : start + 20_000])
        await asyncio.sleep(0.02)
    await reading
    assert received.digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("loss", [0.0, 0.05])
@pytest.mark.parametrize("kinds", [("cone", "random"), ("random", "cone")])
@pytest.mark.parametrize("seed", seeds(2))
def test_a_relayed_stream_moves_to_the_direct_way_without_losing_a_byte(
    seed: int, kinds: tuple[str, str], loss: float
) -> None:
    """The relay is there first; random probes find a way while data flows."""

    async def main() -> None:
        async with pair(seed, *kinds, loss) as place:
            place.hold_probes_back(4)
            async with await place.client.connect(place.key, timeout=DEADLINE) as connection:
                assert connection.how == "relayed"
                await bulk(connection, place.network.net.rng.randbytes(SIZE))

                async def is_punched() -> bool:
                    return connection.how == "punched"

                assert await eventually(is_punched, 30)
                await asyncio.sleep(10)
                assert place.relay.links == 0  # given back
                await bulk(connection, place.network.net.rng.randbytes(200_000))
            await asyncio.sleep(40)
            assert place.is_clean()

    run(main(), seed=seed)


@pytest.mark.parametrize("seed", seeds(3))
def test_a_direct_way_that_carries_probes_and_nothing_else_is_left_again(seed: int) -> None:
    """A firewall that knows UDX: the punched way opens, and the stream falls back to the relay."""

    async def main() -> None:
        async with pair(seed, "cone", "random") as place:
            place.network.net.intercept = lambda packet: packet.data[:1] == b"\xff" and place.is_direct(packet)
            async with await place.client.connect(place.key, timeout=DEADLINE) as connection:
                for _ in range(5):
                    await bulk(connection, place.network.net.rng.randbytes(500_000))
                assert connection.how == "relayed"
            await asyncio.sleep(60)
            assert place.is_clean()

    run(main(), seed=seed)


@pytest.mark.parametrize("seed", seeds(3))
def test_a_direct_way_that_dies_right_after_the_move_is_left_for_the_relay(seed: int) -> None:
    async def main() -> None:
        async with pair(seed, "cone", "random") as place:
            net = place.network.net
            dead: list[float] = []
            on_relay = False

            def intercept(packet: Packet) -> bool:
                if packet.data[:1] != b"\xff" or not place.is_direct(packet):
                    return False
                if on_relay:
                    dead.append(net.loop.now)
                return not 0 < len(dead) <= 6  # the first packets pass, of those that could move it from the relay

            net.intercept = intercept
            async with await place.client.connect(place.key, timeout=DEADLINE) as connection:
                on_relay = True
                assert connection.how == "relayed"
                await bulk(connection, net.rng.randbytes(SIZE))
                await asyncio.sleep(15)
                assert dead
                await bulk(connection, net.rng.randbytes(50_000))

    run(main(), seed=seed)


@pytest.mark.parametrize("mover", ["client", "server"])
@pytest.mark.parametrize("seed", seeds(3))
def test_a_connection_goes_on_when_a_mapping_moves(seed: int, mover: str) -> None:
    """The NAT of one side gives its flows other ports while bulk data flows."""

    async def main() -> None:
        async with pair(seed, "cone", "cone") as place:
            connection = await place.client.connect(place.key, timeout=DEADLINE)
            assert connection.how == "punched"
            sending = asyncio.create_task(bulk(connection, place.network.net.rng.randbytes(SIZE)))
            await asyncio.sleep(1)
            for made in (place.client_nat, place.server_nat):
                made.filtering = Dependence.ENDPOINT  # else no packet would come through any more
            (place.client_nat if mover == "client" else place.server_nat).rebind()
            async with asyncio.timeout(20):
                await sending
            assert await ask(connection, b"still there") == b"still there"
            await connection.close()

    run(main(), seed=seed)


def test_two_random_nats_without_a_relay_fail_fast_with_the_true_cause() -> None:
    async def main() -> float:
        async with pair(1, "random", "random") as place:
            server = place.server_node.create_server(echo)
            await server.listen(KeyPair.generate(place.network.net.random("other")))
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(HolepunchError, match="both sides are behind NATs with random ports"):
                await place.client.connect(server.public_key)
            seconds = loop.time() - started
            await asyncio.sleep(40)
            assert place.is_clean()
            return seconds

    assert run(main(), seed=1) < 8


def test_two_random_nats_meet_at_the_relay_and_stay() -> None:
    async def main() -> None:
        async with pair(1, "random", "random", 0.1) as place:
            async with await place.client.connect(place.key) as connection:
                assert connection.how == "relayed"
                await bulk(connection, place.network.net.rng.randbytes(SIZE))
                await asyncio.sleep(120)
                assert connection.how == "relayed"
                assert await ask(connection, b"still there") == b"still there"
            await asyncio.sleep(40)
            assert place.is_clean()

    run(main(), seed=1)


@pytest.mark.parametrize("seed", seeds(4))
def test_a_link_that_was_not_needed_is_given_back(seed: int) -> None:
    """The direct way and the relay are there at about the same time."""

    async def main() -> None:
        async with pair(seed, "cone", "cone") as place, await place.client.connect(place.key) as connection:

            async def is_free() -> bool:
                return connection.how == "punched" and not place.relay.links and not place.relay.connections

            assert await eventually(is_free, 30)
            assert await ask(connection, b"hello") == b"hello"

    run(main(), seed=seed)


def test_a_relay_that_leaves_is_missed_soon() -> None:
    """It ends its connections to both peers, and says nothing on the stream, as those of blind-relay do."""

    async def main() -> None:
        async with pair(1, "random", "random") as place:
            connection = await place.client.connect(place.key, timeout=DEADLINE)
            assert connection.how == "relayed" and await ask(connection, b"hello") == b"hello"
            await asyncio.sleep(20)
            await next(node for node in place.network.joined if node.local_addresses == [RELAY]).destroy()
            async with asyncio.timeout(LOST_GRACE + 1):
                with pytest.raises(ConnectionClosed, match="the relay ended the link"):
                    await connection.read()
            await asyncio.sleep(1)
            assert not place.server_node.context.handlers
            await asyncio.sleep(30)
            assert place.is_clean()

    run(main(), seed=1)
