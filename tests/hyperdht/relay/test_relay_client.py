"""Peers that meet at a blind relay: behind NATs and lossy paths, in either order, and when the relay is no help."""

import asyncio
from random import Random

import pytest
from kit.sim_dht import ask, echo, eventually
from kit.sim_peers import receive_all, seeds, send_random
from kit.sim_relay import Place, Side, relay_place
from sim import Nat, SimLoop, run

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import ConnectionClosed, Destroyed, PeerNotFound, RelayFailed
from p2pclaude.hyperdht.net.streams import StreamSet
from p2pclaude.hyperdht.relay.relay_client import RelayClient, open_link
from p2pclaude.hyperdht.relay.relay_server import LINGER_SECONDS, RelayLimits, _RelayStream
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.udx.packet import rewrite_stream_id
from p2pclaude.hyperdht.udx.stream import Closed, UdxStream

TOKEN = bytes(range(32))


async def check_echo(initiator: Side, responder: Side, size: int = 20_000) -> None:
    """Send bytes there and back."""
    serving = asyncio.create_task(echo(responder.connection))
    data = initiator.dht.rng.randbytes(size)
    assert await ask(initiator.connection, data) == data
    await initiator.connection.close()
    await serving


@pytest.mark.parametrize("first", ["initiator", "responder", "both"])
def test_two_symmetric_nats_meet(first: str) -> None:
    """Whoever comes first waits; then bytes go both ways, and each side sees the relay's address only."""

    async def main() -> None:
        async with relay_place(1) as place:
            initiator, responder = place.pair(*await place.clients())
            order = [initiator, responder] if first != "responder" else [responder, initiator]
            key = place.relay.public_key
            joining = [asyncio.create_task(order[0].join(key, TOKEN))]
            if first != "both":
                await asyncio.sleep(5)
                assert (place.relay.waiting, place.relay.links) == (1, 0)
            await asyncio.gather(*joining, order[1].join(key, TOKEN))
            assert (place.relay.waiting, place.relay.links) == (0, 1)
            for side in (initiator, responder):
                assert side.link is not None
                assert side.connection.remote_address == side.link.address == ("5.0.0.1", 49737)
                assert side.link.carries(side.link.socket, side.link.address)
                assert not side.link.carries(side.link.socket, ("5.0.0.1", 1))
            await check_echo(initiator, responder)

    run(main(), seed=1)


def test_the_first_packet_is_not_lost() -> None:
    """The relay keeps what comes for a peer that has not shown its address yet: no second is lost to a time-out."""

    async def main() -> None:
        async with relay_place(1) as place:
            sides = await place.linked()
            loop = asyncio.get_running_loop()
            started = loop.time()
            await asyncio.gather(*(side.connection.wait_opened() for side in sides))
            assert loop.time() - started < 0.3

    run(main(), seed=1)


@pytest.mark.parametrize("seed", seeds(3))
def test_bytes_survive_loss(seed: int) -> None:
    """10 % loss on every leg, that is 19 % between the peers: nothing is lost, doubled or changed."""

    async def main() -> None:
        async with relay_place(seed, loss=0.1) as place:
            sides = await place.linked()
            rng = place.network.net.random("body")
            size = 300_000
            for one, two in (sides, sides[::-1]):
                sent, received = await asyncio.gather(
                    send_random(one.connection, size, rng), receive_all(two.connection, size)
                )
                assert sent == received, seed
            await asyncio.gather(*(side.connection.close() for side in sides))
            assert not any(side.lost for side in sides)

    run(main(), seed=seed)


@pytest.mark.parametrize("seed", seeds(5))
def test_a_clean_end_is_clean_on_both_sides(seed: int) -> None:
    """Nobody hears of an error after a clean end, at 10 % loss; the link and its connections go away by themselves."""

    async def main() -> None:
        async with relay_place(seed, loss=0.1) as place:
            initiator, responder = await place.linked()
            await check_echo(initiator, responder, 2000)
            await responder.connection.close()
            for side in (initiator, responder):
                assert await side.connection.read() == b"", seed
                assert not side.lost
            assert await eventually(lambda: _gone(place), 40)
            for side in (initiator, responder):
                assert side.link is not None
                await side.link.wait_closed()

    run(main(), seed=seed)


async def _gone(place: Place) -> bool:
    return place.relay.links == place.relay.connections == 0


