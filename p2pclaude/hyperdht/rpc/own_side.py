"""What a node is to those it talks to: its sockets, its id, its tokens, the nodes it names (ring 2).

`rpc` has one of these and shares it with the requests it hands out: they answer through it, and need no engine for
that.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from ..encoding import Address
from ..net.sockets import Socket
from .tokens import TokenJar


class OwnSide:
    """One node's own side.

    The node sets the sockets (all own requests leave from the client socket while `firewalled`), `identity` (the own id
    while persistent, else None) and `closest` (target -> addresses for responses). Nothing leaves while it is `silent`.
    """

    __slots__ = (
        "_tokens", "_tokens_rotated", "client_socket", "closest", "firewalled", "identity", "server_socket", "silent",
    )  # fmt: skip

    def __init__(self, rng: random.Random) -> None:
        self.server_socket: Socket | None = None
        self.client_socket: Socket | None = None
        self.firewalled = True
        self.identity: bytes | None = None
        self.closest: Callable[[bytes], Sequence[Address]] = _no_nodes
        self.silent = False
        self._tokens = TokenJar(rng)
        self._tokens_rotated = 0.0

    @property
    def socket(self) -> Socket:
        """The socket own requests leave from. Raises RuntimeError before the node is started."""
        socket = self.client_socket if self.firewalled else self.server_socket
        if socket is None:
            raise RuntimeError("the node is not started")
        return socket

    def is_other_socket(self, socket: Socket) -> bool:
        """Tell whether a datagram came in where we do not send from: its `to` says nothing about where we do."""
        return socket is not (self.client_socket if self.firewalled else self.server_socket)

    def id_on(self, socket: Socket) -> bytes | None:
        """Return the id a datagram leaving from `socket` carries: only persistent nodes' server sockets have one."""
        return self.identity if socket is self.server_socket else None

    def issue_token(self, host: str) -> bytes:
        """Return the current round-trip token of a host."""
        self._rotate_tokens()
        return self._tokens.issue(host)

    def is_our_token(self, host: str, token: bytes) -> bool:
        """Tell whether a token was issued to that host lately."""
        self._rotate_tokens()
        return self._tokens.check(host, token)

    def _rotate_tokens(self) -> None:
        # On demand, so that an idle node needs no timer. Two rotations replace both secrets; more change nothing.
        now = asyncio.get_running_loop().time()
        due = int((now - self._tokens_rotated) // TokenJar.ROTATION_SECONDS)
        for _ in range(min(due, 2)):
            self._tokens.rotate()
        self._tokens_rotated += due * TokenJar.ROTATION_SECONDS

    def send_datagram(self, socket: Socket, datagram: bytes, to: Address) -> None:
        """Send one datagram, unless there is no way to: a lost datagram is nothing unusual here."""
        if not self.silent and not socket.closed and to[1] > 0:
            socket.send([datagram], to)


def _no_nodes(target: bytes) -> Sequence[Address]:
    return ()
