"""A client's attempts: lookups that are repeated, relays that are tried in turn, causes and deadlines."""

import asyncio

import pytest
from kit.sim_dht import DEADLINE, Swarm, ask, cone, is_request, serve, swarm
from sim import Host, Link, run
from sim.realm import Packet

from p2pclaude.hyperdht.constants import Command
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import (
    HolepunchError,
    HyperDHTError,
    PeerConnectionFailed,
    PeerNotFound,
    Suspended,
)
from p2pclaude.hyperdht.node.query import Query
from p2pclaude.hyperdht.peer import client_handshake as module
from p2pclaude.hyperdht.peer.dial import MAX_CANDIDATES
from p2pclaude.hyperdht.peer.server import Server
from p2pclaude.hyperdht.rpc.messages import Peer, encode_peer
from p2pclaude.hyperdht.rpc.requests import IncomingRequest
from p2pclaude.hyperdht.udx.packet import PREFIX


async def peers(network: Swarm) -> tuple[HyperDHT, HyperDHT, Server, Host]:
    """Start a server and a client, each behind a NAT of its own."""
    node = await network.join(cone(network.net, 1))
    host = cone(network.net, 2)
    client = await network.join(host)
    await asyncio.sleep(5)
    return node, client, await serve(node, node.key_pair), host


async def seconds_to_an_answer(client: HyperDHT, server: Server) -> float:
    """Connect, ask something, and tell how long it took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with await client.connect(server.public_key) as connection:
        assert await ask(connection, b"hello") == b"hello"
    return loop.time() - started


def test_what_a_lost_answer_hid_is_found_by_another_lookup() -> None:
    """Every request to the server's relays is lost for as long as one lookup takes."""

    async def main() -> None:
        async with swarm(1, 24) as network:
            _, client, server, host = await peers(network)
            relays = {address for address, _ in server.relay_addresses}
            lookups: list[float] = []
            look_up = module.RelaySearch._look_up

            def count(self: module.RelaySearch) -> Query:
                lookups.append(network.net.loop.now)
                return look_up(self)

            network.net.intercept = lambda packet: (
                packet.origin is host
                and packet.destination[0] in relays
                and is_request(packet, Command.FIND_PEER)
                and len(lookups) < 2
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module.RelaySearch, "_look_up", count)
                async with await client.connect(server.public_key) as connection:
                    assert await ask(connection, b"hello") == b"hello"
            assert len(lookups) == 2

    run(main(), seed=1)


def test_an_unknown_key_is_looked_up_once_where_nothing_is_lost() -> None:
    async def main() -> float:
        async with swarm(1, 24) as network:
            client = await network.join(network.net.host("5.2.0.1"))
            unknown = KeyPair.generate(network.net.random("unknown")).public_key
            asked = 0

            def intercept(packet: Packet) -> bool:
                nonlocal asked
                asked += is_request(packet, Command.FIND_PEER)
                return False

            network.net.intercept = intercept
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(PeerNotFound):
                await client.connect(unknown)
            assert asked <= 30
            return loop.time() - started

    assert run(main(), seed=1) < 1


def test_a_relay_that_leads_nowhere_is_avoided_the_next_time() -> None:
    """Rounds through two of three relays are swallowed; handshakes pass."""

    async def main() -> float:
        async with swarm(1, 12) as network:
            _, client, server, _ = await peers(network)
            bad = {address for address, _ in server.relay_addresses[:2]}
            network.net.intercept = lambda packet: (
                bool({packet.source[0], packet.destination[0]} & bad) and is_request(packet, Command.PEER_HOLEPUNCH)
            )
            return await seconds_to_an_answer(client, server)

    assert run(main(), seed=1) < 2


@pytest.mark.parametrize("lie", ["garbage", "the record of another"])
def test_nodes_that_claim_to_know_everybody_do_not_hold_up_a_handshake(lie: str) -> None:
    """They answer any FIND_PEER and nothing else."""

    async def main() -> float:
        async with swarm(4, 24) as network:
            _, client, server, _ = await peers(network)
            other = KeyPair.generate(network.net.random("other")).public_key
            value = b"garbage" if lie == "garbage" else encode_peer(Peer(other))

            def answer(request: IncomingRequest) -> bool:
                if request.command == Command.FIND_PEER:
                    request.reply(value)
                return True

            for liar in network.nodes:
                if liar.remote_address not in server.relay_addresses:
                    liar.node.on_request = answer
            return await seconds_to_an_answer(client, server)

    assert run(main(), seed=1) < 2


def test_a_server_that_is_gone_is_not_taken_for_an_unknown_one() -> None:
    async def main() -> float:
        async with swarm(1, 12) as network:
            node, client, server, _ = await peers(network)
            host = node.endpoint.network
            assert isinstance(host, Host)
            host.up = False
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(PeerConnectionFailed):
                await client.connect(server.public_key)
            return loop.time() - started

    assert run(main(), seed=1) < 10


def test_an_attempt_uses_its_time_where_answers_get_lost() -> None:
    """The server's answers to the handshake are lost for eight seconds, and before that an answer of the lookup was."""

    async def main() -> float:
        async with swarm(1, 12) as network:
            _, client, server, host = await peers(network)
            loop = asyncio.get_running_loop()
            started = loop.time()
            looked_up = 0

            def intercept(packet: Packet) -> bool:
                nonlocal looked_up
                if packet.origin is host and is_request(packet, Command.FIND_PEER):
                    looked_up += 1
                    return looked_up == 1
                return is_request(packet, Command.PEER_HANDSHAKE) and loop.time() < started + 8

            network.net.intercept = intercept
            async with await client.connect(server.public_key) as connection:
                assert await ask(connection, b"hello") == b"hello"
            return loop.time() - started

    assert 8 < run(main(), seed=1) < 12


