"""The blind relay's limits, what strangers can make it keep, and what it tells whoever runs it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from kit.sim_dht import ask, echo, eventually
from kit.sim_relay import Place, Side, relay_place
from sim import run

from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import ConnectionClosed, RelayFailed
from p2pclaude.hyperdht.relay.link_messages import (
    RelayPair,
    decode_relay_pair,
    decode_relay_unpair,
    encode_relay_pair,
    encode_relay_unpair,
)
from p2pclaude.hyperdht.relay.mux import Channel, Mux
from p2pclaude.hyperdht.relay.relay_client import PAIR, PROTOCOL, UNPAIR, RelayClient
from p2pclaude.hyperdht.relay.relay_server import (
    IDLE_SECONDS,
    LINGER_SECONDS,
    MAX_HELD,
    WAIT_SECONDS,
    ClientConnected,
    ClientGone,
    ClientRefused,
    LinkClosed,
    LinkOpened,
    LinkRefused,
    RelayLimits,
    _RelayStream,
)
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.udx.packet import DATA, HEADER, MAGIC

TOKEN = b"t" * 32


def token(number: int) -> bytes:
    return number.to_bytes(32, "little")


class Hand:
    """A client that says on the relay's channel whatever it is told to, and keeps the answers."""

    def __init__(self, connection: Connection, channel_id: bytes | None = None) -> None:
        self.connection = connection
        self.answers: list[tuple[int, bytes]] = []
        self.mux = Mux(connection)
        self.channel: Channel = self.mux.open(
            PROTOCOL,
            channel_id or connection.public_key,
            on_message=lambda kind, payload: self.answers.append((kind, payload)),
        )
        self.running = asyncio.create_task(self.mux.run())

    def pair(self, named: bytes, is_initiator: bool = True, stream_id: int = 7) -> None:
        """Ask for a link."""
        self.channel.send(PAIR, encode_relay_pair(RelayPair(is_initiator, named, stream_id)))

    def unpair(self, named: bytes) -> None:
        """Take it back."""
        self.channel.send(UNPAIR, encode_relay_unpair(named))

    async def close(self) -> None:
        """End the connection."""
        await self.connection.close()
        await self.running

    @property
    def linked(self) -> list[bytes]:
        """The tokens that were answered with a link."""
        return [decode_relay_pair(payload).token for kind, payload in self.answers if kind == PAIR]

    @property
    def refused(self) -> list[bytes]:
        """The tokens that were answered with an unpair."""
        return [decode_relay_unpair(payload) for kind, payload in self.answers if kind == UNPAIR]


async def hand(place: Place, node: HyperDHT) -> Hand:
    return Hand(await node.connect(place.relay.public_key))


@asynccontextmanager
async def hands(limits: RelayLimits | None = None) -> AsyncIterator[tuple[Place, Hand, Hand]]:
    """Give a relay with two clients, which leave it in the end."""
    async with relay_place(1, limits) as place:
        one, two = [await hand(place, node) for node in await place.clients()]
        yield place, one, two
        for client in (one, two):
            await client.close()


@asynccontextmanager
async def echoing(place: Place) -> AsyncIterator[Connection]:
    """Give a connection through the relay whose other end echoes."""
    initiator, responder = await place.linked()
    serving = asyncio.create_task(echo(responder.connection))
    yield initiator.connection
    await initiator.connection.close()
    await serving
    await responder.connection.close()


def names(place: Place) -> Counter[str]:
    return Counter(type(event).__name__ for event in place.events)


# Limits


def test_connections_are_limited() -> None:
    """One too many is broken off; when one leaves there is room again."""

    async def main() -> None:
        async with relay_place(1, RelayLimits(connections=2)) as place:
            node, other = await place.clients()
            kept = [await hand(place, node), await hand(place, other)]
            third = await hand(place, node)
            await asyncio.sleep(1)
            assert [one.connection.closed for one in (*kept, third)] == [False, False, True]
            assert (place.relay.connections, place.relay.stats.refused) == (2, 1)
            await kept[0].close()
            fourth = await hand(place, node)
            await asyncio.sleep(1)
            assert not fourth.connection.closed
            for one in (kept[1], third, fourth):
                await one.close()
            await asyncio.sleep(1)
            assert names(place) == {"ClientConnected": 3, "ClientGone": 3, "ClientRefused": 1}

    run(main(), seed=1)


