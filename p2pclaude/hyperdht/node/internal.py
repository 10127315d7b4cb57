"""Answers the DHT's internal commands (ring 2): what every node does for every other, whoever runs it.

`node` hands over each request whose internal flag is set. Source: dht-rpc index.js, _onrequest.
"""

import asyncio
from typing import Final

from ..constants import ErrorCode, InternalCommand
from ..encoding import Reader
from ..errors import DecodeError
from ..rpc.requests import IncomingRequest
from .upkeep import Upkeep

MAX_PING_DELAY_MS: Final = 10_000
MAX_DELAYED_PINGS: Final = 1024


class InternalCommands:
    """PING, PING_NAT, FIND_NODE, DOWN_HINT and DELAYED_PING; malformed ones are not answered."""

    def __init__(self, upkeep: Upkeep) -> None:
        self._upkeep = upkeep
        self._delayed: set[asyncio.TimerHandle] = set()
        self._handlers = {
            InternalCommand.PING: _pong,
            InternalCommand.PING_NAT: self._ping_nat,
            InternalCommand.FIND_NODE: self._find_node,
            InternalCommand.DOWN_HINT: self._down_hint,
            InternalCommand.DELAYED_PING: self._delayed_ping,
        }

    def handle(self, request: IncomingRequest) -> None:
        """Answer one request."""
        handler = self._handlers.get(request.command)  # type: ignore[call-overload]
        if handler is None:
            request.error(ErrorCode.UNKNOWN_COMMAND)
            return
        try:
            handler(request)
        except DecodeError:
            pass

    def close(self) -> None:
        """Drop the answers that are still to be sent."""
        for timer in self._delayed:
            timer.cancel()
        self._delayed.clear()

    # The value is the port to answer to, u16: does the asker's NAT let a datagram in that it did not ask for there?
    def _ping_nat(self, request: IncomingRequest) -> None:
        port = Reader(request.value or b"").uint16()
        if port:
            request.reply(None, token=False, closer_nodes=False, to=(request.source[0], port))

    def _find_node(self, request: IncomingRequest) -> None:
        if request.target is not None:
            request.reply(None, token=False)

    # The value is the encoded address of a node that we named and that does not answer.
    def _down_hint(self, request: IncomingRequest) -> None:
        if request.value is not None and len(request.value) >= 6:
            self._upkeep.down_hint(request.value)
            _pong(request)

    # The value is the delay in ms, u32.
    def _delayed_ping(self, request: IncomingRequest) -> None:
        delay_ms = Reader(request.value or b"").uint32()
        if delay_ms > MAX_PING_DELAY_MS or len(self._delayed) >= MAX_DELAYED_PINGS:
            return

        def answer() -> None:
            self._delayed.discard(timer)
            _pong(request)

        timer = asyncio.get_running_loop().call_later(delay_ms / 1000, answer)
        self._delayed.add(timer)


def _pong(request: IncomingRequest) -> None:
    request.reply(None, token=False, closer_nodes=False)
