"""The RPC engine's packets, byte by byte, and what it does with packets that make no sense."""

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim import run

from p2pclaude.hyperdht.constants import Command, ErrorCode, InternalCommand
from p2pclaude.hyperdht.encoding import Address, ipv4
from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.net.sockets import Socket
from p2pclaude.hyperdht.rpc.messages import Request, Response, decode_message, encode_request, node_id
from p2pclaude.hyperdht.rpc.requests import IncomingRequest
from p2pclaude.hyperdht.rpc.rpc import Rpc
from p2pclaude.hyperdht.rpc.tokens import TokenJar

TARGET = b"\x07" * 32
DESTINATION = ("10.1.2.3", 49737)
REQUESTER = ("10.9.8.7", 5555)
IDENTITY = "e96e0146a33e022987fe256c6343ac5d20dba47ea1b6341f932903b48469453e"
TOKEN = "fc09067a6375e6be99992aad23884e9f1da0d8e11f0e88d5e2d3d4462b8be6c1"
CLOSER = "027f00000112277f0000011327"


class Wire:
    """A network that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Address]] = []

    async def bind(self, host: str, port: int, on_datagrams: object) -> "Wire":
        self.address = host, port
        return self

    def send(self, datagrams: Sequence[bytes], to: Address, ttl: int | None = None, *, fragment: bool = False) -> None:
        self.sent += [(data, to) for data in datagrams]

    def stay_awake(self, seconds: float) -> None: ...

    def close(self) -> None: ...

    def interfaces(self) -> list[str]:
        return ["127.0.0.1"]

    async def resolve(self, host: str) -> str:
        raise OSError(host)


# The packets of dht-rpc 6.27 itself (HYPERDHT-NOTES.md, A.6): tid 0x1234, secrets 01 and 02 repeated.


async def engine(*, persistent: bool = False) -> tuple[Rpc, Wire]:
    wire = Wire()
    endpoint = Endpoint(wire, random.Random(1))
    rpc = Rpc(endpoint, random.Random(1))
    rpc._next_tid = 0x1234
    rpc.own.server_socket, rpc.own.client_socket = await endpoint.bind("0.0.0.0", 1), await endpoint.bind("0.0.0.0", 2)
    rpc.own._tokens._old, rpc.own._tokens._new = b"\x01" * 32, b"\x02" * 32
    rpc.own._tokens_rotated = asyncio.get_running_loop().time()
    rpc.own.closest = lambda target: [("127.0.0.1", 10002), ("127.0.0.1", 10003)]
    if persistent:
        rpc.own.identity, rpc.own.firewalled = node_id(("127.0.0.1", 10001)), False
    return rpc, wire


def forget_all(rpc: Rpc) -> None:
    for call in list(rpc._calls):
        call.cancel()


async def first_datagram(send: Callable[[Rpc], object], *, persistent: bool = False) -> tuple[str, Address]:
    rpc, wire = await engine(persistent=persistent)
    send(rpc)
    forget_all(rpc)
    [(data, to)] = wire.sent
    return data.hex(), to


REQUESTS: dict[str, tuple[str, Callable[[Rpc], object]]] = {
    "ping": ("030434120a01020349c200", lambda rpc: rpc.start(DESTINATION, InternalCommand.PING, internal=True)),
    "ping nat": (
        "031434120a01020349c2010249c2",
        lambda rpc: rpc.start(DESTINATION, InternalCommand.PING_NAT, internal=True, value=b"\x49\xc2"),
    ),
    "find node": (
        "030c34120a01020349c202" + "07" * 32,
        lambda rpc: rpc.start(DESTINATION, InternalCommand.FIND_NODE, internal=True, target=TARGET),
    ),
    "down hint": (
        "031434120a01020349c203067f0000011227",
        lambda rpc: rpc.start(DESTINATION, InternalCommand.DOWN_HINT, internal=True, value=ipv4(("127.0.0.1", 10002))),
    ),
    "delayed ping": (
        "031434120a01020349c20404e8030000",
        lambda rpc: rpc.start(
            DESTINATION, InternalCommand.DELAYED_PING, internal=True, value=(1000).to_bytes(4, "little")
        ),
    ),
    "find peer": (
        "030834120a01020349c202" + "07" * 32,
        lambda rpc: rpc.start(DESTINATION, Command.FIND_PEER, target=TARGET),
    ),
    "announce": (
        "031a34120a01020349c2" + "09" * 32 + "04" + "07" * 32 + "03010203",
        lambda rpc: rpc.start(DESTINATION, Command.ANNOUNCE, target=TARGET, token=b"\x09" * 32, value=b"\x01\x02\x03"),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_the_javascripts_byte_by_byte(name: str) -> None:
    packet, send = REQUESTS[name]
    assert run(first_datagram(send)) == (packet, DESTINATION)


def test_a_persistent_node_puts_its_id_into_requests_from_the_server_socket_only() -> None:
    async def main() -> None:
        rpc, wire = await engine(persistent=True)
        rpc.start(DESTINATION, InternalCommand.PING, internal=True)
        rpc.start(DESTINATION, InternalCommand.PING, internal=True, socket=rpc.own.client_socket)
        forget_all(rpc)
        assert [data.hex() for data, _ in wire.sent] == [
            "030534120a01020349c2" + IDENTITY + "00",
            "030435120a01020349c200",
        ]

    run(main())


def incoming(rpc: Rpc) -> IncomingRequest:
    assert rpc.own.server_socket is not None
    return IncomingRequest(rpc.own, rpc.own.server_socket, REQUESTER, Request(0x1234, DESTINATION, 0, target=TARGET))


RESPONSES: dict[str, tuple[str, Callable[[Rpc], object]]] = {
    "find node": (
        "130534120a090807b315" + IDENTITY + CLOSER,
        lambda rpc: incoming(rpc).reply(None, token=False),
    ),
    "reply": (
        "131734120a090807b315" + IDENTITY + TOKEN + CLOSER + "02aabb",
        lambda rpc: incoming(rpc).reply(b"\xaa\xbb"),
    ),
    "error with token": (
        "130f34120a090807b315" + IDENTITY + TOKEN + CLOSER + "02",
        lambda rpc: incoming(rpc).error(ErrorCode.INVALID_TOKEN, token=True),
    ),
    "unknown command": (
        "130d34120a090807b315" + IDENTITY + CLOSER + "01",
        lambda rpc: incoming(rpc).error(ErrorCode.UNKNOWN_COMMAND),
    ),
    "bad token": (
        "130f34120a090807b315" + IDENTITY + TOKEN + CLOSER + "02",
        lambda rpc: receive(rpc, Request(0x1234, DESTINATION, 4, target=TARGET, token=b"\x05" * 32)),
    ),
}


def receive(rpc: Rpc, message: Request) -> None:
    assert rpc.own.server_socket is not None
    rpc.receive(rpc.own.server_socket, encode_request(message), REQUESTER)


@pytest.mark.parametrize("name", RESPONSES)
def test_responses_are_the_javascripts_byte_by_byte(name: str) -> None:
    packet, send = RESPONSES[name]
    assert run(first_datagram(send, persistent=True)) == (packet, REQUESTER)


def test_a_relayed_request_is_a_request_with_the_same_tid() -> None:
    packet = "031934120a01020349c2" + IDENTITY + "00" + "07" * 32 + "02aabb"
    relayed = first_datagram(lambda rpc: incoming(rpc).relay(b"\xaa\xbb", DESTINATION), persistent=True)
    assert run(relayed) == (packet, DESTINATION)


def test_a_reply_can_go_elsewhere_and_leave_elsewhere() -> None:
    async def main() -> None:
        rpc, wire = await engine(persistent=True)
        incoming(rpc).reply(b"x", to=DESTINATION, socket=rpc.own.client_socket, token=False, closer_nodes=False)
        [(data, to)] = wire.sent
        assert to == DESTINATION
        assert decode_message(data) == Response(0x1234, DESTINATION, value=b"x")  # no id: not the server socket

    run(main())


def test_tokens_are_good_for_two_rotations_and_for_one_host() -> None:
    async def main() -> None:
        rpc, _ = await engine()
        rpc.on_request = lambda request, external: seen.append(request)
        seen: list[IncomingRequest] = []
        old = bytes.fromhex("00a117249665ad87de86a018fa2547da2826404fae2e80230c28621d739ed020")
        token = rpc.own.issue_token(REQUESTER[0])
        assert token.hex() == TOKEN
        for good in (old, token):
            receive(rpc, Request(1, DESTINATION, 4, token=good))
        assert len(seen) == 2
        await asyncio.sleep(TokenJar.ROTATION_SECONDS)
        receive(rpc, Request(1, DESTINATION, 4, token=old))
        receive(rpc, Request(1, DESTINATION, 4, token=token))
        assert len(seen) == 3
        receive(rpc, Request(1, DESTINATION, 4, token=rpc.own.issue_token("10.0.0.1")))
        await asyncio.sleep(TokenJar.ROTATION_SECONDS)
        receive(rpc, Request(1, DESTINATION, 4, token=token))
        assert (len(seen), rpc.stats.bad_tokens) == (3, 3)
        token = rpc.own.issue_token(REQUESTER[0])
        await asyncio.sleep(3600)  # without a request in between
        receive(rpc, Request(1, DESTINATION, 4, token=token))
        assert (len(seen), rpc.stats.bad_tokens) == (3, 4)

    run(main())


def test_a_failing_handler_costs_one_datagram(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        rpc, _ = await engine()

        def fail(request: IncomingRequest, external: bool) -> None:
            raise RuntimeError("a bug")

        rpc.on_request = fail
        receive(rpc, Request(1, DESTINATION, 4))
        assert rpc.stats.handler_errors == 1
        assert "a bug" in caplog.text

    asyncio.run(main())


@given(st.binary(max_size=80) | st.builds(bytes.__add__, st.sampled_from([b"\x03", b"\x13"]), st.binary(max_size=80)))
def test_any_datagram_is_swallowed(data: bytes) -> None:
    async def main() -> None:
        rpc, _ = await engine()
        call = rpc.start(DESTINATION, 3)
        sockets: list[Socket] = [s for s in (rpc.own.server_socket, rpc.own.client_socket) if s is not None]
        for socket in sockets:
            rpc.receive(socket, data, DESTINATION)
            rpc.receive(socket, data, ("10.0.0.1", 0))
        assert rpc.stats.received == 2 and rpc.stats.handler_errors == 0
        call.cancel()
        assert rpc._rotation is not None
        rpc._rotation.cancel()

    asyncio.run(main())


def test_tids_wrap_and_skip_those_in_flight() -> None:
    async def main() -> None:
        rpc, wire = await engine()
        rpc._next_tid = 65535
        first = rpc.start(DESTINATION, 3)
        rpc.start(DESTINATION, 3)
        rpc._next_tid = 65535
        rpc.start(DESTINATION, 3)
        assert first.tid == 65535
        assert [int.from_bytes(data[2:4], "little") for data, _ in wire.sent] == [65535, 0, 1]
        forget_all(rpc)

    run(main())


def test_a_datagram_on_the_other_socket_is_external() -> None:
    async def main() -> None:
        rpc, _ = await engine()
        seen: list[bool] = []
        rpc.on_request = lambda request, external: seen.append(external)
        receive(rpc, Request(1, DESTINATION, 4))
        rpc.own.firewalled = False
        receive(rpc, Request(1, DESTINATION, 4))
        assert seen == [True, False]

    run(main())