def test_pairs_a_connection_are_limited() -> None:
    """Halves and links count together; what is refused is told, what ends makes room."""

    async def main() -> None:
        async with hands(RelayLimits(pairs=3)) as (place, one, two):
            for number in range(4):
                one.pair(token(number))
            two.pair(token(0), False)
            await asyncio.sleep(1)
            assert (one.linked, one.refused) == ([token(0)], [token(3)])
            assert (place.relay.waiting, place.relay.links) == (2, 1)
            assert LinkRefused(1) in place.events
            one.unpair(token(1))
            one.pair(token(4))
            await asyncio.sleep(1)
            assert one.refused == [token(3)]
            for number in range(5, 105):
                one.pair(token(number))  # some 40 bytes: a stranger must not fill the log so
            await asyncio.sleep(1)
            assert (len(one.refused), names(place)["LinkRefused"]) == (101, 1)

    run(main(), seed=1)


def test_links_are_limited() -> None:
    """Both sides of one link too many are refused, and the links that stand are left alone."""

    async def main() -> None:
        async with hands(RelayLimits(links=2)) as (place, one, two):
            for number in range(3):
                one.pair(token(number))
                two.pair(token(number), False)
            await asyncio.sleep(1)
            assert one.linked == two.linked == [token(0), token(1)]
            assert one.refused == two.refused == [token(2)]
            assert (place.relay.waiting, place.relay.links) == (0, 2)
            assert (place.relay.stats.links, place.relay.stats.refused_links) == (2, 2)

    run(main(), seed=1)


def test_bytes_a_link_are_limited() -> None:
    """What went over the limit is not passed on; both sides break off at once, and the counts are right."""

    async def main() -> None:
        async with relay_place(1, RelayLimits(link_bytes=200_000)) as place:
            initiator, responder = await place.linked()
            serving = asyncio.create_task(echo(responder.connection))
            assert await ask(initiator.connection, bytes(50_000)) == bytes(50_000)
            with pytest.raises(ConnectionClosed):
                await ask(initiator.connection, bytes(100_000))
            with pytest.raises(ConnectionClosed):
                await serving
            await asyncio.sleep(0.1)
            assert initiator.connection.closed and responder.connection.closed
            closed = [event for event in place.events if isinstance(event, LinkClosed)]
            assert [event.reason for event in closed] == ["bytes"]
            assert 200_000 < closed[0].bytes <= place.relay.stats.bytes < 300_000

    run(main(), seed=1)


def test_the_time_of_a_link_is_limited() -> None:
    """A link ends after its time, in use or not; the connections to the relay may ask for another."""

    async def main() -> None:
        async with relay_place(1, RelayLimits(link_seconds=30.0)) as place:
            initiator, responder = await place.linked()
            loop = asyncio.get_running_loop()
            started = loop.time()
            await initiator.connection.wait_closed()
            await responder.connection.wait_closed()
            assert loop.time() - started == pytest.approx(30, abs=0.2)
            event = next(event for event in place.events if isinstance(event, LinkClosed))
            assert event.reason == "seconds"
            assert event.seconds == pytest.approx(30)
            again = place.pair(initiator.dht, responder.dht, "again")
            await place.link(*again)
            assert place.relay.links == 1

    run(main(), seed=1)


def test_halves_and_idle_connections_expire() -> None:
    """Nobody holds a place by waiting: a half is forgotten, and a connection without any is ended."""

    async def main() -> None:
        async with hands() as (place, one, two):
            one.pair(TOKEN)
            await asyncio.sleep(WAIT_SECONDS - 5)
            assert (place.relay.waiting, one.connection.closed) == (1, False)
            await asyncio.sleep(16)
            assert two.connection.closed
            assert place.relay.waiting == 0
            await asyncio.sleep(IDLE_SECONDS)
            assert one.connection.closed
            assert place.relay.connections == 0

    run(main(), seed=1)


def test_a_link_holds_its_connections() -> None:
    """A client whose link is in use, or only there, is not idle."""

    async def main() -> None:
        async with relay_place(1) as place, echoing(place) as connection:
            for _ in range(3):
                await asyncio.sleep(60)
                assert await ask(connection, b"still") == b"still"

    run(main(), seed=1)


# Strangers