def test_a_broken_off_stream_is_noticed_at_once() -> None:
    """DESTROY goes through the relay, and ends the link soon after."""

    async def main() -> None:
        async with relay_place(1) as place:
            initiator, responder = await place.linked()
            serving = asyncio.create_task(echo(responder.connection))
            assert await ask(initiator.connection, b"hello") == b"hello"
            initiator.connection.abort()
            async with asyncio.timeout(0.2):
                with pytest.raises(ConnectionClosed, match="broke"):
                    await serving
            await asyncio.sleep(LINGER_SECONDS + 0.1)
            assert place.relay.links == 0
            assert not initiator.lost and not responder.lost

    run(main(), seed=1)


@pytest.mark.parametrize("first", [0, 2**32 - 3])
@pytest.mark.parametrize("together", [True, False])
def test_the_relays_last_word_is_believed_also_behind_a_repeated_packet(first: int, together: bool) -> None:
    """It stands for the other client's DESTROY, which no stream believes that has heard of later packets."""
    left, right = UdxStream(1, initial_seq=first), UdxStream(2, initial_remote_seq=first)
    left.connect(2, 0.0)
    right.connect(1, 0.0)
    left.write(bytes(6 * 1100))
    packets = left.datagrams_to_send(0.0)
    end = _RelayStream(StreamSet(Random(1)), UdxStream(3))
    for batch in [[*packets, packets[1]]] if together else [[data] for data in (*packets, packets[1])]:
        end.receive(batch)
        right.receive_datagrams(batch, 0.1)
    word = end.last_word()
    assert word is not None
    right.receive_datagrams([rewrite_stream_id(word, 2)], 0.2)
    assert list(iter(right.next_event, None))[-1] == Closed("ECONNRESET")


def test_nobody_comes() -> None:
    """Another token is another pair: both sides give up in time with the cause, and the relay forgets them."""

    async def main() -> None:
        async with relay_place(1) as place:
            sides = place.pair(*await place.clients())
            started = asyncio.get_running_loop().time()
            outcomes = await asyncio.gather(
                *(side.join(place.relay.public_key, bytes([i]) * 32) for i, side in enumerate(sides)),
                return_exceptions=True,
            )
            assert asyncio.get_running_loop().time() - started == pytest.approx(15)
            for outcome in outcomes:
                assert isinstance(outcome, RelayFailed)
                assert "within 15 seconds" in str(outcome)
            await asyncio.sleep(1)
            assert (place.relay.waiting, place.relay.connections) == (0, 0)

    run(main(), seed=1)


def test_two_initiators_do_not_pair() -> None:
    """Both sides have to play different parts; the first of two alike goes on waiting."""

    async def main() -> None:
        async with relay_place(1) as place:
            nodes = await place.clients()
            one, two = place.pair(*nodes, "one"), place.pair(*nodes, "two")
            key = place.relay.public_key
            first = asyncio.create_task(one[0].join(key, TOKEN))
            await asyncio.sleep(2)
            with pytest.raises(RelayFailed, match="within 3 seconds"):
                await two[0].join(key, TOKEN, 3.0)
            await one[1].join(key, TOKEN)
            await first
            await check_echo(*one)

    run(main(), seed=1)


def test_a_relay_that_is_not_there() -> None:
    """The cause is told apart from a peer that is not there; a node that is destroyed says so."""

    async def main() -> None:
        async with relay_place(1) as place:
            sides = place.pair(*await place.clients())
            stranger = KeyPair.generate(place.network.net.random("nobody")).public_key
            with pytest.raises(RelayFailed, match="cannot be reached") as caught:
                await sides[0].join(stranger, TOKEN)
            assert isinstance(caught.value.__cause__, PeerNotFound)
            await sides[0].dht.destroy()
            with pytest.raises(Destroyed):
                await open_link(sides[0].dht.connect, place.relay.public_key, TOKEN, True, sides[0].stream)

    run(main(), seed=1)


@pytest.mark.parametrize(("greeting", "reason"), [(b"", "within 5 seconds"), (b"\x00\x01 hello", "is over")])
def test_a_server_that_is_no_relay(greeting: bytes, reason: str) -> None:
    """Somebody else's server is given up on: in time if it is silent, at once if what it says is no protomux."""

    async def other(connection: Connection) -> None:
        if greeting:
            await connection.write(greeting)
        while await connection.read():
            pass

    async def main() -> None:
        async with relay_place(1) as place:
            nodes = await place.clients()
            server = place.network.nodes[0].create_server(other)
            await server.listen(KeyPair.generate(place.network.net.random("server")))
            sides = place.pair(*nodes)
            with pytest.raises(RelayFailed, match=reason):
                await sides[0].join(server.public_key, TOKEN, 5.0)

    run(main(), seed=1)


