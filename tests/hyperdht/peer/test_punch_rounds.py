"""Rounds through relays: every pair of NATs, servers that are busy, relays that spoil or forge what they pass on."""

import asyncio

import pytest
from bench.reachability import PAIRS, connect_group, measure
from kit.sim_dht import DEADLINE, Swarm, ask, can_ask, cone, echo, serve, swarm, symmetric
from kit.sim_peers import seeds
from sim import SimNetwork, run
from sim.realm import Packet

from p2pclaude.hyperdht.constants import Command, Mode
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import DecodeError, HolepunchError, HyperDHTError, TryLater
from p2pclaude.hyperdht.peer.punch_throttle import PunchThrottle
from p2pclaude.hyperdht.peer.server import Server
from p2pclaude.hyperdht.peer.setup_messages import Holepunch, decode_holepunch, encode_holepunch
from p2pclaude.hyperdht.rpc.messages import Response, decode_message, encode_response

OTHERS = [pair for pair in PAIRS if pair != "random-random"]


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("case", [*OTHERS, "lan", "relay"])
def test_all_pairs_connect_in_time_and_leave_nothing(case: str, loss: float) -> None:
    """A small sample of what `tests/bench/reachability.py` measures, at 50 ms one way with new clients."""
    outcome = measure(case, 7, loss, 3 if "random" in case else 12)
    assert not (outcome.failures or outcome.half_open or outcome.late or outcome.left_behind), outcome
    slowest = 12 if "random" in case else 5 if case == "relay" else 3
    assert max(outcome.seconds) < (slowest if loss else 10), outcome
    if "random" not in case and not loss:
        assert outcome.quantile(0.9) <= {"relay": 1.1, "lan": 0.5}.get(case, 0.7), outcome
        assert max(outcome.packets) < 250, outcome  # no storms


def test_cone_nats_connect_within_a_second_on_lossy_paths() -> None:
    outcome = measure("cone-cone", 11, 0.1, 160)
    assert outcome.share == 1 and outcome.quantile(0.9) <= 1.0, outcome


def test_a_quarter_of_all_packets_lost_stops_nobody() -> None:
    outcome = measure("cone-cone", 13, 0.25, 60)
    assert outcome.share >= 0.97 and not outcome.half_open, outcome


def test_an_attempt_is_counted_as_failed_if_it_is() -> None:
    """The measurement itself can fail."""
    outcome = run(connect_group("random-random", 1, 0.0, 2), seed=1)
    assert len(outcome.failures) == 2 and outcome.share == 0
    assert all("both sides" in failure.cause and failure.seconds < 8 for failure in outcome.failures)


# Servers that are busy


@pytest.mark.parametrize("seed", seeds(2))
def test_a_busy_server_is_asked_again(seed: int) -> None:
    """More clients behind random NATs come at once than it punches for at a time; it says "try later"."""

    async def main() -> None:
        async with swarm(seed, 12) as network:
            node = await network.join(cone(network.net, 1))
            clients = [await network.join(symmetric(network.net, number)) for number in range(2, 6)]
            await asyncio.sleep(5)
            server = await serve(node, node.key_pair)
            busy = 0
            allows = PunchThrottle.allows

            def count(self: PunchThrottle, now: float) -> bool:
                nonlocal busy
                allowed = allows(self, now)
                busy += self is node.context.throttle and not allowed
                return allowed

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PunchThrottle, "allows", count)
                connections = await asyncio.gather(
                    *(client.connect(server.public_key, timeout=60) for client in clients)
                )
            assert busy
            for connection in connections:
                assert await ask(connection, b"hello") == b"hello"
                await connection.close()

    run(main(), seed=seed)


def test_a_server_that_stays_busy_is_the_cause_in_the_end() -> None:
    async def main() -> float:
        async with swarm(1, 12) as network:
            node = await network.join(cone(network.net, 1))
            client = await network.join(symmetric(network.net, 2))
            await asyncio.sleep(5)
            server = await serve(node, node.key_pair)
            for _ in range(PunchThrottle.LIMIT):
                node.context.throttle.begin(asyncio.get_running_loop().time())
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(TryLater):
                await client.connect(server.public_key, timeout=15)
            return loop.time() - started

    assert 14.9 < run(main(), seed=1) < 15.1


# Relays that spoil what they pass on


