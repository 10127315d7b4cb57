"""A DHT in memory with the face that the daemon uses: connections are paired byte streams, records a dictionary."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from p2pclaude.daemon.service import PeerConnection
from p2pclaude.hyperdht import KeyPair, MutableRecord
from p2pclaude.protocol.wire import (
    MAX_RESPONSE_LINE,
    LineBuffer,
    Request,
    Response,
    decode_response,
    encode_request,
    seal,
    unseal,
)

WINDOW = 256 * 1024


class FakeConnection:
    """One end of a byte stream; a write waits while the other end holds more than WINDOW unread."""

    def __init__(self) -> None:
        self.remote_public_key = bytes(32)
        self.how = "direct"
        self.remote_address: tuple[str, int] | None = ("192.0.2.7", 40000)
        self.peer: FakeConnection = self
        self.closed = False
        self.max_frame_bytes = 0
        self._unread = bytearray()
        self._eof = False
        self._error: str | None = None
        self._change = asyncio.Event()
        self._writing = asyncio.Lock()

    @classmethod
    def pair(cls) -> "tuple[FakeConnection, FakeConnection]":
        """Make both ends."""
        one, other = cls(), cls()
        one.peer, other.peer = other, one
        return one, other

    async def read(self) -> bytes:
        """Give what is there, b"" at the end."""
        while not self._unread:
            if self._error is not None:
                raise ConnectionResetError(self._error)
            if self._eof:
                return b""
            await self._wait()
        data = bytes(self._unread[:65536])
        del self._unread[:65536]
        self._wake()
        return data

    async def write(self, data: bytes) -> None:
        """Hand bytes to the other end, as much at a time as its window has room for."""
        async with self._writing:
            for start in range(0, len(data), WINDOW):
                await self._write(data[start : start + WINDOW])

    async def _write(self, data: bytes) -> None:
        if self.closed:
            raise ConnectionResetError(self._error or "the connection is closed")
        self.peer._unread += data
        self.peer._wake()
        while len(self.peer._unread) > WINDOW and not self.closed:
            await self.peer._wait()
        if self._error is not None:
            raise ConnectionResetError(self._error)

    async def write_eof(self) -> None:
        """End this direction."""
        self.peer._eof = True
        self.peer._wake()

    async def close(self) -> None:
        """End this side, wait for the other to end too, and break off if it does not."""
        if not self.closed:
            await self.write_eof()
            try:
                async with asyncio.timeout(3.0):
                    while not (self._eof or self.closed):
                        await self._wait()
            except TimeoutError:
                self.abort()
            self.closed = True

    def limit_frames(self, max_bytes: int) -> None:
        """Note the largest frame that would be taken."""
        self.max_frame_bytes = max_bytes

    def leave(self) -> None:
        """End both directions."""
        self.abort()

    def abort(self) -> None:
        """Break off."""
        if self.closed:
            return
        for end in (self, self.peer):
            end.closed, end._error = True, "broken off"
            end._wake()

    @property
    def unread(self) -> int:
        """Give how many bytes wait to be read here."""
        return len(self._unread)

    async def _wait(self) -> None:
        self._change.clear()
        await self._change.wait()

    def _wake(self) -> None:
        self._change.set()
        self.peer._change.set()


class Caller:
    """A client of the wire contract over one connection, with several calls in flight."""

    def __init__(self, connection: FakeConnection, data_key: bytes) -> None:
        self.connection = connection
        self.data_key = data_key
        self.order: list[str | int] = []  # the ids of answers as they came
        self._ids = itertools.count(1)
        self._buffer = LineBuffer(MAX_RESPONSE_LINE)
        self._waiting: dict[str | int, asyncio.Future[Response]] = {}
        self._reader = asyncio.create_task(self._read())

    async def call(self, method: str, params: object = None) -> Any:
        """Call a method and give its opened result; AssertionError if it is not ok."""
        response = await self.ask(method, {} if params is None else params)
        assert response.ok, response.error
        return {} if response.result is None else unseal(self.data_key, response.result)

    async def ask(self, method: str, params: object) -> Response:
        """Call a method and give the response as it stands."""
        number = str(next(self._ids))
        return await self.raw(encode_request(Request(number, method, seal(self.data_key, params))), number)

    async def raw(self, line: bytes, number: str | int) -> Response:
        """Send a line and give the response with that id."""
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self.connection.write(line)
        except ConnectionResetError:
            pass  # the answer may have come before the break
        response: Response = await future
        return response

    async def ended(self) -> None:
        """Wait until the other side has ended or broken the connection."""
        await asyncio.wait([self._reader])

    def close(self) -> None:
        """Break the connection off."""
        self._reader.cancel()
        self.connection.abort()

    async def _read(self) -> None:
        try:
            while data := await self.connection.read():
                for line in self._buffer.feed(data):
                    response = decode_response(line)
                    self.order.append(response.id)
                    if (future := self._waiting.pop(response.id, None)) is not None and not future.done():
                        future.set_result(response)
            await self.connection.write_eof()
        except OSError:
            pass
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError("no answer"))
                future.exception()


class FakeServer:
    """What `FakeDHT.create_server` makes."""

    def __init__(self, dht: "FakeDHT", on_connection: Callable[[PeerConnection], Awaitable[None]]) -> None:
        self._dht = dht
        self._on_connection = on_connection
        self._tasks: set[asyncio.Future[None]] = set()
        self.key_pair: KeyPair | None = None
        self.refreshes = 0
        self.closed = False

    async def listen(self, key_pair: KeyPair) -> None:
        """Take connections from now on."""
        self._dht.events.append("listen")
        self.key_pair = key_pair
        if self._dht.listen_forever:
            await asyncio.Event().wait()

    def refresh(self) -> None:
        """Count."""
        self.refreshes += 1

    async def close(self) -> None:
        """Take none any more."""
        self._dht.events.append("unannounce")
        self.closed = True

    def accept(self, connection: FakeConnection) -> None:
        """Hand a connection to the application, as the library does: in a task of its own."""

        async def serve() -> None:
            await self._on_connection(connection)
            await connection.close()

        task = asyncio.ensure_future(serve())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class FakeDHT:
    """One node, with one server on it."""

    def __init__(self) -> None:
        self.port = 49737
        self.local_addresses = ["192.0.2.7"]
        self.records: list[tuple[int, bytes]] = []
        self.put_error: Exception | None = None
        self.start_error: OSError | None = None
        self.listen_forever = False
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.events: list[str] = []
        self.server: FakeServer | None = None
        self.relay_through: bytes | None = None
        self.allow: Callable[[bytes, tuple[str, int]], bool] | None = None

    async def start(self) -> None:
        """Begin."""
        self.events.append("start")
        if self.start_error is not None:
            raise self.start_error

    async def destroy(self, timeout: float) -> None:
        """End, once `may_end` is set."""
        self.events.append("destroy")
        await self.may_end.wait()

    def create_server(
        self,
        on_connection: Callable[[PeerConnection], Awaitable[None]],
        *,
        allow: Callable[[bytes, tuple[str, int]], bool] | None = None,
        relay_through: bytes | None = None,
    ) -> FakeServer:
        """Make the server."""
        self.allow = allow
        self.relay_through = relay_through
        self.server = FakeServer(self, on_connection)
        return self.server

    async def mutable_put(self, key_pair: KeyPair, value: bytes, seq: int = 0) -> None:
        """Keep a record."""
        if self.put_error is not None:
            raise self.put_error
        self.records.append((seq, value))

    async def mutable_get(self, public_key: bytes) -> MutableRecord | None:
        """Give the newest record."""
        if not self.records:
            return None
        seq, value = max(self.records)
        return MutableRecord(seq, value)

    def connect(self) -> FakeConnection:
        """Connect to the server and give the client's end."""
        assert self.server is not None
        ours, theirs = FakeConnection.pair()
        self.server.accept(theirs)
        return ours
