"""The router's table of legs (HYPERDHT-NOTES 9.2), one datagram in, at most one out."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from p2pclaude.hyperdht.constants import Command, Mode
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.net.sockets import Socket
from p2pclaude.hyperdht.node.forwards import ForwardStore
from p2pclaude.hyperdht.peer.router import Answer, Router
from p2pclaude.hyperdht.peer.setup_messages import (
    Handshake,
    Holepunch,
    decode_handshake,
    decode_holepunch,
    encode_handshake,
    encode_holepunch,
)
from p2pclaude.hyperdht.rpc.messages import Request, Response, decode_message
from p2pclaude.hyperdht.rpc.own_side import OwnSide
from p2pclaude.hyperdht.rpc.requests import IncomingRequest

CLIENT = ("10.0.0.1", 1000)
RELAY = ("10.0.0.2", 2000)
SECOND_RELAY = ("10.0.0.3", 3000)
SERVER = ("10.0.0.4", 4000)
KEY = bytes(32)
TARGET = blake2b(KEY)
SOCKET = cast(Socket, object())


class Wire:
    """Stands where the RPC engine stands and keeps what would leave."""

    def __init__(self) -> None:
        self.sent: list[tuple[Address, Request | Response]] = []

    def id_on(self, socket: Socket) -> None:
        return None

    def closest(self, target: bytes) -> list[Address]:
        return [SECOND_RELAY]

    def send_datagram(self, socket: Socket, datagram: bytes, to: Address) -> None:
        self.sent.append((to, decode_message(datagram)))


class FakeServer:
    record = b"record"

    async def handle_handshake(self, message: Handshake, request: IncomingRequest) -> Answer | None:
        return Answer(b"answer to " + message.noise)

    async def handle_holepunch(self, message: Holepunch, request: IncomingRequest) -> Answer | None:
        return Answer(b"round " + message.payload)


Check = Callable[[Router], Awaitable[None] | None]


def run(test: Check, *, serving: bool = False, relay: Address | None = None) -> None:
    async def main() -> None:
        router = Router(ForwardStore())
        if serving:
            router.add_server(KEY, FakeServer())
        if relay is not None:
            router.set(TARGET, relay, b"record", asyncio.get_running_loop().time())
        result = test(router)
        if result is not None:
            await result

    asyncio.run(main())


async def handshake(router: Router, message: Handshake, source: Address) -> list[tuple[Address, Request | Response]]:
    return await deliver(router, Command.PEER_HANDSHAKE, encode_handshake(message), source)


async def deliver(
    router: Router, command: Command, value: bytes, source: Address
) -> list[tuple[Address, Request | Response]]:
    wire = Wire()
    request = Request(7, SERVER, command, target=TARGET, value=value)
    assert router.handle(IncomingRequest(cast(OwnSide, wire), SOCKET, source, request))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return wire.sent


HANDSHAKES = [
    # who is asked, by whom, what -> to whom, what
    ("server", Handshake(Mode.FROM_CLIENT, b"n"), CLIENT, CLIENT, Handshake(Mode.REPLY, b"answer to n")),
    (
        "server",
        Handshake(Mode.FROM_RELAY, b"n", CLIENT),
        RELAY,
        RELAY,
        Handshake(Mode.FROM_SERVER, b"answer to n", CLIENT),
    ),
    (
        "server",
        Handshake(Mode.FROM_SECOND_RELAY, b"n", CLIENT, RELAY),
        SECOND_RELAY,
        RELAY,
        Handshake(Mode.FROM_SERVER, b"answer to n", CLIENT),
    ),
    ("relay", Handshake(Mode.FROM_CLIENT, b"n"), CLIENT, SERVER, Handshake(Mode.FROM_RELAY, b"n", CLIENT)),
    (
        "relay",
        Handshake(Mode.FROM_CLIENT, b"n", None, SECOND_RELAY),
        CLIENT,
        SECOND_RELAY,
        Handshake(Mode.FROM_RELAY, b"n", CLIENT),
    ),
    (
        "relay",
        Handshake(Mode.FROM_RELAY, b"n", CLIENT),
        RELAY,
        SERVER,
        Handshake(Mode.FROM_SECOND_RELAY, b"n", CLIENT, RELAY),
    ),
    (
        "stranger",
        Handshake(Mode.FROM_SERVER, b"n", CLIENT),
        SERVER,
        CLIENT,
        Handshake(Mode.REPLY, b"n", SERVER),
    ),
]


@pytest.mark.parametrize(("who", "message", "source", "to", "expected"), HANDSHAKES)
def test_handshake_goes_its_way(
    who: str, message: Handshake, source: Address, to: Address, expected: Handshake
) -> None:
    async def check(router: Router) -> None:
        [(receiver, sent)] = await handshake(router, message, source)
        assert receiver == to
        assert decode_handshake(sent.value or b"") == expected
        # Only the last leg, to the client, is a response; all others are requests with the same tid.
        assert isinstance(sent, Response) == (expected.mode == Mode.REPLY)
        assert sent.tid == 7

    run(check, serving=who == "server", relay=SERVER if who == "relay" else None)


DROPPED = [
    ("server", Handshake(Mode.FROM_SECOND_RELAY, b"n", CLIENT), RELAY),
    ("server", Handshake(Mode.FROM_CLIENT, b""), CLIENT),
    ("server", Handshake(Mode.REPLY, b"n"), CLIENT),
    ("relay", Handshake(Mode.FROM_CLIENT, b""), CLIENT),
    ("stranger", Handshake(Mode.FROM_RELAY, b"n", CLIENT), RELAY),
    ("stranger", Handshake(Mode.FROM_SERVER, b"n"), SERVER),
    ("stranger", Handshake(Mode.REPLY, b"n", CLIENT), SERVER),
]


@pytest.mark.parametrize(("who", "message", "source"), DROPPED)
def test_handshake_that_leads_nowhere_is_dropped(who: str, message: Handshake, source: Address) -> None:
    async def check(router: Router) -> None:
        assert await handshake(router, message, source) == []

    run(check, serving=who == "server", relay=SERVER if who == "relay" else None)


def test_client_without_a_route_is_told_closer_nodes() -> None:
    async def check(router: Router) -> None:
        [(to, sent)] = await handshake(router, Handshake(Mode.FROM_CLIENT, b"n"), CLIENT)
        assert to == CLIENT
        assert isinstance(sent, Response)
        assert (sent.value, sent.token, sent.closer_nodes) == (None, None, (SECOND_RELAY,))

    run(check)


HOLEPUNCHES = [
    ("relay", Holepunch(Mode.FROM_CLIENT, 3, b"p"), CLIENT, SERVER, Holepunch(Mode.FROM_RELAY, 3, b"p", CLIENT)),
    (
        "stranger",
        Holepunch(Mode.FROM_CLIENT, 3, b"p", SERVER),
        CLIENT,
        SERVER,
        Holepunch(Mode.FROM_RELAY, 3, b"p", CLIENT),
    ),
    (
        "server",
        Holepunch(Mode.FROM_RELAY, 3, b"p", CLIENT),
        RELAY,
        RELAY,
        Holepunch(Mode.FROM_SERVER, 0, b"round p", CLIENT),
    ),
    (
        "stranger",
        Holepunch(Mode.FROM_SERVER, 0, b"p", CLIENT),
        SERVER,
        CLIENT,
        Holepunch(Mode.REPLY, 0, b"p", SERVER),
    ),
]


@pytest.mark.parametrize(("who", "message", "source", "to", "expected"), HOLEPUNCHES)
def test_holepunch_goes_its_way(
    who: str, message: Holepunch, source: Address, to: Address, expected: Holepunch
) -> None:
    async def check(router: Router) -> None:
        [(receiver, sent)] = await deliver(router, Command.PEER_HOLEPUNCH, encode_holepunch(message), source)
        assert receiver == to
        assert decode_holepunch(sent.value or b"") == expected
        assert isinstance(sent, Response) == (expected.mode == Mode.REPLY)

    run(check, serving=who == "server", relay=SERVER if who == "relay" else None)


@pytest.mark.parametrize("value", [b"", b"\x00", b"\x00\x09\x01n", b"\x03\x00\xfd"])
@pytest.mark.parametrize("command", [Command.PEER_HANDSHAKE, Command.PEER_HOLEPUNCH])
def test_malformed_values_are_dropped(command: Command, value: bytes) -> None:
    async def check(router: Router) -> None:
        assert await deliver(router, command, value, CLIENT) == []

    run(check, serving=True)


def test_own_server_cannot_be_displaced_or_doubled() -> None:
    def check(router: Router) -> None:
        now = asyncio.get_running_loop().time()
        router.set(TARGET, RELAY, b"forged", now)
        found = router.get(TARGET, now)
        assert found is not None
        assert (found.relay, found.record) == (None, b"record")
        with pytest.raises(ValueError, match="already"):
            router.add_server(KEY, FakeServer())
        router.remove_server(KEY)
        assert router.get(TARGET, now) is None

    run(check, serving=True)