def test_hostile_messages() -> None:
    """Nothing a client says harms another one's link or stays behind; malformed messages break it off."""

    async def main() -> None:
        async with relay_place(1) as place, echoing(place) as connection:
            node = await place.network.join(place.symmetric(3))
            for kind, payload in (
                (PAIR, b""),
                (PAIR, encode_relay_pair(RelayPair(True, TOKEN, 1))[:-1]),
                (PAIR, encode_relay_pair(RelayPair(True, TOKEN, 1 << 32))),
                (UNPAIR, bytes(20)),
            ):
                client = await hand(place, node)
                client.channel.send(kind, payload)
                await asyncio.sleep(1)
                assert client.connection.closed, (kind, payload)
                await client.running
            client = await hand(place, node)
            client.channel.send(99, b"who knows")
            client.unpair(bytes(32))  # the others' token: not for a stranger to take back
            client.unpair(TOKEN)
            for _ in range(3):
                client.pair(TOKEN)
            client.channel.close()
            client.pair(TOKEN)
            await asyncio.sleep(LINGER_SECONDS + 1)
            assert (place.relay.waiting, place.relay.links) == (0, 1)
            assert await ask(connection, b"unharmed") == b"unharmed"
            await client.close()

    run(main(), seed=1)


def test_a_large_frame_is_not_waited_for() -> None:
    """A client that announces megabytes is broken off before they are there."""

    async def main() -> None:
        async with relay_place(1) as place:
            client = await hand(place, (await place.clients())[0])
            place.network.net.internet.link.bandwidth = 100_000
            client.connection.send_frame(bytes(8 << 20))
            await asyncio.sleep(1)
            assert client.connection.closed and place.relay.connections == 0
            await client.running

    run(main(), seed=1)


def test_another_id_gets_no_channel() -> None:
    """The channel's id is the client's own key, as blind-relay has it: another one is rejected."""

    async def main() -> None:
        async with relay_place(1) as place:
            node, _ = await place.clients()
            client = Hand(await node.connect(place.relay.public_key), bytes(32))
            client.pair(TOKEN)
            await asyncio.sleep(1)
            assert client.channel.closed
            assert place.relay.waiting == 0
            await client.close()

    run(main(), seed=1)


def test_one_client_may_be_both_sides() -> None:
    """A token named twice on one connection is a link to itself; the same part twice counts once."""

    async def main() -> None:
        async with relay_place(1) as place:
            one = await hand(place, (await place.clients())[0])
            one.pair(TOKEN, True)
            one.pair(TOKEN, True, 8)
            one.pair(TOKEN, False)
            one.pair(TOKEN, False)
            await asyncio.sleep(1)
            assert one.linked == [TOKEN, TOKEN]
            assert place.relay.links == 1
            await one.close()
            await asyncio.sleep(LINGER_SECONDS + 1)
            assert place.relay.links == 0

    run(main(), seed=1)


async def link_ids(place: Place, one: Hand, two: Hand) -> tuple[int, int]:
    one.pair(TOKEN, True, 1001)
    two.pair(TOKEN, False, 1002)
    await asyncio.sleep(1)
    first, second = (decode_relay_pair(client.answers[0][1]).id for client in (one, two))
    return first, second


def packet(stream_id: int, kind: int = DATA, body: bytes = b"x") -> bytes:
    return HEADER.pack(MAGIC, kind, 0, stream_id, 0, 0, 0) + body


def test_packets_come_from_the_clients_host_only() -> None:
    """A stranger who knows a stream's id gets nothing through, nor does a packet's beginning behind a whole one."""

    async def main() -> None:
        async with hands() as (place, one, two):
            ids = await link_ids(place, one, two)
            relay_address = one.connection.remote_address
            assert relay_address is not None
            got: list[bytes] = []
            stranger = await place.network.net.host("5.66.6.6").bind(
                "0.0.0.0", 0, lambda batch: got.extend(data for datagrams, _ in batch for data in datagrams)
            )
            stranger.send([packet(ids[0])] * 3, relay_address)
            await asyncio.sleep(1)
            assert place.relay.stats.bytes == 0
            assert one.connection.socket is not None
            one.connection.socket.send([packet(ids[0])] * 3, relay_address)
            await asyncio.sleep(1)
            assert place.relay.stats.bytes == 3 * len(packet(0))
            assert got == []
            endpoint = place.network.bootstrap.endpoint
            stream = endpoint.streams.find_id(ids[0])
            assert isinstance(stream, _RelayStream) and stream.socket is not None and stream.address is not None
            endpoint._receive(stream.socket, [([packet(ids[0]), packet(ids[0])[:12]], stream.address)])
            assert place.relay.stats.bytes == 4 * len(packet(0))
            assert HEADER.size == len(stream.last_word() or b"")
            stranger.close()

    run(main(), seed=1)