class Spoiler:
    """Changes or forges what certain DHT nodes say in answer to rounds of hole punching, on the wire."""

    def __init__(self, net: SimNetwork, hosts: set[str], how: str) -> None:
        self.spoiled = 0
        self._net, self._hosts, self._how = net, hosts, how
        net.intercept = self._intercept

    def _intercept(self, packet: Packet) -> bool:
        if packet.source[0] not in self._hosts or packet.data[:1] != b"\x13":
            return False
        try:
            message = decode_message(packet.data)
            if not isinstance(message, Response) or message.value is None:
                return False
            answer = decode_holepunch(message.value)
        except DecodeError:
            return False
        if answer.mode != Mode.REPLY or len(answer.payload) < 40:
            return False
        self.spoiled += 1
        packet.data = self._spoil(message, answer)
        return self._how == "drop"

    def _spoil(self, message: Response, answer: Holepunch) -> bytes:
        payload, peer = answer.payload, answer.peer_address
        if self._how == "corrupt":
            payload = payload[:-1] + bytes([payload[-1] ^ 1])
        elif self._how == "garbage":
            payload = self._net.rng.randbytes(len(payload))
        elif self._how == "misdirect":
            peer = ("5.66.66.66", 666)
        value = encode_holepunch(Holepunch(Mode.REPLY, answer.id, payload, peer)) if self._how != "empty" else b""
        return encode_response(
            Response(message.tid, message.to, message.id, message.token, message.closer_nodes, message.error, value)
        )


def relays_of(server: Server) -> list[str]:
    """Return the hosts of a server's relays."""
    return [host for host, _ in server.relay_addresses]


@pytest.mark.parametrize("how", ["drop", "corrupt", "garbage", "empty", "misdirect"])
@pytest.mark.parametrize("kinds", [("cone", "cone"), ("cone", "random"), ("random", "cone")])
def test_relays_that_spoil_rounds_stop_nothing_while_one_is_honest(how: str, kinds: tuple[str, str]) -> None:
    async def main() -> None:
        async with swarm(1, 12) as network:
            make = {"cone": cone, "random": symmetric}
            node = await network.join(make[kinds[0]](network.net, 1))
            client = await network.join(make[kinds[1]](network.net, 2))
            await asyncio.sleep(5)
            server = await serve(node, node.key_pair)
            bad = relays_of(server)[:2]
            spoiler = Spoiler(network.net, set(bad), how)
            connection = await client.connect(server.public_key, timeout=40)
            assert await ask(connection, b"hello") == b"hello"
            await connection.close()
            assert spoiler.spoiled

    run(main(), seed=1)


async def _join_pair(network: Swarm) -> tuple[HyperDHT, HyperDHT]:
    node, client = await network.join(cone(network.net, 1)), await network.join(cone(network.net, 2))
    await asyncio.sleep(5)
    return node, client


def test_forged_rounds_get_no_answer_and_start_no_probe() -> None:
    """A relay has not the handshake's secret: it cannot make the server send anything to a victim."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            net = network.net
            node, client = await _join_pair(network)
            server = await serve(node, node.key_pair)
            attempt = asyncio.create_task(client.connect(server.public_key, timeout=DEADLINE))
            await asyncio.sleep(0.15)  # the handshake is answered
            assert server._announcer is not None and server._slots
            to_victim: list[Packet] = []
            net.observe = lambda _, packet: to_victim.append(packet) if packet.destination[0] == "5.77.0.1" else None
            handled = node.node.rpc.stats.received
            for path in server._announcer.relays:
                relay = next(n for n in [*network.nodes, network.bootstrap] if n.remote_address == path.relay_address)
                for slot in range(4):
                    await _forge_round(relay, server, slot, path.peer_address)
            assert node.node.rpc.stats.received >= handled + 12
            await (await attempt).close()
            assert not to_victim
            assert await can_ask(client, server.public_key)

    run(main(), seed=1)


async def _forge_round(relay: HyperDHT, server: Server, slot: int, to: Address) -> None:
    message = Holepunch(Mode.FROM_RELAY, slot, relay.rng.randbytes(150), ("5.77.0.1", 99))
    with pytest.raises(HyperDHTError):
        await relay.node.rpc.request(
            to,
            Command.PEER_HOLEPUNCH,
            target=blake2b(server.public_key),
            value=encode_holepunch(message),
            retries=0,
            timeout=0.1,
        )


def test_a_client_that_is_no_longer_wanted_gets_its_cause_not_a_time_out() -> None:
    """The server closes while the client punches."""

    async def main() -> None:
        async with swarm(1, 12) as network:
            node = await network.join(symmetric(network.net, 1))
            client = await network.join(cone(network.net, 2))
            await asyncio.sleep(5)
            server = node.create_server(echo)
            await server.listen()
            network.net.intercept = lambda packet: len(packet.data) == 1  # no probe ever arrives
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises((HolepunchError, HyperDHTError)) as caught:
                await client.connect(server.public_key, timeout=25)
            assert isinstance(caught.value, HolepunchError)
            assert loop.time() - started <= 25.1
            await asyncio.sleep(60)
            for made in (node, client):
                assert not made.endpoint.streams and len(made.endpoint.sockets) == 2

    run(main(), seed=1)
