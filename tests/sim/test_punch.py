"""Hole punching in the simulator: every pair of NATs, lossy paths, second attempts, mappings that move.

P2PCLAUDE_SEEDS=200 runs so many seeds of each case instead of the few that every run affords.
"""

import asyncio
from errno import EMFILE

import pytest
from kit.sim_dht import DEADLINE, Swarm, ask, can_ask, echo, eventually, internet, serve, swarm
from kit.sim_peers import seeds

from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import HolepunchError, HyperDHTError
from p2pclaude.hyperdht.net.sockets import Socket
from p2pclaude.hyperdht.peer.punch_rounds import ServerHolepunch
from p2pclaude.hyperdht.peer.puncher import Puncher
from p2pclaude.hyperdht.peer.router import Answer
from p2pclaude.hyperdht.peer.setup_messages import Holepunch
from p2pclaude.hyperdht.relay.relay_server import RelayServer
from p2pclaude.hyperdht.rpc.requests import IncomingRequest
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.udx.packet import DESTROY
from sim import Dependence, Host, Nat, PortChoice, SimNetwork, run

KINDS = ("open", "cone", "random")
PAIRS = [(server, client) for server in KINDS for client in KINDS if (server, client) != ("random", "random")]


def _nat(net: SimNetwork, kind: str, address: str, timeout: float = 120.0) -> Nat:
    """Return a NAT that lets in only who was asked; "random" maps each remote endpoint to another port."""
    if kind == "cone":
        return net.nat(address, timeout=timeout)
    return net.nat(address, mapping=Dependence.ADDRESS_AND_PORT, ports=PortChoice.RANDOM, timeout=timeout)


def _host(net: SimNetwork, kind: str, address: str) -> Host:
    return net.host(address) if kind == "open" else _nat(net, kind, address).host("192.168.1.2")


async def _pair(network: Swarm, server_kind: str, client_kind: str) -> tuple[HyperDHT, HyperDHT]:
    net = network.net
    server_node = await network.join(_host(net, server_kind, "5.8.0.1"), port=49737)
    client = await network.join(_host(net, client_kind, "5.8.0.2"))
    await asyncio.sleep(5)
    return server_node, client


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize(("server_kind", "client_kind"), PAIRS)
@pytest.mark.parametrize("seed", seeds(3))
def test_every_pair_of_nats_connects_but_the_one_that_cannot(
    seed: int, server_kind: str, client_kind: str, loss: float
) -> None:
    """One connection on each side, that both can use, and nothing half open."""
    served: list[Connection] = []

    async def handle(connection: Connection) -> None:
        served.append(connection)
        await echo(connection)

    async def main() -> None:
        async with swarm(seed, 12, internet(loss)) as network:
            server_node, client = await _pair(network, server_kind, client_kind)
            server = server_node.create_server(handle)
            await server.listen()
            async with await client.connect(server.public_key, timeout=DEADLINE) as connection:
                if not loss:  # else an open node may not know yet that it is one
                    assert connection.how == ("direct" if "open" in (server_kind, client_kind) else "punched")
                assert await ask(connection, bytes(30_000)) == bytes(30_000)
                assert len(served) == 1
            await asyncio.sleep(60)
            assert len(server_node.endpoint.streams) == len(client.endpoint.streams) == 0
            assert len(server_node.endpoint.sockets) == len(client.endpoint.sockets) == 2

    run(main(), seed=seed)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("kind", ["open", "cone"])
def test_a_client_that_never_hears_the_server_leaves_nothing_on_either_side(kind: str, tells: bool) -> None:
    """The server heard the client, the client gives up: it says so, and if even that is lost the server notices."""
    served: list[Connection] = []

    async def handle(connection: Connection) -> None:
        served.append(connection)
        await echo(connection)

    async def main() -> None:
        async with swarm(5, 12) as network:
            server_node, client = await _pair(network, kind, kind)
            server = server_node.create_server(handle)
            await server.listen()
            network.net.intercept = lambda packet: (
                packet.data[:2] == b"\xff\x01"
                and (packet.destination[0] == "5.8.0.2" or (not tells and bool(packet.data[2] & DESTROY)))
            )
            with pytest.raises(HyperDHTError):
                await client.connect(server.public_key, timeout=4)
            assert len(served) == 1
            await asyncio.sleep(1.5 if tells else 16)
            assert served[0].closed
            await asyncio.sleep(20)
            assert len(server_node.endpoint.streams) == len(client.endpoint.streams) == 0
            assert len(server_node.endpoint.sockets) == len(client.endpoint.sockets) == 2

    run(main(), seed=5)


@pytest.mark.parametrize("seed", seeds(3))
def test_two_random_nats_fail_with_the_true_cause_and_leave_nothing(seed: int) -> None:
    served: list[Connection] = []

    async def handle(connection: Connection) -> None:
        served.append(connection)

    async def main() -> None:
        async with swarm(seed, 12) as network:
            server_node, client = await _pair(network, "random", "random")
            server = server_node.create_server(handle)
            await server.listen()
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(HolepunchError, match="both sides are behind NATs with random ports"):
                await client.connect(server.public_key, timeout=DEADLINE)
            assert loop.time() - started <= DEADLINE
            await asyncio.sleep(60)
            assert served == []
            assert len(server_node.endpoint.streams) == len(client.endpoint.streams) == 0
            assert len(server_node.endpoint.sockets) == len(client.endpoint.sockets) == 2

    run(main(), seed=seed)