def test_the_relay_stops() -> None:
    """An ordered end: both sides know within a moment, and nothing of the link is left."""

    async def main() -> None:
        async with relay_place(1) as place:
            sides = await place.linked()
            await sides[0].connection.wait_opened()
            await place.relay.close()
            await asyncio.sleep(0.2)
            assert all(side.connection.closed for side in sides)
            assert (place.relay.links, place.relay.connections) == (0, 0)

    run(main(), seed=1)


def test_the_relay_dies() -> None:
    """Without a goodbye: both connections break within the time that a dead idle peer takes."""

    async def main() -> None:
        async with relay_place(1) as place:
            sides = await place.linked()
            await sides[0].connection.wait_opened()
            place.network.net.host("5.0.0.1").up = False
            async with asyncio.timeout(20):
                await asyncio.gather(*(side.connection.wait_closed() for side in sides))
            place.network.net.host("5.0.0.1").up = True

    run(main(), seed=1)


def test_a_peer_dies() -> None:
    """The relay notices that one client is gone and tells the other, whose stream may have nothing to say."""

    async def main() -> None:
        async with relay_place(1) as place:
            initiator, responder = await place.linked()
            await responder.connection.wait_opened()
            nat = place.network.net.internet.nodes["6.0.0.1"]
            nat.up = False
            async with asyncio.timeout(20):
                await responder.connection.wait_closed()
            assert await eventually(lambda: _gone(place), 30)
            initiator.connection.abort()
            nat.up = True

    run(main(), seed=1)


@pytest.mark.parametrize("mover", [1, 2])
def test_a_stream_through_the_relay_goes_on_when_a_peer_gets_another_address(mover: int) -> None:
    """The peer's connection to the relay shows that it is the same one."""

    async def main() -> None:
        async with relay_place(1) as place:
            sides = await place.linked()
            await asyncio.gather(*(side.connection.wait_opened() for side in sides))
            net = place.network.net
            nat = net.internet.nodes[f"6.0.0.{mover}"]
            assert isinstance(nat, Nat)
            for moves in range(2):
                nat.rebind(f"6.0.0.{10 + mover + 10 * moves}")
                for one, two in (sides, sides[::-1]):
                    rng = net.random(f"body {moves}")
                    async with asyncio.timeout(12):
                        sent = send_random(one.connection, 50_000, rng)
                        said, heard = await asyncio.gather(sent, receive_all(two.connection, 50_000))
                    assert said == heard
                await asyncio.sleep(20)
            assert not any(side.lost or side.connection.closed for side in sides)

    run(main(), seed=1)


def test_the_way_changes_to_a_direct_one() -> None:
    """Both move the stream to each other's real address and id, then give the link back: not a byte is missed."""

    async def main() -> None:
        async with relay_place(1) as place:
            initiator, responder = sides = await place.linked(behind_nats=False)
            rng = place.network.net.random("body")
            size = 400_000
            sending = asyncio.create_task(send_random(initiator.connection, size, rng))
            receiving = asyncio.create_task(receive_all(responder.connection, size))
            await asyncio.sleep(0.3)
            assert not receiving.done()
            for side, other in (sides, sides[::-1]):
                socket = other.dht.node.socket
                address = (other.dht.endpoint.network.interfaces()[1], socket.address[1])
                side.stream.firewall = lambda socket, source: True
                side.stream.connect(side.dht.node.socket, other.stream.id, address)
            await asyncio.sleep(0.3)
            relayed = place.relay.stats.bytes
            for side in sides:
                assert side.link is not None
                side.link.close()
            assert await sending == await receiving
            await asyncio.sleep(LINGER_SECONDS + 1)
            assert place.relay.links == 0
            assert place.relay.stats.bytes <= relayed + 30_000  # what was under way
            assert not any(side.lost or side.connection.closed for side in sides)

    run(main(), seed=1)


def test_a_stream_with_a_way_of_its_own_is_left_alone() -> None:
    """When a direct path came first, the link is made and the stream does not move; a dead stream gets no link."""

    async def main() -> None:
        async with relay_place(1) as place:
            initiator, responder = place.pair(*await place.clients())
            address = ("5.9.9.9", 9)
            initiator.stream.connect(initiator.dht.node.socket, responder.stream.id, address)
            await place.link(initiator, responder)
            assert initiator.connection.remote_address == address
            other = place.pair(initiator.dht, responder.dht, "other")
            other[0].connection.abort()
            outcomes = await asyncio.gather(
                *(side.join(place.relay.public_key, TOKEN) for side in other), return_exceptions=True
            )
            assert isinstance(outcomes[0], RelayFailed)

    run(main(), seed=1)


