"""One RPC service over many connections: bytes -> lines -> opened requests -> `methods` -> sealed answers.

`daemon` hands in the connections. Anyone may connect; a connection is *proven* by its first request that opens with
the data key, and until then it is a stranger's, to whom the limits below apply. Several requests may be in flight on
one connection; they are answered as they are done. Nothing here waits for a slow peer but its own connection.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from p2pclaude.daemon.methods import MethodError
from p2pclaude.errors import WireError
from p2pclaude.host.log import Event, Log, short
from p2pclaude.protocol.wire import (
    MAX_REQUEST_LINE,
    WRONG_KEY,
    LineBuffer,
    LineTooLong,
    Request,
    Response,
    SealError,
    decode_request,
    encode_response,
    id_of_line,
    seal_json,
    unseal_params,
)

PROVE_SECONDS = 10.0
"""A connection that has not proved the key by then is broken off."""
MAX_UNPROVEN = 64
"""Connections that have not proved the key; one more breaks off the oldest."""
MAX_UNPROVEN_BYTES = 2 * MAX_REQUEST_LINE
"""Bytes kept for all of these together, of lines and frames not complete or not read; the greediest is broken off."""
WEIGH_SECONDS = 0.05
"""How often that is looked at: an unfinished frame grows without a word to us."""
MAX_UNPROVEN_ERRORS = 8
"""Error answers that a connection gets before it has proved the key; then it is broken off."""
MAX_CONNECTIONS = 1024
"""Connections at once; a new one beyond that is broken off."""
MAX_IN_FLIGHT = 32
"""Requests of one connection that are worked on at once; what follows is not read until one is answered."""
MAX_IN_FLIGHT_BYTES = 2 * MAX_REQUEST_LINE
"""Length of these requests together; one may always be worked on."""
FRAME_SLACK = 1024
"""A client may write a whole line as one encrypted frame; this is room for what else stands in it."""
EOF_SECONDS = 5.0
"""A connection whose other side has ended it stays open for answers that are still due, so long at most."""

_INTERRUPTIBLE = frozenset({"get-output", "list-permissions"})

Call = Callable[[str, object], Coroutine[Any, Any, bytes]]
"""`Methods.call`: runs a method and gives its result as JSON text; raises MethodError."""


class PeerConnection(Protocol):
    """What the service needs of a connection: the face of `hyperdht.Connection`."""

    remote_public_key: bytes

    @property
    def how(self) -> str:
        """Give the way the packets take: direct, punched or relayed."""

    @property
    def remote_address(self) -> tuple[str, int] | None:
        """Give where its packets come from."""

    async def read(self) -> bytes:
        """Give what has come, b"" at the end. Raises ConnectionError."""

    async def write(self, data: bytes) -> None:
        """Send bytes as a whole, from any task. Raises ConnectionError."""

    @property
    def unread(self) -> int:
        """Give how many bytes it keeps for `read`, those of a frame that is not complete included."""

    def limit_frames(self, max_bytes: int) -> None:
        """Take no larger frame: what is unfinished of one is kept in memory."""

    async def close(self) -> None:
        """End it in order."""

    def abort(self) -> None:
        """Break it off."""


class Service:
    """Serves `call` to every connection that is handed to `serve`."""

    def __init__(self, data_key: bytes, call: Call, log: Log) -> None:
        self._data_key = data_key
        self._run = call
        self._log = log
        self._peers: dict[int, _Peer] = {}
        self._unproven: dict[int, _Peer] = {}  # in order of arrival
        self._count = 0
        self._calls: set[asyncio.Task[bytes]] = set()
        self._weighing: asyncio.TimerHandle | None = None

    async def serve(self, connection: PeerConnection) -> None:
        """Answer requests until the connection ends; never raises for the peer's sake."""
        peer = self._admit(connection)
        if peer is None:
            return
        try:
            reason = await self._converse(peer)
            await connection.close()  # unlike abort, it delivers the last answers
        except OSError as error:  # ConnectionError and TimeoutError, the library's ones included
            reason = peer.reason or str(error)
        except Exception as error:
            self._log(Event.ERROR, where="connection", error=type(error).__name__)
            reason = "an internal error"
        finally:
            self._leave(peer)
            connection.abort()
        self._log(Event.DISCONNECTED, connection=peer.number, reason=reason, requests=peer.requests)

    async def close(self) -> None:
        """Wait for the requests that are being worked on, then break off every connection."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=0.4)
        for peer in list(self._peers.values()):
            peer.drop("the daemon is stopping")

    def _admit(self, connection: PeerConnection) -> "_Peer | None":
        self._count += 1
        if len(self._peers) >= MAX_CONNECTIONS:
            self._log(Event.REFUSED, connection=self._count, reason=f"{MAX_CONNECTIONS} connections are open")
            connection.abort()
            return None
        connection.limit_frames(MAX_REQUEST_LINE + FRAME_SLACK)
        peer = _Peer(connection, self._count)
        if len(self._unproven) >= MAX_UNPROVEN:
            self._refuse(next(iter(self._unproven.values())), "too many have not proved the key")
        self._peers[peer.number] = self._unproven[peer.number] = peer
        loop = asyncio.get_running_loop()
        if self._weighing is None:
            self._weighing = loop.call_later(WEIGH_SECONDS, self._weigh)
        peer.timer = loop.call_later(PROVE_SECONDS, self._refuse, peer, "it did not prove the key in time")
        address = connection.remote_address
        self._log(
            Event.CONNECTED,
            connection=peer.number,
            peer=short(connection.remote_public_key),
            address=None if address is None else f"{address[0]}:{address[1]}",
            how=connection.how,
        )
        return peer

    def _leave(self, peer: "_Peer") -> None:
        del self._peers[peer.number]
        self._unproven.pop(peer.number, None)
        if peer.timer is not None:
            peer.timer.cancel()
        for task in peer.tasks:
            task.cancel()

    def _refuse(self, peer: "_Peer", reason: str) -> None:
        self._unproven.pop(peer.number, None)
        self._log(Event.REFUSED, connection=peer.number, reason=reason)
        peer.drop(reason)

    async def _converse(self, peer: "_Peer") -> str:
        """Read and answer until the peer ends; give the reason for the log."""
        while data := await peer.connection.read():
            try:
                lines, too_long = peer.buffer.feed(data), None
            except LineTooLong as error:
                lines, too_long = error.lines, error
            for line in lines:
                await self._take(peer, line)
            if too_long is not None:
                await self._answer_error(peer, b"", str(too_long))
                return str(too_long)
            if peer.number in self._unproven:
                self._shed()
        # It has said all it wants to say, and may still be listening.
        if peer.tasks:
            await asyncio.wait(peer.tasks, timeout=EOF_SECONDS)
        return "the peer closed it"

    def _weigh(self) -> None:
        """Look at what strangers hold again and again, as long as there are any."""
        self._shed()
        loop = asyncio.get_running_loop()
        self._weighing = loop.call_later(WEIGH_SECONDS, self._weigh) if self._unproven else None

    def _shed(self) -> None:
        """Break the greediest strangers off while they hold too much together."""
        while sum(peer.weight for peer in self._unproven.values()) > MAX_UNPROVEN_BYTES:
            greediest = max(self._unproven.values(), key=lambda peer: peer.weight)
            self._refuse(greediest, "it sent too much before proving the key")

    async def _take(self, peer: "_Peer", line: bytes) -> None:
        if not line.strip():
            return
        try:
            request = decode_request(line)
            params = self._open(request)
        except WireError as error:
            reason = WRONG_KEY if isinstance(error, SealError) else str(error)
            self._log(Event.BAD_LINE, connection=peer.number, reason=str(error))
            await self._answer_error(peer, line, reason)
            return
        self._prove(peer)
        await peer.room(len(line))
        peer.start(self._answer(peer, request, params, len(line)))

    def _open(self, request: Request) -> Any:
        if request.params is None:
            raise SealError("the request has no params, and so proves nothing")
        return unseal_params(self._data_key, request.params)

    def _prove(self, peer: "_Peer") -> None:
        if self._unproven.pop(peer.number, None) is None:
            return
        if peer.timer is not None:
            peer.timer.cancel()
        self._log(Event.PROVEN, connection=peer.number)

    async def _answer_error(self, peer: "_Peer", line: bytes, reason: str) -> None:
        await peer.connection.write(encode_response(Response(id_of_line(line), False, error=reason)))
        if peer.number in self._unproven:
            peer.errors += 1
            if peer.errors >= MAX_UNPROVEN_ERRORS:
                self._refuse(peer, "it sent too many bad lines")

    async def _answer(self, peer: "_Peer", request: Request, params: Any, size: int) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        peer.requests += 1
        try:
            result = seal_json(self._data_key, await self._call(request.method, params))
            response = Response(request.id, True, result)
        except MethodError as error:
            response = Response(request.id, False, error=str(error))
        except Exception as error:
            # A defect of ours must neither end the connection nor leave the question open. No text: it may quote.
            self._log(Event.ERROR, where=request.method[:100], error=type(error).__name__)
            response = Response(request.id, False, error="internal error in the daemon")
        self._log(
            Event.REQUEST,
            connection=peer.number,
            method=request.method[:100],
            seconds=round(loop.time() - start, 6),
            ok=response.ok,
        )
        try:
            await peer.connection.write(encode_response(response))
        except OSError:
            pass  # the reading side hears of it too
        finally:
            peer.done(size)

    async def _call(self, method: str, params: Any) -> bytes:
        """Run a method; a lost connection interrupts the waiting for news, and nothing else half-way."""
        call = asyncio.get_running_loop().create_task(self._run(method, params))
        if method in _INTERRUPTIBLE:
            return await call
        self._calls.add(call)
        call.add_done_callback(self._forget_call)
        return await asyncio.shield(call)

    def _forget_call(self, call: asyncio.Task[bytes]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # marks it as seen when nobody waits any more


class _Peer:
    """What is kept of one connection."""

    def __init__(self, connection: PeerConnection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.buffer = LineBuffer(MAX_REQUEST_LINE)
        self.timer: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.requests = 0
        self.errors = 0
        self.reason: str | None = None
        self._bytes = 0
        self._room = asyncio.Event()

    @property
    def weight(self) -> int:
        """Give the bytes kept for it."""
        return self.buffer.pending + self.connection.unread

    def start(self, answer: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(answer)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def room(self, size: int) -> None:
        """Wait until a request of that length may be worked on, and count it."""
        while self.tasks and (len(self.tasks) >= MAX_IN_FLIGHT or self._bytes + size > MAX_IN_FLIGHT_BYTES):
            self._room.clear()
            await self._room.wait()
        self._bytes += size

    def done(self, size: int) -> None:
        self._bytes -= size
        asyncio.get_running_loop().call_soon(self._room.set)  # after the task has left `tasks`

    def drop(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.buffer.clear()
        self.connection.abort()
