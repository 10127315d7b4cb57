"""A server under load and abuse: floods of handshakes, thousands of clients, what stays when they are gone."""

import asyncio
import gc
import weakref
from random import Random

import pytest
from kit.sim_dht import DEADLINE, Swarm, ask, cone, echo, is_clean, serve, swarm
from kit.sim_peers import seeds
from sim import Host, Packet, SimLoop, SimulationError, run

from p2pclaude.hyperdht.constants import Command, Firewall, Mode
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import HyperDHTError
from p2pclaude.hyperdht.peer import slots as slots_module
from p2pclaude.hyperdht.peer.pending_client import HANDSHAKE_TIMEOUT, PUNCH_TIMEOUT
from p2pclaude.hyperdht.peer.setup_messages import (
    Handshake,
    NoisePayload,
    UdxInfo,
    encode_handshake,
    encode_noise_payload,
)
from p2pclaude.hyperdht.rpc.messages import Request, encode_request
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.secure.noise import NoiseIK


def handshake_datagram(server_key: bytes, rng: Random, to: Address, peer: Address | None) -> bytes:
    """Return a valid handshake of a new client, as a relay (`peer` given) or the client itself sends it."""
    noise = NoiseIK.initiator(KeyPair.generate(rng), server_key, KeyPair.generate(rng))
    payload = NoisePayload(
        firewall=Firewall.UNKNOWN,
        addresses4=(),
        udx=UdxInfo(reusable_socket=False, id=rng.getrandbits(32)),
        secret_stream=True,
    )
    message = noise.write_message(encode_noise_payload(payload))
    mode = Mode.FROM_CLIENT if peer is None else Mode.FROM_RELAY
    value = encode_handshake(Handshake(mode, message, peer))
    return encode_request(
        Request(rng.getrandbits(16), to, Command.PEER_HANDSHAKE, False, None, None, blake2b(server_key), value)
    )


async def place(network: Swarm, behind_nat: bool) -> tuple[HyperDHT, Host]:
    """Start a server's node and return it with the attacker's host."""
    net = network.net
    if behind_nat:
        nat = net.nat("5.8.0.1")
        host = nat.host("192.168.1.2")
    else:
        host = net.host("5.8.0.1")
    node = await network.join(host, port=49737)
    await asyncio.sleep(5)
    return node, net.host("5.66.0.1")


@pytest.mark.parametrize("hosts", ["one", "many"])
@pytest.mark.parametrize("behind_nat", [False, True])
def test_a_flood_of_handshakes_is_bounded_and_others_still_get_in(hosts: str, behind_nat: bool) -> None:
    """A thousand a second: directly from one host, or in the name of a thousand through a hostile relay."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            node, attacker = await place(network, behind_nat)
            client = await network.join(network.net.nat("5.8.0.2").host("192.168.2.2"))
            server = await serve(node, node.key_pair)
            running = await client.connect(server.public_key, timeout=DEADLINE)
            tasks = len(asyncio.all_tasks())
            if behind_nat:  # only who was asked gets through: the attacker is one of the server's relays
                assert server._announcer is not None
                path = server._announcer.relays[0]
                attacker, to = network.net.host(path.relay_address[0]), path.peer_address
                mapping = next(n for n in network.nodes if n.remote_address == path.relay_address)
                send = mapping.node.socket
            else:
                to, send = ("5.8.0.1", 49737), None
            flooding = asyncio.create_task(_flood(attacker, server.public_key, to, hosts, send))
            most = 0
            for _ in range(4):
                await asyncio.sleep(0.5)
                most = max(most, len(server._slots))
                assert len(server._slots) <= slots_module.MAX_PENDING
                assert len(node.endpoint.streams) <= slots_module.MAX_PENDING + 50
                assert len(node.endpoint.sockets) <= slots_module.MAX_PENDING + 50
                assert await ask(running, b"still there") == b"still there"
            assert most > 50  # the flood is one
            late = await network.join(network.net.nat("5.8.0.3").host("192.168.3.2"))
            async with await late.connect(server.public_key, timeout=DEADLINE) as connection:
                assert await ask(connection, b"hello") == b"hello"
            await flooding
            await late.destroy()
            await running.close()
            await asyncio.sleep(HANDSHAKE_TIMEOUT + PUNCH_TIMEOUT)
            assert is_clean(node)
            assert server._slots.is_settled
            assert len(asyncio.all_tasks()) <= tasks + 3

    run(main(), seed=1)


async def _flood(attacker: Host, key: bytes, to: Address, hosts: str, send: object) -> None:
    def peer(number: int) -> Address | None:
        if send is None and hosts == "one":
            return None
        return ("5.55.5.5", 1000 + number) if hosts == "one" else (f"5.55.{number >> 8}.{number & 255}", 1000)

    rng = attacker.world.random("flood")
    loop = asyncio.get_running_loop()
    started = loop.time()
    socket = None if send is not None else await attacker.bind("0.0.0.0", 0, lambda _: None)
    for number in range(2200):
        datagram = handshake_datagram(key, rng, to, peer(number))
        if socket is not None:
            socket.send([datagram], to)
        else:
            send.send([datagram], to)  # type: ignore[attr-defined]
        await asyncio.sleep(max(0.0, started + number / 1000 - loop.time()))
    if socket is not None:
        socket.close()


async def _connect_and_close(client: HyperDHT, key: bytes, number: int) -> None:
    connection = await client.connect(key, timeout=DEADLINE)
    assert await ask(connection, b"x" * (number % 5 + 1))
    if number % 7:
        await connection.close()
    else:
        connection.abort()


def _timers(loop: SimLoop) -> int:
    return len(loop.pending_timers())


@pytest.mark.parametrize("kind", ["open", "cone"])
def test_hundreds_of_connects_and_closes_leave_nothing_behind(kind: str) -> None:
    """P2PCLAUDE_SEEDS=1000 makes ten thousand of them."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            node, _ = await place(network, kind == "cone")
            client = await network.join(network.net.nat("5.8.0.2").host("192.168.2.2"))
            server = await serve(node, node.key_pair)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimLoop)

            async def rounds(count: int) -> tuple[int, int, int]:
                for number in range(count):
                    numbers = range(number, number + 10)
                    await asyncio.gather(*(_connect_and_close(client, server.public_key, n) for n in numbers))
                await asyncio.sleep(60)
                assert is_clean(node) and is_clean(client)
                assert server._slots.is_settled
                gc.collect()
                connections = sum(isinstance(thing, Connection) for thing in gc.get_objects())
                return len(asyncio.all_tasks()), _timers(loop), connections

            before = await rounds(5)
            after = await rounds(len(seeds(25)))
            assert after[0] <= before[0] + 3
            assert after[1] <= before[1] + 10
            assert after[2] <= 2
            await client.destroy()

    run(main(), seed=1, cpu_limit=900)


