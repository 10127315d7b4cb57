"""Which datagram goes where, and how many datagrams a conversation takes."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from kit.sim_peers import connect_ends
from sim import Link, Packet, SimNetwork, SimulationError, run

from p2pclaude.hyperdht.constants import PacketType
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.net.sockets import Socket
from p2pclaude.hyperdht.secure.connection import WRITE_HIGH_WATER
from p2pclaude.hyperdht.udx.packet import DATA, HEADER, MAGIC

WAY = ("5.1.0.9", 9)
ELSEWHERE = ("5.1.0.8", 8)


def packet(stream_id: int, seq: int) -> bytes:
    """Return a DATA packet whose payload names stream and number."""
    return HEADER.pack(MAGIC, DATA, 0, stream_id, 1 << 20, seq, 0) + f"{stream_id} {seq} ".encode()


class Given(list[bytes]):
    """What the network gave in one go, which is not the endpoint's to add to."""

    def append(self, _datagram: bytes) -> None:
        raise AssertionError("the list that is gone through grows")


class Reader:
    """Keeps what a stream hands out."""

    def __init__(self) -> None:
        self.data = b""
        self.closed = 0

    def data_received(self, data: bytes) -> None:
        self.data += data

    def message_received(self, data: bytes) -> None: ...
    def eof_received(self) -> None: ...
    def drained(self) -> None: ...

    def stream_closed(self, error: str | None) -> None:
        self.closed += 1


def with_endpoint(work: Callable[[Endpoint, Socket], Awaitable[None]]) -> None:
    """Run a test's coroutine with an endpoint that has one socket."""

    async def main() -> None:
        net = SimNetwork(1)
        endpoint = Endpoint(net.host("5.1.0.1"), net.random("endpoint"))
        await work(endpoint, await endpoint.bind("0.0.0.0", 0))
        endpoint.close()

    run(main(), seed=1)


def test_what_came_together_is_told_apart() -> None:
    """Datagrams of one source for two streams, strangers' ids and messages, all in one entry of a batch."""

    async def work(endpoint: Endpoint, socket: Socket) -> None:
        messages: list[bytes] = []
        endpoint.on_message = lambda _socket, data, _source: messages.append(data)
        probes: list[Address] = []
        socket.on_probe = lambda _socket, source: probes.append(source)
        one, two = endpoint.streams.create(), endpoint.streams.create()
        one.handler, two.handler = Reader(), Reader()
        for stream in (one, two):
            stream.connect(socket, 1, WAY)
        unknown = next(number for number in range(9) if endpoint.streams.find_id(number) is None)
        first = [packet(one.id, 0), packet(one.id, 1), packet(two.id, 0), packet(one.id, 2), b"message"]
        rest = [packet(two.id, 1), packet(unknown, 0), b"", packet(two.id, 2), b"!", packet(two.id, 3)]
        rest.append(packet(one.id, 3)[:19])
        endpoint._receive(socket, [(first, WAY), (rest, WAY), ([b"never"], ("5.1.0.9", 0))])
        assert one.handler.data == f"{one.id} 0 {one.id} 1 {one.id} 2 ".encode()
        assert two.handler.data == f"{two.id} 0 {two.id} 1 {two.id} 2 {two.id} 3 ".encode()
        assert messages == [b"message", packet(unknown, 0), packet(one.id, 3)[:19]]
        assert probes == [WAY, WAY]

    with_endpoint(work)


class Failing(Reader):
    """Has a bug."""

    def data_received(self, data: bytes) -> None:
        raise ZeroDivisionError

    def stream_closed(self, error: str | None) -> None:
        self.closed += 1
        raise ZeroDivisionError