def test_packets_are_passed_on_as_they_are() -> None:
    """Only the stream id changes. What comes before the other side is there waits, but not without bounds."""

    async def main() -> None:
        async with hands() as (place, one, two):
            ids = await link_ids(place, one, two)
            relay_address = one.connection.remote_address
            assert relay_address is not None
            seen: list[bytes] = []
            socket = two.connection.socket
            assert socket is not None and one.connection.socket is not None
            two_node = place.network.joined[-1]
            two_node.endpoint.on_message = lambda _, data, source: seen.append(data)
            bodies = [b"%02d" % number * 100 for number in range(MAX_HELD + 4)]
            for body in bodies:
                one.connection.socket.send([packet(ids[0], body=body)], relay_address)
                await asyncio.sleep(0.1)
            assert [data for data in seen if data[:2] == b"\xff\x01"] == []
            socket.send([packet(ids[1])], relay_address)
            await asyncio.sleep(0.1)
            got = [data for data in seen if data[:2] == b"\xff\x01"]
            # Held ones left in one batch: the simulator gives each its own delay.
            assert sorted(got) == sorted(packet(1002, body=body) for body in bodies[4:])

    run(main(), seed=1)


# Resources


def test_nothing_is_left_after_many_links() -> None:
    """200 links, ended in different ways, leave no stream, half or connection behind."""

    async def main() -> None:
        async with hands(RelayLimits(pairs=100)) as (place, one, two):
            streams = len(place.network.bootstrap.endpoint.streams)
            for start in range(0, 200, 20):
                block = range(start, start + 20)
                for number in block:
                    one.pair(token(number))
                    two.pair(token(number), False)
                await asyncio.sleep(1)
                for number in block:  # taken back by the first, the second, both; the rest ends with the connections
                    if number % 4 != 1:
                        one.unpair(token(number))
                    if number % 4 > 1:
                        two.unpair(token(number))
                await asyncio.sleep(LINGER_SECONDS + 1)
            await one.close()
            await two.close()
            await asyncio.sleep(LINGER_SECONDS + 1)
            assert (place.relay.links, place.relay.waiting, place.relay.connections) == (0, 0, 0)
            assert place.relay.stats.links == 200
            assert await eventually(lambda: _streams_are(place, streams - 2), 30)
            counts = names(place)
            assert counts["LinkOpened"] == counts["LinkClosed"] == 200

    run(main(), seed=1)


async def _streams_are(place: Place, count: int) -> bool:
    return len(place.network.bootstrap.endpoint.streams) == count


def test_what_is_told() -> None:
    """The events name connections and links by numbers, in their order."""

    async def main() -> None:
        async with hands() as (place, one, two):
            two.pair(TOKEN, False)
            one.pair(TOKEN)
            await asyncio.sleep(1)
            await two.close()
            await asyncio.sleep(LINGER_SECONDS + 1)
            await one.close()
            await asyncio.sleep(1)
            first, second, *rest = place.events
            assert isinstance(first, ClientConnected) and isinstance(second, ClientConnected)
            assert (first.client, first.public_key) == (1, one.connection.public_key)
            assert first.address is not None and first.address[0] == "6.0.0.1"
            closed = rest[2]
            assert isinstance(closed, LinkClosed) and (closed.link, closed.reason) == (1, "client")
            assert rest == [LinkOpened(1, (1, 2)), ClientGone(2), closed, ClientGone(1)]
            assert ClientRefused(None) not in place.events

    run(main(), seed=1)


def test_closing_twice_and_serving_after() -> None:
    """A relay that is closed takes nobody any more."""

    async def main() -> None:
        async with relay_place(1) as place:
            sides: tuple[Side, Side] = place.pair(*await place.clients())
            client = RelayClient(await sides[0].dht.connect(place.relay.public_key))
            waiting = asyncio.create_task(client.pair(TOKEN, True, sides[0].stream))
            await asyncio.sleep(1)
            await asyncio.gather(place.relay.close(), place.relay.close())
            with pytest.raises(RelayFailed, match="over"):
                await waiting
            with pytest.raises(RelayFailed, match="cannot be reached"):
                await sides[0].join(place.relay.public_key, TOKEN)

    run(main(), seed=1)
