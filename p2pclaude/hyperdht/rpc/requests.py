"""What is asked of a node and what it asks: one object a request (ring 2).

`rpc` makes an `IncomingRequest` of every request datagram for `node` and the handlers above it to answer, and an
`OutgoingRequest` of every request of our own; a `Reply` is what comes back. Source: dht-rpc lib/io.js.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypedDict

from ..constants import Command, ErrorCode
from ..encoding import Address
from ..net.endpoint import Socket
from ..node.routing import node_id
from .messages import Request, Response, encode_request, encode_response

if TYPE_CHECKING:
    from .rpc import Rpc

DEFAULT_RETRIES: Final = 3
RELAYED_RETRIES: Final = 6  # on the way client, relay, server and back a packet may get lost four times

Value = bytes | Callable[[bytes], bytes] | None
"""A request's value; a function makes it of the token the request carries (signatures cover tokens)."""


class RequestOptions(TypedDict, total=False):
    """What may be said of a request beside its receiver and its command.

    `timeout` is in seconds for each of the 1 + `retries` sends (default: learnt); pass one when the answer takes longer
    than the node's round trip (handshakes and hole punching are known to). `socket` is where it leaves (default: the
    node's). A refused `token` is replaced by the one that came with the refusal, once.
    """

    internal: bool
    target: bytes | None
    value: Value
    token: bytes | None
    socket: Socket | None
    retries: int
    timeout: float | None


def checked_id(claimed: bytes | None, source: Address) -> bytes | None:
    """Return the id a datagram claims if it is that of its source, else None."""
    return claimed if claimed is not None and claimed == node_id(source) else None


class Reply(NamedTuple):
    """A response to one of our requests.

    `source` is the node asked, `to` our address as it sees us, `id` its id (checked; None for ephemeral nodes),
    `error` an `ErrorCode`, `rtt` the seconds since the first send, `socket` where it arrived.
    """

    source: Address
    to: Address
    tid: int
    id: bytes | None
    token: bytes | None
    closer_nodes: tuple[Address, ...]
    error: int
    value: bytes | None
    rtt: float
    socket: Socket


class IncomingRequest:
    """A request of another node. Answer with `reply`, `error` or `relay`, now or later, or stay silent.

    `id` is the sender's, checked against `source`; `token`, if there is one, is a token of ours for that host.
    """

    __slots__ = ("_rpc", "command", "id", "internal", "socket", "source", "target", "tid", "to", "token", "value")

    def __init__(self, rpc: Rpc, socket: Socket, source: Address, message: Request) -> None:
        self._rpc = rpc
        self.socket = socket
        self.source = source
        self.tid = message.tid
        self.to = message.to
        self.id = checked_id(message.id, source)
        self.command = message.command
        self.internal = message.internal
        self.token = message.token
        self.target = message.target
        self.value = message.value

    def reply(
        self,
        value: bytes | None = None,
        *,
        token: bool = True,
        closer_nodes: bool = True,
        socket: Socket | None = None,
        to: Address | None = None,
    ) -> None:
        """Send a response. `to` sends it to another address than the request came from, `socket` from another."""
        self._respond(ErrorCode.NONE, value, token, closer_nodes, socket, to)

    def error(self, code: int, *, token: bool = False, closer_nodes: bool = True) -> None:
        """Send a response that carries an error and no value."""
        self._respond(code, None, token, closer_nodes, None, None)

    def relay(self, value: bytes | None, to: Address, *, socket: Socket | None = None) -> None:
        """Pass the request on to another node: a request again, with the same tid, that nobody here waits for."""
        out = socket or self.socket
        own_id = self._rpc.id_on(out)
        message = Request(self.tid, to, self.command, self.internal, own_id, None, self.target, value)
        self._rpc.send_datagram(out, encode_request(message), to)

    def _respond(
        self,
        error: int,
        value: bytes | None,
        token: bool,
        closer_nodes: bool,
        socket: Socket | None,
        to: Address | None,
    ) -> None:
        rpc, out, receiver = self._rpc, socket or self.socket, to or self.source
        response = Response(
            self.tid,
            receiver,
            rpc.id_on(out),
            rpc.issue_token(receiver[0]) if token else None,
            tuple(rpc.closest(self.target)) if closer_nodes and self.target is not None else (),
            error,
            value,
        )
        rpc.send_datagram(out, encode_response(response), receiver)


class OutgoingRequest:
    """A request on its way: `future` gives the `Reply` or raises; `cancel` forgets it at once.

    `on_resend` is called whenever the last of `sends` sends has not been answered in time and another one follows.
    """

    __slots__ = (
        "_rpc",
        "_value",
        "command",
        "first_sent",
        "future",
        "internal",
        "on_resend",
        "retries",
        "sends",
        "socket",
        "target",
        "tid",
        "timeout",
        "timer",
        "to",
        "token",
        "token_retried",
        "value",
    )

    def __init__(
        self,
        rpc: Rpc,
        to: Address,
        command: int,
        *,
        internal: bool = False,
        target: bytes | None = None,
        value: Value = None,
        token: bytes | None = None,
        socket: Socket | None = None,
        retries: int = DEFAULT_RETRIES,
        timeout: float | None = None,
    ) -> None:
        self._rpc = rpc
        self._value = value
        self.to = to
        self.command = command
        self.future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.on_resend: Callable[[OutgoingRequest], None] | None = None
        self.internal = internal
        self.target = target
        self.socket = socket
        self.retries = retries
        self.timeout = timeout
        self.timer: asyncio.TimerHandle | None = None
        self.tid: int | None = None
        self.sends = 0
        self.first_sent = 0.0
        self.token_retried = False
        self.use_token(token)

    @property
    def relayed(self) -> bool:
        """Whether the node asked passes the request on: then the answer takes longer than the way to that node."""
        return not self.internal and self.command in (Command.PEER_HANDSHAKE, Command.PEER_HOLEPUNCH)

    def use_token(self, token: bytes | None) -> None:
        """Carry this token from now on, with the value that belongs to it."""
        self.token = token
        self.value = self._value(token or b"") if callable(self._value) else self._value

    def cancel(self) -> None:
        """Forget the request; nothing happens if it is settled."""
        self._rpc.forget(self)
        self.future.cancel()

    def encode(self, tid: int, own_id: bytes | None) -> bytes:
        """Return the datagram."""
        return encode_request(
            Request(tid, self.to, self.command, self.internal, own_id, self.token, self.target, self.value)
        )
