"""The RPC engine: packets byte by byte, retries, tokens, the window, what is dropped, how everything settles."""

import asyncio
from collections.abc import Callable

import pytest
from kit.dht_nodes import Peer
from sim import Link, SimNetwork, run
from sim.realm import Packet

from p2pclaude.hyperdht.constants import Command, ErrorCode
from p2pclaude.hyperdht.errors import Destroyed, Suspended, Timeout
from p2pclaude.hyperdht.rpc.messages import Response, encode_response, node_id
from p2pclaude.hyperdht.rpc.requests import IncomingRequest, Reply

TARGET = b"\x07" * 32


# Two engines on a simulated network.


async def pair(net: SimNetwork, answer: Callable[[IncomingRequest], object] | None = None) -> tuple[Peer, Peer]:
    """Return an engine that asks and one that answers."""
    ask, serve = [await Peer(host, seed).start() for seed, host in enumerate(net.hosts(2))]

    def on_request(request: IncomingRequest, external: bool) -> None:
        if answer is None:
            request.reply(b"ok")
        else:
            answer(request)

    serve.rpc.on_request = on_request
    return ask, serve


def test_a_request_is_answered_with_all_there_is_to_know() -> None:
    async def main() -> None:
        net = SimNetwork(link=Link(latency=(0.05, 0.05)))
        ask, serve = await pair(net)
        serve.rpc.own.identity = node_id(serve.address)
        serve.rpc.own.closest = lambda target: [("1.2.3.4", 5)]
        reply = await ask.rpc.request(serve.address, 3, target=TARGET)
        assert (reply.source, reply.to, reply.value) == (serve.address, ask.address, b"ok")
        assert (reply.id, reply.error, reply.closer_nodes) == (node_id(serve.address), 0, (("1.2.3.4", 5),))
        assert reply.token == serve.rpc.own.issue_token(ask.address[0])
        assert reply.rtt == pytest.approx(0.1, abs=0.01)
        assert ask.rpc.in_flight == 0

    run(main(), check_timers=False)


def test_an_id_that_is_not_the_sources_counts_as_none() -> None:
    async def main() -> None:
        ids: list[bytes | None] = []

        def answer(request: IncomingRequest) -> None:
            ids.append(request.id)
            request.reply(None)

        ask, serve = await pair(SimNetwork(), answer)
        ask.rpc.own.identity = node_id(ask.address)
        serve.rpc.own.identity = b"\x01" * 32
        assert (await ask.rpc.request(serve.address, 3)).id is None
        ask.rpc.own.identity = b"\x02" * 32
        await ask.rpc.request(serve.address, 3)
        assert ids == [node_id(ask.address), None]

    run(main())


def test_errors_are_in_the_reply() -> None:
    async def main() -> None:
        ask, serve = await pair(SimNetwork(), lambda request: request.error(ErrorCode.SEQ_TOO_LOW))
        reply = await ask.rpc.request(serve.address, 3)
        assert (reply.error, reply.value, reply.token) == (ErrorCode.SEQ_TOO_LOW, None, None)

    run(main())


def test_resends_are_the_identical_datagram_and_their_number_is_bounded() -> None:
    async def main() -> None:
        net = SimNetwork()
        ask, _ = await pair(net)
        sent: list[bytes] = []
        net.observe = lambda event, packet: sent.append(packet.data) if event == "sent" else None
        loop = asyncio.get_running_loop()
        for retries in (0, 3, 5):
            sent.clear()
            start = loop.time()
            with pytest.raises(Timeout):
                await ask.rpc.request(("9.9.9.9", 9), 3, retries=retries, timeout=1.0)
            assert loop.time() - start == pytest.approx(retries + 1)
            assert len(sent) == retries + 1 and len(set(sent)) == 1
        assert ask.rpc.stats.timeouts == 3 and ask.rpc.stats.retries == 8

    run(main())


def test_a_near_network_settles_a_dead_node_fast_and_a_far_one_is_waited_for() -> None:
    async def time_out(latency: float) -> float:
        net = SimNetwork(link=Link(latency=(latency, latency)))
        ask, serve = await pair(net)
        for _ in range(20):
            await ask.rpc.request(serve.address, 3)
        retries = ask.rpc.stats.retries
        for _ in range(20):
            await ask.rpc.request(serve.address, 3)
        assert ask.rpc.stats.retries == retries  # learnt
        start = asyncio.get_running_loop().time()
        with pytest.raises(Timeout):
            await ask.rpc.request(("9.9.9.9", 9), 3)
        return asyncio.get_running_loop().time() - start

    assert run(time_out(0.001)) < 2.7
    assert run(time_out(0.4)) > 3.2