def test_a_bug_in_one_handler_costs_no_other_stream_its_packets() -> None:
    async def work(endpoint: Endpoint, socket: Socket) -> None:
        one, two = endpoint.streams.create(), endpoint.streams.create()
        failing = one.handler = Failing()
        reader = two.handler = Reader()
        for stream in (one, two):
            stream.connect(socket, 1, WAY)
        endpoint._receive(socket, [([packet(one.id, 0), packet(two.id, 0)], WAY)])
        assert reader.data == f"{two.id} 0 ".encode()
        assert failing.closed == 1
        await asyncio.sleep(60)
        assert one.forgotten and not two.forgotten

    with pytest.raises(SimulationError, match=r"^an exception was swallowed: logged: the handler of a stream failed"):
        with_endpoint(work)


def test_a_bug_in_one_handler_stops_no_timer_of_others() -> None:
    async def work(endpoint: Endpoint, socket: Socket) -> None:
        streams = [endpoint.streams.create() for _ in range(4)]
        for stream in streams:
            stream.handler = Failing()
            stream.connect(socket, 1, WAY)
            stream.write(b"nobody is there")
            await asyncio.sleep(1)
        await asyncio.sleep(60)
        assert all(stream.forgotten for stream in streams)

    with pytest.raises(SimulationError, match=r"^an exception was swallowed: logged: the handler of a stream failed"):
        with_endpoint(work)


@pytest.mark.parametrize("broken", [("handle_timer",), ("handle_timer", "datagrams_to_send")])
def test_a_bug_in_one_stream_stops_no_timer_of_others(monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...]) -> None:
    """The one whose turn comes first fails, whenever it is looked at; even that one ends."""

    def fail(_now: float) -> None:
        raise ZeroDivisionError

    async def work(endpoint: Endpoint, socket: Socket) -> None:
        streams = sorted((endpoint.streams.create() for _ in range(3)), key=lambda stream: stream.id)
        readers = [Reader() for _ in streams]
        for stream, reader in zip(streams, readers, strict=True):
            stream.handler = reader
            stream.connect(socket, 1, WAY)
            stream.write(b"nobody is there")
        await asyncio.sleep(0.01)
        for name in broken:
            monkeypatch.setattr(streams[0].core, name, fail)
        await asyncio.sleep(60)
        assert all(stream.forgotten for stream in streams)
        assert [reader.closed for reader in readers] == [1, 1, 1]

    with pytest.raises(SimulationError, match=r"^an exception was swallowed: logged: the timer of a stream failed"):
        with_endpoint(work)


def test_no_beginning_of_a_packet_is_taken_for_one() -> None:
    """Two bytes of magic, where a stream's id would stand, once made the loop add to the list it goes through."""

    async def work(endpoint: Endpoint, socket: Socket) -> None:
        messages: list[bytes] = []
        endpoint.on_message = lambda _socket, data, _source: messages.append(data)
        stream = endpoint.streams.create()
        reader = stream.handler = Reader()
        stream.connect(socket, 1, WAY)
        whole = packet(stream.id, 0)
        cut = [whole[:size] for size in range(2, 8)]
        for before in ([], [whole]):
            messages.clear()
            endpoint._receive(socket, [(Given([*before, *cut]), WAY), (Given(cut), ELSEWHERE)])
            assert messages == cut * 2
        assert reader.data == whole[20:]

    with_endpoint(work)


def test_every_packet_from_elsewhere_is_asked_for() -> None:
    """Only on the stream's own way do its packets vouch for each other."""

    async def work(endpoint: Endpoint, socket: Socket) -> None:
        stream = endpoint.streams.create()
        reader = stream.handler = Reader()
        asked: list[Address] = []

        def firewall(_socket: Socket, source: Address) -> bool:
            asked.append(source)
            if len(asked) == 3:
                stream.connect(socket, 1, source)
            return len(asked) > 2

        stream.firewall = firewall
        endpoint._receive(socket, [([packet(stream.id, seq) for seq in range(2)], ELSEWHERE)])
        assert reader.data == b"" and asked == [ELSEWHERE] * 2
        endpoint._receive(socket, [([packet(stream.id, seq) for seq in range(4)], WAY)])
        assert reader.data == b"".join(f"{stream.id} {seq} ".encode() for seq in range(4))
        assert asked == [ELSEWHERE, ELSEWHERE, WAY]

    with_endpoint(work)


