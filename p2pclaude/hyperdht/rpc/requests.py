"""What is asked of a node and what it asks: one object a request (ring 2).

`rpc` makes an `IncomingRequest` of every request datagram for `node` and the handlers above it to answer, and an
`OutgoingRequest` of every request of our own; a `Reply` is what comes back. Source: dht-rpc lib/io.js.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple, TypedDict, Unpack

from ..constants import Command, ErrorCode
from ..encoding import Address
from ..net.sockets import Socket
from .messages import Request, Response, encode_request, encode_response, node_id
from .own_side import OwnSide

DEFAULT_RETRIES: Final = 3
RELAYED_RETRIES: Final = 6  # on the way client, relay, server and back a packet may get lost four times

Value = bytes | Callable[[bytes], bytes] | None
"""A request's value; a function makes it of the token the request carries (signatures cover tokens)."""


class QuestionOptions(TypedDict, total=False):
    """What may be said of a request beside its receiver, its command and its token.

    `timeout` is in seconds for each of the 1 + `retries` sends (default: learnt); pass one when the answer takes longer
    than the node's round trip (handshakes and hole punching are known to). `socket` is where it leaves (default: the
    node's).
    """

    internal: bool
    target: bytes | None
    value: Value
    socket: Socket | None
    retries: int
    timeout: float | None


class RequestOptions(QuestionOptions, total=False):
    """The same with the token: one that is refused is replaced by the one that came with the refusal, once."""

    token: bytes | None


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

    __slots__ = ("_own", "command", "id", "internal", "socket", "source", "target", "tid", "to", "token", "value")

    def __init__(self, own: OwnSide, socket: Socket, source: Address, message: Request) -> None:
        self._own = own
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
        own_id = self._own.id_on(out)
        message = Request(self.tid, to, self.command, self.internal, own_id, None, self.target, value)
        self._own.send_datagram(out, encode_request(message), to)

    def _respond(
        self,
        error: int,
        value: bytes | None,
        token: bool,
        closer_nodes: bool,
        socket: Socket | None,
        to: Address | None,
    ) -> None:
        own, out, receiver = self._own, socket or self.socket, to or self.source
        response = Response(
            self.tid,
            receiver,
            own.id_on(out),
            own.issue_token(receiver[0]) if token else None,
            tuple(own.closest(self.target)) if closer_nodes and self.target is not None else (),
            error,
            value,
        )
        own.send_datagram(out, encode_response(response), receiver)


class Question:
    """What is asked of whom, and how patiently: a request as it stays while it is sent again."""

    __slots__ = ("_value", "command", "internal", "retries", "socket", "target", "timeout", "to")

    def __init__(
        self,
        to: Address,
        command: int,
        *,
        internal: bool = False,
        target: bytes | None = None,
        value: Value = None,
        socket: Socket | None = None,
        retries: int = DEFAULT_RETRIES,
        timeout: float | None = None,
    ) -> None:
        self.to = to
        self.command = command
        self.internal = internal
        self.target = target
        self.socket = socket
        self.retries = retries
        self.timeout = timeout
        self._value = value

    @property
    def relayed(self) -> bool:
        """Whether the node asked passes the request on: then the answer takes longer than the way to that node."""
        return not self.internal and self.command in (Command.PEER_HANDSHAKE, Command.PEER_HOLEPUNCH)

    def value_for(self, token: bytes | None) -> bytes | None:
        """Return the value that belongs to a token."""
        return self._value(token or b"") if callable(self._value) else self._value


class OutgoingRequest:
    """A request on its way: `future` gives the `Reply` or raises; `cancel` forgets it at once.

    `on_resend` is called whenever the last of `sends` sends has not been answered in time and another one follows.
    """

    __slots__ = (
        "_on_cancel", "asked", "first_sent", "future", "on_resend", "sends", "tid", "timer", "token", "token_retried",
        "value",
    )  # fmt: skip

    def __init__(
        self,
        on_cancel: Callable[[OutgoingRequest], None],
        to: Address,
        command: int,
        *,
        token: bytes | None = None,
        **options: Unpack[QuestionOptions],
    ) -> None:
        self._on_cancel = on_cancel
        self.asked = Question(to, command, **options)
        self.future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.on_resend: Callable[[OutgoingRequest], None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.tid: int | None = None
        self.sends = 0
        self.first_sent = 0.0
        self.token_retried = False
        self.use_token(token)

    @property
    def to(self) -> Address:
        """Whom it asks."""
        return self.asked.to

    def use_token(self, token: bytes | None) -> None:
        """Carry this token from now on, with the value that belongs to it."""
        self.token = token
        self.value = self.asked.value_for(token)

    def cancel(self) -> None:
        """Forget the request; nothing happens if it is settled."""
        self._on_cancel(self)
        self.future.cancel()

    def encode(self, tid: int, own_id: bytes | None) -> bytes:
        """Return the datagram."""
        asked = self.asked
        return encode_request(
            Request(tid, asked.to, asked.command, asked.internal, own_id, self.token, asked.target, self.value)
        )