def test_unpair() -> None:
    """A link is taken back while it waits, and when it stands: then the other side is told."""

    async def main() -> None:
        async with relay_place(1) as place:
            nodes = await place.clients()
            sides = place.pair(*nodes)
            clients = [await _client(place, node) for node in nodes]
            lost: list[bytes] = []
            clients[1].on_lost = lost.append
            waiting = asyncio.create_task(clients[0].pair(TOKEN, True, sides[0].stream))
            await asyncio.sleep(1)
            with pytest.raises(ValueError, match="in use"):
                await clients[0].pair(TOKEN, True, sides[0].stream)
            clients[0].unpair(TOKEN)
            with pytest.raises(RelayFailed, match="taken back"):
                await waiting
            await asyncio.sleep(1)
            assert place.relay.waiting == 0
            pairs = (client.pair(TOKEN, not i, sides[i].stream) for i, client in enumerate(clients))
            ids = await asyncio.gather(*pairs)
            assert len({*ids, *(side.stream.id for side in sides)}) == 4
            clients[0].unpair(TOKEN)
            await asyncio.sleep(LINGER_SECONDS + 0.5)
            assert lost == [TOKEN]
            assert place.relay.links == 0
            again = (client.pair(TOKEN, not i, sides[i].stream) for i, client in enumerate(clients))
            await asyncio.gather(*again)
            for client in clients:
                await client.close()

    run(main(), seed=1)


async def _client(place: Place, node: HyperDHT) -> RelayClient:
    connection: Connection = await node.connect(place.relay.public_key)
    return RelayClient(connection)


def test_who_stops_waiting_is_forgotten() -> None:
    """A cancelled wish for a link is taken back at the relay, and the connection ends with it."""

    async def main() -> None:
        async with relay_place(1) as place:
            node, other = await place.clients()
            sides = place.pair(node, other)
            client = await _client(place, node)
            waiting = asyncio.create_task(client.pair(TOKEN, True, sides[0].stream))
            await asyncio.sleep(1)
            assert place.relay.waiting == 1
            waiting.cancel()
            await asyncio.sleep(1)
            assert (place.relay.waiting, place.relay.connections) == (0, 1)
            await client.close()
            with pytest.raises(RelayFailed, match="over"):
                await client.pair(TOKEN, True, sides[0].stream)

    run(main(), seed=1)


def test_a_refusal_is_told_at_once() -> None:
    """Over the relay's limit the client need not wait for its time-out."""

    async def main() -> None:
        async with relay_place(1, RelayLimits(links=0)) as place:
            sides = place.pair(*await place.clients())
            started = asyncio.get_running_loop().time()
            outcomes = await asyncio.gather(
                *(side.join(place.relay.public_key, TOKEN) for side in sides), return_exceptions=True
            )
            assert all(isinstance(outcome, RelayFailed) and "refuses" in str(outcome) for outcome in outcomes)
            assert asyncio.get_running_loop().time() - started < 3

    run(main(), seed=1)


def test_a_node_goes_with_its_links() -> None:
    """Destroying the node ends links and their tasks; the peer's connection breaks soon."""

    async def main() -> None:
        async with relay_place(1) as place:
            initiator, responder = await place.linked()
            await responder.connection.wait_opened()
            await initiator.dht.destroy()
            async with asyncio.timeout(3):
                await responder.connection.wait_closed()
            assert initiator.link is not None and initiator.link.closed
            await initiator.link.wait_closed()

    run(main(), seed=1)


def test_a_listener_that_fails_costs_nobody_a_link(caplog: pytest.LogCaptureFixture) -> None:
    """Two meet as always, and when they are gone nothing is left that would count against the limits."""

    def fail(event: object) -> None:
        raise RuntimeError(f"a bug at {type(event).__name__}")

    async def main() -> None:
        async with relay_place(1) as place:
            place.relay._on_event = fail
            initiator, responder = await place.linked()
            serving = asyncio.create_task(echo(responder.connection))
            assert await ask(initiator.connection, b"hello") == b"hello"
            await initiator.connection.close()
            await serving
            await responder.connection.close()
            await asyncio.sleep(60)
            assert (place.relay.links, place.relay.waiting, place.relay.connections) == (0, 0, 0)

    loop = SimLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert not loop.swallowed and "a relay's listener failed" in caplog.text
