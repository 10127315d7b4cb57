"""What a node is to those it talks to: which socket, which id, whose tokens, and when it is silent."""

import asyncio
import random
from collections.abc import Sequence
from typing import cast

import pytest
from sim import run

from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.net.sockets import Socket
from p2pclaude.hyperdht.rpc.own_side import OwnSide


class Wire:
    """Stands in for a socket."""

    def __init__(self) -> None:
        self.closed = False
        self.sent: list[tuple[list[bytes], Address]] = []

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        """Keep what leaves."""
        self.sent.append((list(datagrams), to))


@pytest.fixture
def own() -> OwnSide:
    """Give an own side with two sockets."""
    side = OwnSide(random.Random(1))
    side.server_socket, side.client_socket = cast(Socket, Wire()), cast(Socket, Wire())
    return side


def test_requests_leave_from_the_client_socket_while_strangers_cannot_reach_us(own: OwnSide) -> None:
    assert own.socket is own.client_socket
    assert own.server_socket is not None and own.client_socket is not None
    assert own.is_other_socket(own.server_socket) and not own.is_other_socket(own.client_socket)
    own.firewalled = False
    assert own.socket is own.server_socket
    assert own.is_other_socket(own.client_socket) and not own.is_other_socket(own.server_socket)


def test_before_the_start_there_is_no_socket() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = OwnSide(random.Random(1)).socket
    assert OwnSide(random.Random(1)).closest(bytes(32)) == ()


def test_only_the_server_socket_shows_the_id(own: OwnSide) -> None:
    own.identity = b"i" * 32
    assert own.server_socket is not None and own.client_socket is not None
    assert own.id_on(own.server_socket) == b"i" * 32 and own.id_on(own.client_socket) is None


def test_tokens_are_those_of_the_last_two_rotations(own: OwnSide) -> None:
    async def main() -> None:
        token = own.issue_token("10.0.0.1")
        assert own.is_our_token("10.0.0.1", token) and not own.is_our_token("10.0.0.2", token)
        await asyncio.sleep(7.6)
        assert own.is_our_token("10.0.0.1", token) and own.issue_token("10.0.0.1") != token
        await asyncio.sleep(7.5)
        assert not own.is_our_token("10.0.0.1", token)
        later = own.issue_token("10.0.0.1")
        await asyncio.sleep(1000.0)
        assert not own.is_our_token("10.0.0.1", later)

    run(main())


@pytest.mark.parametrize(("silent", "closed", "port", "leaves"), [
    (False, False, 1, True), (True, False, 1, False), (False, True, 1, False), (False, False, 0, False),
])  # fmt: skip
def test_what_cannot_leave_is_lost(own: OwnSide, silent: bool, closed: bool, port: int, leaves: bool) -> None:
    wire = Wire()
    own.silent, wire.closed = silent, closed
    own.send_datagram(cast(Socket, wire), b"x", ("10.0.0.1", port))
    assert wire.sent == ([([b"x"], ("10.0.0.1", port))] if leaves else [])