def test_an_answer_carries_the_acknowledgement() -> None:
    """A conversation takes one packet a direction and turn, as no acknowledgement leaves before the answer."""
    seen: list[Packet] = []

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.01)))
        left, right = await connect_ends(net)
        await left.connection.write(b"hello")
        assert await right.connection.read() == b"hello"
        await asyncio.sleep(1)

        def observe(event: str, one: Packet) -> None:
            if event == "sent":
                seen.append(one)

        net.observe = observe
        for _ in range(20):
            await right.connection.write(b"question")
            assert await left.connection.read() == b"question"
            await left.connection.write(b"answer")
            assert await right.connection.read() == b"answer"
        net.observe = None
        await asyncio.sleep(1)
        for end in (left, right):
            end.endpoint.close()

    run(main(), seed=1)
    assert [one.data[2] for one in seen] == [PacketType.DATA] * 40


def test_an_acknowledgement_does_not_wait_for_a_slow_reader() -> None:
    """Who has nothing to say acknowledges in the same instant."""
    times: list[float] = []

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.01, 0.01)))
        left, right = await connect_ends(net)
        await asyncio.sleep(1)
        loop = asyncio.get_running_loop()

        def observe(event: str, _one: Packet) -> None:
            if event == "delivered":
                times.append(loop.time())

        net.observe = observe
        began = loop.time()
        await left.connection.write(b"nobody reads this")
        await asyncio.sleep(0.5)
        assert [round(at - began, 3) for at in times] == [0.01, 0.02]
        net.observe = None
        for end in (left, right):
            end.endpoint.close()

    run(main(), seed=1)


@pytest.mark.parametrize(("latency", "left_at_once", "packets"), [(0.0001, 1, 2), (0.01, 0, 1)])
def test_what_a_peer_nearby_waits_for_leaves_at_once(latency: float, left_at_once: int, packets: int) -> None:
    """The first of small writes does, the others share a packet; on a longer way all do."""
    seen: list[bytes] = []

    def observe(event: str, one: Packet) -> None:
        if event == "sent" and one.data[2] & PacketType.DATA:
            seen.append(one.data)

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(latency, latency)))
        left, right = await connect_ends(net)
        await left.connection.write(b"hello")
        assert await right.connection.read() == b"hello"
        await asyncio.sleep(1)
        net.observe = observe
        counts = []
        for word in (b"one", b"two", b"three"):
            await left.connection.write(word)
            counts.append(len(seen))
        assert counts == [left_at_once] * 3
        await asyncio.sleep(1)
        net.observe = None
        for end in (left, right):
            end.endpoint.close()

    run(main(), seed=1)
    assert len(seen) == packets


def test_many_writers_wait_in_turn_for_room() -> None:
    """What a call of `write` carries stays together, and no more than the limit waits to be sent."""
    size, writers = 200 << 10, 60

    async def main() -> None:
        net = SimNetwork(1, Link(latency=(0.0001, 0.0001)))
        left, right = await connect_ends(net)
        tasks = [asyncio.create_task(left.connection.write(bytes([number]) * size)) for number in range(writers)]
        await asyncio.sleep(1)
        assert WRITE_HIGH_WATER - size < left.connection.unsent < WRITE_HIGH_WATER + 2 * size
        assert 0 < sum(task.done() for task in tasks) < writers
        received = bytearray()
        while len(received) < size * writers:
            received += await right.connection.read()
        assert all(task.done() for task in tasks)
        numbers = [received[at] for at in range(0, len(received), size)]
        assert sorted(numbers) == list(range(writers))
        assert received == b"".join(bytes([number]) * size for number in numbers)
        for end in (left, right):
            end.endpoint.close()

    run(main(), seed=1)
