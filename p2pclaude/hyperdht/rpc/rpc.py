"""Requests and responses over the endpoint's two sockets (ring 2).

`endpoint` hands every datagram that is no packet of a known stream to `Rpc.receive`. A response goes to the request
in flight that asked for it; a request goes to `node`, wrapped as `IncomingRequest`, which knows how to answer.
Everything the node itself asks leaves through `Rpc.request` (one awaiting task) or `Rpc.start` (no task: queries).
Source of the rules: dht-rpc lib/io.js; where this differs, replies are believed only from the address that was
asked, INVALID_TOKEN is retried, and timeouts are learnt.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Final, Unpack

from ..constants import ErrorCode, InternalCommand
from ..encoding import Address
from ..errors import DecodeError, HyperDHTError, Timeout
from ..net.endpoint import Endpoint
from ..net.sockets import Socket
from .messages import Request, Response, decode_message
from .own_side import OwnSide
from .requests import IncomingRequest, OutgoingRequest, Reply, RequestOptions, checked_id
from .timeouts import LAST_TIMEOUT, AdaptiveTimeouts
from .window import SLOT_SECONDS, CongestionWindow

__all__ = ["IncomingRequest", "OutgoingRequest", "Reply", "Rpc", "RpcStats"]

logger = logging.getLogger(__name__)

MAX_TIDS: Final = 65536


class RpcStats:
    """Counters since the start; `timeouts` are requests given up, `retries` single resends."""

    def __init__(self) -> None:
        self.requests = 0
        self.responses = 0
        self.timeouts = 0
        self.retries = 0
        self.token_retries = 0
        self.received = 0
        self.garbage = 0
        self.wrong_source = 0
        self.unmatched = 0
        self.bad_tokens = 0
        self.handler_errors = 0
        self.commands_sent: dict[InternalCommand, int] = {}


class Rpc:
    """The table of requests in flight, and the way in for those of others.

    `own` is what others see of us, which the node sets, as it sets the callbacks `on_request`, `on_response` and
    `on_timeout`. The flag that the first two get says that the datagram came in on the socket we do not send from, so
    that its `to` tells nothing about that.
    """

    def __init__(self, endpoint: Endpoint, rng: random.Random, *, max_window: int = 80) -> None:
        self.own = OwnSide(rng)
        self.on_request: Callable[[IncomingRequest, bool], None] = _ignore
        self.on_response: Callable[[Reply, bool], None] = _ignore
        self.on_timeout: Callable[[OutgoingRequest], None] = _ignore
        self.stats = RpcStats()
        self.timeouts = AdaptiveTimeouts(rng)
        self._window = CongestionWindow(max_window)
        self._calls: dict[OutgoingRequest, None] = {}  # in order, so that simulations replay
        self._in_flight: dict[int, OutgoingRequest] = {}  # by tid, which a request gets with its first send
        self._queue: deque[OutgoingRequest] = deque()  # may hold forgotten ones: they are skipped
        self._next_tid = rng.randrange(MAX_TIDS)
        self._rotation: asyncio.TimerHandle | None = None
        self._last_heard = 0.0
        self._closed: Callable[[], HyperDHTError] | None = None
        endpoint.on_message = self.receive

    @property
    def in_flight(self) -> int:
        """The number of requests that wait for an answer or for room in the window."""
        return len(self._calls)

    def heard_since(self, call: OutgoingRequest) -> bool:
        """Tell whether anybody said anything since a request was first sent.

        If not, its silence says more about our own network than about the node that was asked.
        """
        return self._last_heard >= call.first_sent

    # asking

    async def request(self, to: Address, command: int, **options: Unpack[RequestOptions]) -> Reply:
        """Ask a node and return its reply, whose `error` may be set.

        The reply must come from `to`, on any of our sockets. Raises Timeout, Suspended or Destroyed. A cancelled
        task's request is forgotten.
        """
        call = self.start(to, command, **options)
        try:
            return await call.future
        finally:
            call.cancel()

    def start(
        self,
        to: Address,
        command: int,
        *,
        on_resend: Callable[[OutgoingRequest], None] | None = None,
        **options: Unpack[RequestOptions],
    ) -> OutgoingRequest:
        """Begin what `request` awaits. Raises Suspended or Destroyed at once; all else comes through the future."""
        if self._closed is not None:
            raise self._closed()
        call = OutgoingRequest(self.forget, to, command, **options)
        call.on_resend = on_resend
        self._calls[call] = None
        try:
            self._submit(call)
        except BaseException:  # a malformed argument: the caller's error, not the network's
            self._calls.pop(call, None)
            raise
        self.stats.requests += 1
        return call

    def forget(self, call: OutgoingRequest) -> None:
        """Take a request out of the table; its timer and its place in the window go with it."""
        if call not in self._calls:
            return
        del self._calls[call]
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        if call.tid is not None:
            del self._in_flight[call.tid]
            self._window.settled()
            self._drain()

    def close(self, reason: Callable[[], HyperDHTError]) -> None:
        """Fail everything in flight with `reason()`, and every later request, until `open`."""
        self._closed = reason
        self.own.silent = True
        calls = list(self._calls)
        self._calls.clear()
        self._in_flight.clear()
        self._queue.clear()
        self._window.clear()
        if self._rotation is not None:
            self._rotation.cancel()
            self._rotation = None
        for call in calls:
            if call.timer is not None:
                call.timer.cancel()
            if not call.future.done():
                call.future.set_exception(reason())

    def open(self) -> None:
        """Take requests again, after `close`."""
        self._closed = None
        self.own.silent = False

    def _submit(self, call: OutgoingRequest) -> None:
        if self._window.full or self._queue:
            if not call.sends:
                call.encode(0, self.own.identity)  # raises now what it would raise later
            self._queue.append(call)
            self._watch_window()
        else:
            self._send(call)

    def _send(self, call: OutgoingRequest) -> None:
        loop = asyncio.get_running_loop()
        now, asked = loop.time(), call.asked
        out = asked.socket if asked.socket is not None and not asked.socket.closed else self.own.socket
        tid = self._take_tid() if call.tid is None else call.tid
        datagram = call.encode(tid, self.own.id_on(out))
        if call.tid is None:
            call.tid, call.first_sent = tid, now
            self._in_flight[tid] = call
        call.sends += 1
        self._count_send(call)
        call.timer = loop.call_later(self._wait_for(call, now), self._on_timer, call)
        self.own.send_datagram(out, datagram, asked.to)

    def _wait_for(self, call: OutgoingRequest, now: float) -> float:
        asked, timeouts = call.asked, self.timeouts
        if asked.timeout is not None:
            return asked.timeout
        wait = timeouts.get_relayed(call.sends) if asked.relayed else timeouts.get(asked.to, call.sends, now)
        last = 2 * LAST_TIMEOUT if asked.relayed else LAST_TIMEOUT  # two nodes may be busy
        return wait if call.sends <= asked.retries else max(wait, last)

    def _count_send(self, call: OutgoingRequest) -> None:
        self._window.sent()
        self._watch_window()
        if call.asked.internal and call.asked.command in _INTERNAL:
            command = InternalCommand(call.asked.command)
            self.stats.commands_sent[command] = self.stats.commands_sent.get(command, 0) + 1

    def _take_tid(self) -> int:
        # The window keeps far fewer than 65536 in flight, so this ends.
        while self._next_tid in self._in_flight:
            self._next_tid = (self._next_tid + 1) % MAX_TIDS
        tid = self._next_tid
        self._next_tid = (tid + 1) % MAX_TIDS
        return tid

    def _on_timer(self, call: OutgoingRequest) -> None:
        call.timer = None
        if call.sends <= call.asked.retries:
            self._resend(call)
            return
        self.stats.timeouts += 1
        self.forget(call)
        if not call.future.done():
            call.future.set_exception(Timeout(f"no answer after {call.sends} requests"))
        self.on_timeout(call)

    def _resend(self, call: OutgoingRequest) -> None:
        if call.on_resend is not None:
            call.on_resend(call)
            if call not in self._calls:
                return
        self.stats.retries += 1
        self._submit(call)

    def _watch_window(self) -> None:
        if self._rotation is None:
            self._rotation = asyncio.get_running_loop().call_later(SLOT_SECONDS, self._rotate)

    def _rotate(self) -> None:
        self._rotation = None
        self._window.rotate()
        self._drain()
        if self._window.total or self._queue:
            self._watch_window()

    def _drain(self) -> None:
        while self._queue and not self._window.full:
            call = self._queue.popleft()
            if call in self._calls and call.timer is None:  # with a timer it was sent since, for a new token
                self._send(call)

    # being asked and answered

    def receive(self, socket: Socket, data: bytes, source: Address) -> None:
        """Take one datagram; never raises. What is neither request nor response is dropped and counted."""
        if self._closed is not None or source[1] == 0:
            return
        self.stats.received += 1
        try:
            message = decode_message(data)
        except DecodeError:
            self.stats.garbage += 1
            return
        self._last_heard = asyncio.get_running_loop().time()
        external = self.own.is_other_socket(socket)
        try:
            if isinstance(message, Request):
                self._receive_request(socket, source, message, external)
            else:
                self._receive_response(socket, source, message, external)
        except Exception:  # a bug in one handler must not end the socket's reader
            self.stats.handler_errors += 1
            logger.exception("a datagram's handler failed")

    def _receive_request(self, socket: Socket, source: Address, message: Request, external: bool) -> None:
        request = IncomingRequest(self.own, socket, source, message)
        if message.token is not None and not self.own.is_our_token(source[0], message.token):
            self.stats.bad_tokens += 1
            request.error(ErrorCode.INVALID_TOKEN, token=True)
            return
        self.on_request(request, external)

    def _receive_response(self, socket: Socket, source: Address, message: Response, external: bool) -> None:
        call = self._in_flight.get(message.tid)
        if call is None:
            self.stats.unmatched += 1
            return
        if call.to != source:
            self.stats.wrong_source += 1
            return
        reply = self._make_reply(call, socket, source, message)
        self.forget(call)
        self.stats.responses += 1
        self.on_response(reply, external)
        if not self._retry_token(call, reply) and not call.future.done():
            call.future.set_result(reply)

    def _make_reply(self, call: OutgoingRequest, socket: Socket, source: Address, message: Response) -> Reply:
        now = asyncio.get_running_loop().time()
        rtt = now - call.first_sent
        if call.asked.timeout is None and not call.asked.relayed:  # else the answer may have waited for something
            self.timeouts.put(source, rtt, call.sends, now)
        return Reply(
            source,
            message.to,
            message.tid,
            checked_id(message.id, source),
            message.token,
            message.closer_nodes,
            message.error,
            message.value,
            rtt,
            socket,
        )

    def _retry_token(self, call: OutgoingRequest, reply: Reply) -> bool:
        # A walk may take longer than the 7.5 to 15 s that a token lives; the refusal brings a fresh one.
        if reply.error != ErrorCode.INVALID_TOKEN or reply.token is None or call.future.done():
            return False
        if call.token is None or call.token_retried or self._closed is not None:
            return False
        call.token_retried = True
        self.stats.token_retries += 1
        try:
            call.use_token(reply.token)
        except Exception as error:
            call.future.set_exception(error)
            return True
        call.tid, call.sends = None, 0
        self._calls[call] = None
        self._submit(call)
        return True


_INTERNAL: Final = frozenset(InternalCommand)


def _ignore(*args: object) -> None:
    pass