@pytest.mark.parametrize(("server_kind", "client_kind"), [("random", "cone"), ("cone", "random")])
def test_random_punching_is_asked_for_once(server_kind: str, client_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's server gives up at the second time of asking, whichever relay it comes through."""
    asked: list[int] = []
    handle = ServerHolepunch.handle

    async def watch(punch: ServerHolepunch, message: Holepunch, request: IncomingRequest) -> Answer | None:
        payload = punch._secrets.open(message.payload)
        asked.extend([payload.round] if payload.punching else [])
        return await handle(punch, message, request)

    async def main() -> None:
        async with swarm(1, 12, internet()) as network:
            server_node, client = await _pair(network, server_kind, client_kind)
            server = await serve(server_node, server_node.key_pair)
            connection = await client.connect(server.public_key, timeout=40)
            await connection.close()
            assert len(asked) == 1

    monkeypatch.setattr(ServerHolepunch, "handle", watch)
    run(main(), seed=1)


@pytest.mark.parametrize(("server_kind", "client_kind"), [("random", "cone"), ("cone", "random")])
def test_ports_stay_open_as_long_as_upstream_probes_them(
    server_kind: str, client_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream sends a quarter of our probes in a second, for 35 seconds: the one that meets may be late."""
    probe = Puncher._probe_random_ports

    async def probe_late(puncher: Puncher) -> None:
        await asyncio.sleep(28)
        await probe(puncher)

    async def main() -> None:
        async with swarm(1, 12, internet()) as network:
            server_node, client = await _pair(network, server_kind, client_kind)
            server = await serve(server_node, server_node.key_pair)
            began = asyncio.get_running_loop().time()
            connection = await client.connect(server.public_key, timeout=40)
            assert 28 < asyncio.get_running_loop().time() - began < 36
            await connection.close()

    monkeypatch.setattr(Puncher, "_probe_random_ports", probe_late)
    run(main(), seed=1)


def test_a_process_with_few_file_descriptors_punches_with_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    bind, left = Puncher._bind, 100

    async def scarce(puncher: Puncher) -> Socket:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(EMFILE, "too many open files")
        return await bind(puncher)

    async def main() -> None:
        async with swarm(2, 12, internet()) as network:
            server_node, client = await _pair(network, "random", "cone")
            server = await serve(server_node, server_node.key_pair)
            async with await client.connect(server.public_key, timeout=40) as connection:
                assert await ask(connection, b"hello") == b"hello"
            assert left < 0

    monkeypatch.setattr(Puncher, "_bind", scarce)
    run(main(), seed=2)


def test_a_client_without_a_file_descriptor_for_punching_takes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay leads to the server all the same; without one there is no path, which is said as it always is."""

    async def refuse(puncher: Puncher) -> Socket:
        raise OSError(EMFILE, "too many open files")

    async def main() -> None:
        async with swarm(2, 12, internet()) as network:
            server_node, client = await _pair(network, "cone", "cone")
            server = await serve(server_node, server_node.key_pair)
            relay = RelayServer(network.bootstrap)
            await relay.listen()
            monkeypatch.setattr(Puncher, "_bind", refuse)
            with pytest.raises(HolepunchError):
                await client.connect(server.public_key)
            async with await client.connect(server.public_key, relay_through=relay.public_key) as connection:
                assert connection.how == "relayed"
                assert await ask(connection, b"hello") == b"hello"
            await relay.close()

    run(main(), seed=2)


@pytest.mark.parametrize(("server_kind", "client_kind"), [("random", "cone"), ("cone", "random")])
@pytest.mark.parametrize("seed", seeds(3))
def test_a_second_attempt_right_after_the_first_succeeds_too(seed: int, server_kind: str, client_kind: str) -> None:
    """Both sides must leave twenty seconds between two punches through a random NAT; the attempt waits for that."""

    async def main() -> None:
        async with swarm(seed, 12) as network:
            server_node, client = await _pair(network, server_kind, client_kind)
            server = await serve(server_node, server_node.key_pair)
            for _ in range(2):
                connection = await client.connect(server.public_key, timeout=40)
                assert await ask(connection, b"hello") == b"hello"
                await connection.close()

    run(main(), seed=seed)


@pytest.mark.parametrize("kind", ["cone", "random"])
def test_an_idle_punched_connection_stays_open(kind: str) -> None:
    """Mappings live for half a minute only."""

    async def main() -> None:
        async with swarm(1, 12, internet(loss=0.02)) as network:
            net = network.net
            server_node = await network.join(_nat(net, "cone", "5.8.0.1", timeout=30).host("192.168.1.2"))
            client = await network.join(_nat(net, kind, "5.8.0.2", timeout=30).host("192.168.1.2"))
            await asyncio.sleep(5)
            server = await serve(server_node, server_node.key_pair)
            async with await client.connect(server.public_key, timeout=DEADLINE) as connection:
                await asyncio.sleep(1800)
                assert await ask(connection, b"still there") == b"still there"

    run(main(), seed=1)


@pytest.mark.parametrize("seed", seeds(3))
def test_a_server_whose_mapping_moves_is_reachable_within_ten_seconds(seed: int) -> None:
    async def main() -> None:
        async with swarm(seed, 12) as network:
            nat = _nat(network.net, "cone", "5.8.0.1")
            server_node = await network.join(nat.host("192.168.1.2"))
            client = await network.join(_host(network.net, "cone", "5.8.0.2"))
            await asyncio.sleep(5)
            server = await serve(server_node, server_node.key_pair)
            assert await can_ask(client, server.public_key)
            for address in (None, "5.8.0.77"):
                await asyncio.sleep(network.net.random(f"moment {address}").uniform(0, 20))
                nat.rebind(address)
                assert await eventually(lambda: _opens(client, server.public_key), 10, 0.2)

    run(main(), seed=seed)


async def _opens(client: HyperDHT, key: bytes) -> bool:
    try:
        async with await client.connect(key, timeout=3) as connection:
            return await ask(connection, b"ping") == b"ping"
    except HyperDHTError:
        return False