@pytest.mark.parametrize("kind", ["open", "cone"])
def test_what_is_over_needs_no_collector_of_cycles(kind: str) -> None:
    """That one looks seldom: what a thousand strangers leave would stay until then."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            node, _ = await place(network, kind == "cone")
            client = await network.join(network.net.nat("5.8.0.2").host("192.168.2.2"))
            connections: list[weakref.ref[Connection]] = []

            async def handle(connection: Connection) -> None:
                connections.append(weakref.ref(connection))
                await echo(connection)

            server = node.create_server(handle)
            await server.listen()
            gc.collect()
            gc.disable()
            try:
                for number in range(6):
                    await _connect_and_close(client, server.public_key, number)
                assert len(connections) == 6
                await asyncio.sleep(60)
                assert not any(one() for one in connections)
            finally:
                gc.enable()
            await client.destroy()

    run(main(), seed=1)


def test_packets_heard_and_sent_again_open_nothing_where_only_one_key_is_allowed() -> None:
    """Whoever hears all that a welcome client sends can say it again, at once or later, and from another place."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            node, attacker = await place(network, False)
            welcome = await network.join(network.net.host("5.8.0.2"))
            opened: list[bytes] = []

            async def handle(connection: Connection) -> None:
                opened.append(connection.remote_public_key)
                await echo(connection)

            asked: list[bytes] = []

            def allow(key: bytes, _: Address) -> bool:
                asked.append(key)
                return key == welcome.key_pair.public_key

            server = node.create_server(handle, allow=allow)
            await server.listen()
            heard: list[bytes] = []

            def hear(packet: Packet) -> bool:
                if packet.origin is not attacker and packet.destination == ("5.8.0.1", 49737):
                    heard.append(packet.data)
                return False

            network.net.intercept = hear
            async with await welcome.connect(server.public_key, timeout=DEADLINE) as connection:
                assert await ask(connection, b"secret") == b"secret"
            said = heard.copy()
            again = await attacker.bind("0.0.0.0", 0, lambda _: None)
            for pause in (0.0, 1.0, 2 * HANDSHAKE_TIMEOUT, 2 * HANDSHAKE_TIMEOUT):
                await asyncio.sleep(pause)
                for data in said:
                    again.send([data], ("5.8.0.1", 49737))
                    await asyncio.sleep(0.01)
                assert len(server._slots) <= 1
            assert (
                asked == [welcome.key_pair.public_key] * 3
            )  # the first copies came within the time of an answer's repeats
            await asyncio.sleep(2 * HANDSHAKE_TIMEOUT)
            assert opened == [welcome.key_pair.public_key]
            assert not server._slots
            async with await welcome.connect(server.public_key, timeout=DEADLINE) as connection:
                assert await ask(connection, b"hello") == b"hello"
            await welcome.destroy()
            again.close()

    run(main(), seed=1)