def test_a_relayed_command_waits_for_more_than_the_relay() -> None:
    async def main() -> None:
        ask, serve = await pair(
            SimNetwork(link=Link(latency=(0.001, 0.001))),
            lambda request: asyncio.get_running_loop().call_later(2.5 * (request.command < 2), request.reply),
        )
        for _ in range(20):
            await ask.rpc.request(serve.address, Command.FIND_PEER)
        reply = await ask.rpc.request(serve.address, Command.PEER_HANDSHAKE)
        assert reply.rtt > 2.4
        assert ask.rpc.timeouts.get(serve.address, 1, 0) < 0.3  # which says nothing about the relay itself

    run(main())


def test_requests_get_through_loss() -> None:
    async def main() -> None:
        net = SimNetwork(seed=7, link=Link(latency=(0.01, 0.05), loss=0.3, duplicate=0.2))
        ask, serve = await pair(net)
        requests = [ask.rpc.request(serve.address, 3, retries=9) for _ in range(100)]
        replies = await asyncio.gather(*requests)
        assert all(reply.value == b"ok" for reply in replies)
        assert ask.rpc.in_flight == 0 and ask.rpc.stats.unmatched > 0

    run(main(), seed=7)


def test_a_reply_from_another_address_is_no_reply() -> None:
    async def main() -> None:
        net = SimNetwork()
        stranger = await Peer(net.host("7.7.7.7")).start()

        def answer(request: IncomingRequest) -> None:
            message = Response(request.tid, request.source, value=b"forged")
            stranger.rpc.own.send_datagram(stranger.rpc.own.socket, encode_response(message), request.source)

        ask, serve = await pair(net, answer)
        with pytest.raises(Timeout):
            await ask.rpc.request(serve.address, 3, retries=1)
        assert ask.rpc.stats.wrong_source == 2

    run(main())


def test_late_and_double_replies_are_counted_and_dropped() -> None:
    async def main() -> None:
        def answer(request: IncomingRequest) -> None:
            request.reply(b"1")
            request.reply(b"2")

        ask, serve = await pair(SimNetwork(), answer)
        assert (await ask.rpc.request(serve.address, 3)).value == b"1"
        await asyncio.sleep(1)
        assert ask.rpc.stats.unmatched == 1

    run(main())


def test_a_request_from_another_socket_may_be_answered_there_or_here() -> None:
    async def main() -> None:
        ask, serve = await pair(SimNetwork())
        other = await ask.endpoint.bind("0.0.0.0", 0)
        reply = await ask.rpc.request(serve.address, 3, socket=other)
        assert reply.socket is other and reply.to == (ask.address[0], other.address[1])

    run(main())


def test_cancelling_forgets_a_request_at_once_and_frees_its_place() -> None:
    async def main() -> None:
        ask, _ = await pair(SimNetwork())
        task = asyncio.create_task(ask.rpc.request(("9.9.9.9", 9), 3))
        await asyncio.sleep(0.01)
        assert ask.rpc.in_flight == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ask.rpc.in_flight == 0 and not ask.rpc._in_flight
        await asyncio.sleep(4)  # the window's slots run empty

    run(main(), check_timers=True)


def test_a_refused_token_is_replaced_once_with_its_value() -> None:
    async def main() -> None:
        ask, serve = await pair(SimNetwork(), lambda request: request.reply(request.value))
        reply = await ask.rpc.request(serve.address, 4, token=b"\x01" * 32, value=lambda token: b"for " + token)
        assert reply.value == b"for " + serve.rpc.own.issue_token(ask.address[0])
        assert ask.rpc.stats.token_retries == 1

        def refuse(request: IncomingRequest) -> None:
            request.error(ErrorCode.INVALID_TOKEN, token=True)

        serve.rpc.on_request = lambda request, external: refuse(request)
        reply = await ask.rpc.request(serve.address, 4, token=b"\x01" * 32)
        assert reply.error == ErrorCode.INVALID_TOKEN
        assert ask.rpc.stats.token_retries == 2

    run(main())


def test_a_token_refused_while_a_resend_waits_for_room_is_replaced_once() -> None:
    """What is left of the former attempt in the queue is no second one."""

    async def main() -> None:
        net = SimNetwork(link=Link(latency=(0.35, 0.35)))
        heard: list[bytes | None] = []

        def answer(request: IncomingRequest) -> None:
            net.internet.link = Link(latency=(0.01, 0.01))
            heard.append(request.value)
            request.reply()

        ask, serve = await pair(net, answer)
        call = ask.rpc.start(serve.address, 4, token=b"\x01" * 32, value=lambda token: token, timeout=0.6)
        crowd = [ask.rpc.start(("9.9.9.9", 9), 3, timeout=60, retries=0) for _ in range(100)]
        assert (await call.future).error == ErrorCode.NONE
        assert ask.rpc.stats.token_retries == 1
        await asyncio.sleep(5)
        assert heard == [serve.rpc.own.issue_token(ask.address[0])]
        for other in crowd:
            other.cancel()

    run(main())