def test_nobody_is_met_in_the_last_moment_and_left_alone() -> None:
    """A way opens just before the deadline, and nothing of the server's would arrive in time."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            _, client, server, host = await peers(network)
            loop = asyncio.get_running_loop()
            end = loop.time() + 5

            def intercept(packet: Packet) -> bool:
                if packet.data[:1] == b"\xff":
                    return packet.origin is not host
                return len(packet.data) == 1 and loop.time() < end - 0.4

            network.net.intercept = intercept
            with pytest.raises(HyperDHTError):
                await client.connect(server.public_key, timeout=5)
            await asyncio.sleep(0.5)
            assert server._slots.is_settled, "the server holds a connection that the client has given up"

    run(main(), seed=1)


@pytest.mark.parametrize("timeout", [0.05, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("lost", ["everything", "udx and probes", "rounds"])
def test_every_attempt_settles_by_its_deadline_and_leaves_nothing(timeout: float, lost: str) -> None:
    async def main() -> None:
        async with swarm(1, 12) as network:
            node, client, server, _ = await peers(network)

            def intercept(packet: Packet) -> bool:
                if lost == "everything":
                    return True
                if lost == "rounds":
                    return is_request(packet, Command.PEER_HOLEPUNCH) or len(packet.data) == 1
                return packet.data[:1] == b"\xff" or len(packet.data) == 1

            network.net.intercept = intercept
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(HyperDHTError) as caught:
                await client.connect(server.public_key, timeout=timeout)
            assert loop.time() - started <= timeout + 0.05
            if lost == "udx and probes" and timeout >= 7:
                assert isinstance(caught.value, HolepunchError | TimeoutError)
            network.net.intercept = None
            await asyncio.sleep(70)
            for made in (node, client):
                assert not made.endpoint.streams and len(made.endpoint.sockets) == 2 and not made.context.handlers
            async with await client.connect(server.public_key):
                pass

    run(main(), seed=1)


@pytest.mark.parametrize("natted", [False, True])
def test_a_server_comes_towards_a_client_whose_address_no_nat_changes(
    natted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first packet is on its way with the answer; to a NAT, which might hold it against him, none is."""

    async def main() -> None:
        async with swarm(5, 24) as network:
            net = network.net
            node = await network.join(net.host("5.8.0.1"))
            host = cone(net, 2) if natted else net.host("5.8.0.2")
            client = await network.join(host)
            await asyncio.sleep(5)
            monkeypatch.setattr(client.node, "remote_address", lambda: None)  # a new one does not know yet
            server = await serve(node, node.key_pair)
            senders: list[str] = []

            def note(packet: Packet) -> bool:
                if packet.data[:2] == PREFIX and packet.destination[0] in ("5.8.0.1", "5.8.0.2"):
                    senders.append("client" if packet.origin is host else "server")
                return False

            net.intercept = note
            async with await client.connect(server.public_key) as connection:
                assert await ask(connection, b"x") == b"x"
            assert senders[0] == ("client" if natted else "server")

    run(main())


def test_a_server_that_names_many_addresses_has_few_of_them_pinged() -> None:
    """Behind the same NAT, where each may be the server's: else it could have a client search the whole network."""

    async def main() -> None:
        async with swarm(1, 8) as network:
            nat = network.net.nat("5.9.0.1")
            nat.hairpin = True
            server_node, client = [await network.join(nat.host(f"192.168.1.{n}")) for n in (2, 3)]
            await asyncio.sleep(5)
            named = tuple((f"192.168.7.{number}", 22) for number in range(150))
            server_node.context.own_addresses = lambda: named  # type: ignore[method-assign]
            server = await serve(server_node, server_node.key_pair)
            asked: set[Address] = set()
            network.net.observe = lambda _, packet: asked.add(packet.destination)
            async with await client.connect(server.public_key, timeout=DEADLINE) as connection:
                assert await ask(connection, b"hello") == b"hello"
            assert 0 < len(asked & set(named)) <= MAX_CANDIDATES

    run(main(), seed=1)


def test_a_node_that_is_suspended_while_a_handshake_is_on_its_way_says_so() -> None:
    """The search has ended by then: the handshake alone tells what happened."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            _, client, server, host = await peers(network)
            network.net.intercept = lambda packet: packet.origin is host and is_request(packet, Command.PEER_HANDSHAKE)
            connecting = asyncio.create_task(client.connect(server.public_key))
            await asyncio.sleep(2)
            await client.suspend()
            with pytest.raises(Suspended):
                await connecting

    run(main(), seed=1)


def test_a_peer_that_breaks_off_before_its_answer_is_here_is_a_failed_connection() -> None:
    """Its packets come straight, the answer through a node that is far away."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            net = network.net
            node, client = [await network.join(net.host(f"5.8.0.{i}")) for i in (1, 2)]
            server = await serve(node, node.key_pair)
            for other in [net.host("5.0.0.1"), *net.hosts(12)]:
                net.set_path(other, net.host("5.8.0.2"), Link(latency=(0.5, 0.5)))
            connecting = asyncio.create_task(client.connect(server.public_key, early_data=b"first"))
            while not server._slots:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            await server.close()
            with pytest.raises(PeerConnectionFailed, match="broke the connection off"):
                await connecting
            await asyncio.sleep(60)
            assert len(client.endpoint.streams) == 0

    run(main(), seed=1)