def test_who_finds_no_room_at_first_comes_in_with_a_repetition() -> None:
    """Many behind one NAT come at once: a place is taken for as long as a hole takes to punch."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            node, _ = await place(network, True)
            nat = network.net.nat("5.8.0.2")
            clients = [await network.join(nat.host(f"192.168.2.{number}")) for number in range(2, 6)]
            server = await serve(node, node.key_pair)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(slots_module, "MAX_PENDING", 1)
                came = await asyncio.gather(*(client.connect(server.public_key) for client in clients))
            for connection in came:
                assert await ask(connection, b"hello") == b"hello"

    run(main(), seed=1)


@pytest.mark.parametrize("end", ["close", "suspend"])
def test_who_waits_for_a_turn_when_the_server_ends_does_not_come_in(end: str) -> None:
    """The turns of a flood of clients come later than the end."""

    async def main() -> None:
        async with swarm(1, 4) as network:
            node, _ = await place(network, False)
            served: list[Connection] = []

            async def handle(connection: Connection) -> None:
                served.append(connection)

            server = node.create_server(handle)
            await server.listen()
            clients = await asyncio.gather(*(network.join(network.net.host(f"5.9.0.{n}")) for n in range(1, 9)))
            key = server.public_key
            attempts = [asyncio.create_task(client.connect(key, timeout=5)) for client in clients for _ in range(20)]
            while len(server._turns) < 50:
                await asyncio.sleep(0.01)
            ending = asyncio.create_task(server.close() if end == "close" else node.suspend())
            await asyncio.sleep(0)
            if end == "suspend":  # which lets clients in until the announcement is taken back, and breaks them off
                await ending
            before = len(served)
            assert len(server._turns)
            for _ in range(20):
                await asyncio.sleep(0.1)
                assert not server._slots and len(served) == before
            assert not len(server._turns)
            await asyncio.gather(ending, *attempts, return_exceptions=True)

    run(main(), seed=1)


def test_who_comes_again_after_the_server_slept_gets_a_new_answer() -> None:
    """The one of before names a stream that is gone, and is kept for some time."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            loop = asyncio.get_running_loop()
            node, _ = await place(network, False)
            host = network.net.host("5.8.0.2")
            client = await network.join(host)
            server = await serve(node, node.key_pair)
            network.net.intercept = lambda packet: packet.destination[0] == host.addresses[0] and bool(server._answers)
            attempt = asyncio.create_task(client.connect(server.public_key, timeout=DEADLINE))
            while not server._slots:
                await asyncio.sleep(0.01)
            await node.suspend()
            await node.resume()
            network.net.intercept = None
            started = loop.time()
            async with await attempt as connection:
                assert await ask(connection, b"hello") == b"hello"
            assert loop.time() - started < 5

    run(main(), seed=1)


def test_a_client_that_cannot_be_answered_leaves_nothing_behind() -> None:
    """The socket to punch from is there already when something else fails."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            node, _ = await place(network, True)
            client = await network.join(network.net.nat("5.8.0.2").host("192.168.2.2"))
            server = await serve(node, node.key_pair)

            def fail() -> list[str]:
                raise ZeroDivisionError

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(node.endpoint.network, "interfaces", fail)
                with pytest.raises(HyperDHTError):
                    await client.connect(server.public_key, timeout=4)
            await asyncio.sleep(1)
            assert is_clean(node)
            assert server._slots.is_settled and not server._slots.held
            async with await client.connect(server.public_key):
                pass

    with pytest.raises(SimulationError, match=r"^an exception was swallowed: logged: answering a handshake failed"):
        run(main(), seed=1)


@pytest.mark.parametrize("how", ["returns", "raises", "hangs"])
def test_a_handler_that_ends_in_any_way_ends_its_connection(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def handle(connection: Connection) -> None:
            await connection.read()
            if how == "hangs":
                await connection.wait_closed()
            elif how == "raises":
                raise ZeroDivisionError

        async with swarm(1, 6) as network:
            node, _ = await place(network, True)
            client = await network.join(network.net.nat("5.8.0.2").host("192.168.2.2"))
            server = node.create_server(handle)
            await server.listen()
            connection = await client.connect(server.public_key)
            await connection.write(b"go")
            if how == "hangs":
                connection.abort()
            await asyncio.sleep(40)
            assert connection.closed or await _eof(connection)
            await connection.close()
            await asyncio.sleep(30)
            assert is_clean(node)
            caplog.clear()

    if how == "raises":
        with pytest.raises(
            SimulationError, match=r"^an exception was swallowed: logged: a connection's handler failed"
        ):
            run(main(), seed=1)
    else:
        run(main(), seed=1)


async def _eof(connection: Connection) -> bool:
    return await connection.read() == b""


def test_another_key_pair_and_keep_alive_of_a_node_are_those_of_what_comes_next() -> None:
    async def main() -> None:
        async with swarm(1, 3) as network:
            node = await network.join(cone(network.net, 1))
            assert node.connection_keep_alive == 5.0
            node.key_pair, node.connection_keep_alive = KeyPair.from_seed(bytes(32)), 0.0
            server = node.create_server(echo)
            await server.listen()
            assert server.public_key == node.key_pair.public_key == KeyPair.from_seed(bytes(32)).public_key
            assert node.context.keep_alive == node.connection_keep_alive == 0.0

    run(main())