def test_a_value_that_cannot_be_made_for_the_new_token_is_the_callers_error() -> None:
    def sign(token: bytes) -> bytes:
        if token != b"\x01" * 32:
            raise KeyError("no key")
        return b""

    async def main() -> None:
        ask, serve = await pair(SimNetwork())
        with pytest.raises(KeyError):
            await ask.rpc.request(serve.address, 4, token=b"\x01" * 32, value=sign)
        assert ask.rpc.in_flight == 0

    run(main())


def test_the_window_queues_a_flood_and_every_request_settles() -> None:
    async def main() -> None:
        net = SimNetwork(link=Link(latency=(0.2, 0.2)))
        ask, serve = await pair(net)
        dead = [ask.rpc.request(("9.9.9.9", 9), 3, retries=0) for _ in range(500)]
        alive = [ask.rpc.request(serve.address, 3) for _ in range(500)]
        doomed = [asyncio.create_task(ask.rpc.request(serve.address, 3)) for _ in range(100)]
        await asyncio.sleep(0)
        for task in reversed(doomed):  # those in the queue first
            task.cancel()
        outcomes = await asyncio.gather(*dead, *alive, *doomed, return_exceptions=True)
        assert sum(isinstance(outcome, Timeout) for outcome in outcomes) == 500
        assert sum(isinstance(outcome, Reply) for outcome in outcomes) == 500
        assert ask.rpc.in_flight == 0 and not ask.rpc._queue and not ask.rpc._in_flight
        await asyncio.sleep(4)
        assert ask.rpc._window.total == 0

    run(main(), check_timers=True)


def test_no_burst_exceeds_the_window() -> None:
    async def main() -> None:
        net = SimNetwork()
        ask, _ = await pair(net)
        calls = [ask.rpc.start(("9.9.9.9", 9), 3) for _ in range(1000)]
        assert net.stats["sent"] == 80
        await asyncio.sleep(0.76)
        assert net.stats["sent"] == 160
        for call in calls:
            call.cancel()
        assert ask.rpc.in_flight == 0

    run(main())


@pytest.mark.parametrize("error", [Suspended, Destroyed])
def test_closing_fails_everything_in_flight_and_queued(error: type[Suspended] | type[Destroyed]) -> None:
    async def main() -> None:
        ask, serve = await pair(SimNetwork())
        calls = [asyncio.create_task(ask.rpc.request(serve.address, 3)) for _ in range(200)]
        await asyncio.sleep(0)
        ask.rpc.close(error)
        assert all(isinstance(o, error) for o in await asyncio.gather(*calls, return_exceptions=True))
        with pytest.raises(error):
            await ask.rpc.request(serve.address, 3)
        await asyncio.sleep(1)
        ask.rpc.open()
        assert (await ask.rpc.request(serve.address, 3)).value == b"ok"

    run(main())


def test_a_closed_engine_neither_hears_nor_speaks() -> None:
    async def main() -> None:
        ask, serve = await pair(SimNetwork())
        serve.rpc.close(Suspended)
        with pytest.raises(Timeout):
            await ask.rpc.request(serve.address, 3, retries=0)
        assert serve.rpc.stats.received == 0

    run(main())


def test_malformed_arguments_are_the_callers_error_and_leave_nothing_behind() -> None:
    async def main() -> None:
        ask, serve = await pair(SimNetwork())
        for bad in ({"target": b"short"}, {"token": b"short"}):
            with pytest.raises(ValueError):
                await ask.rpc.request(serve.address, 3, **bad)  # type: ignore[arg-type]
        with pytest.raises(OSError):
            await ask.rpc.request(("not a host", 3), 3)
        assert ask.rpc.in_flight == 0

    run(main(), check_timers=True)


def test_nothing_is_sent_to_port_zero() -> None:
    async def main() -> None:
        net = SimNetwork()
        packets: list[Packet] = []
        net.observe = lambda event, packet: packets.append(packet)
        ask, _ = await pair(net)
        with pytest.raises(Timeout):
            await ask.rpc.request(("9.9.9.9", 0), 3, retries=0)
        assert not packets

    run(main())
