"""An encrypted connection: what `HyperDHT.connect` gives and a server's handler gets (ring 2).

Between a UDX stream and the application stands the secret stream: bytes written here are sealed into frames and
handed to `streams`; packets that come back are opened and wait here to be read. What nobody reads keeps the peer's
send window shut.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Final, Self

from ..encoding import Address
from ..errors import ConnectionClosed, DecodeError
from ..net.sockets import Socket
from ..net.streams import Stream
from .noise import NoiseIK
from .secretstream import MAX_FRAME_BYTES, SecretStream

READ_BYTES: Final = 65536
READ_HIGH_WATER: Final = 1 << 20  # unread plaintext above which the peer's window is no longer opened
WRITE_HIGH_WATER: Final = 1 << 20  # bytes not sent yet above which write() waits
WRITE_CHUNK: Final = 256 << 10  # sealed at a time, so that a large write neither doubles in memory nor holds the loop
CLOSE_TIMEOUT: Final = 6.0  # an end is sent eight times meanwhile
CLOSE_INTERVAL: Final = 0.5  # between looks at what was acknowledged

_BROKEN_OFF_HERE: Final = "the connection was broken off on this side"
_REASONS: Final = {
    "ECONNRESET": "the peer broke the connection off",
    "ETIMEDOUT": "the peer does not answer any more",
}


class _Incoming:
    """What has arrived for the reader."""

    __slots__ = ("chunks", "discarding", "eof", "messages", "readable", "unread", "withheld")

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.unread = 0  # their bytes
        self.withheld = 0  # received raw bytes not yet given back to the peer's window
        self.messages: deque[bytes] = deque(maxlen=256)
        self.eof = False
        self.discarding = False  # nobody reads any more
        self.readable = asyncio.Event()  # there is something to read, or a reason why not

    def take(self, max_bytes: int) -> bytes:
        """Take up to so many bytes from the front; there must be some."""
        data = self.chunks.popleft()
        if len(data) > max_bytes:
            self.chunks.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self.unread -= len(data)
        return data

    def clear(self) -> None:
        """Drop what nobody will read."""
        self.chunks.clear()
        self.unread = 0


class _Outgoing:
    """The own side's turn to write, and its end."""

    __slots__ = ("drained", "ended", "last_write", "lock")

    def __init__(self) -> None:
        self.drained = asyncio.Event()  # the send buffer has room, or never will have
        self.ended = False
        self.last_write = 0.0  # the loop's time
        self.lock = asyncio.Lock()


class _KeepAlive:
    """How long nothing may be written, in seconds (0: for ever), and the timer of that."""

    __slots__ = ("interval", "timer")

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """Look no more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Connection:
    """A reliable, ordered, encrypted byte stream to the holder of a public key.

    Use it as a context manager, or call `close`. One task may read while others write; what one call of `write`
    carries stays together.
    """

    def __init__(
        self,
        stream: Stream,
        public_key: bytes,
        remote_public_key: bytes,
        *,
        is_initiator: bool,
        keep_alive: float,
        rng: random.Random,
    ) -> None:
        self.public_key = public_key
        """The own public key, 32 bytes."""
        self.remote_public_key = remote_public_key
        """The peer's public key, 32 bytes: proven by the handshake."""
        self.is_initiator = is_initiator
        """Whether this side called `connect`."""
        self.path_kind: Callable[[], str] = lambda: "direct"
        """Tells what kind of path the stream is on; for `paths`."""
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._secret: SecretStream | None = None
        self._early: list[bytes] = []  # raw bytes that came before the handshake was through
        self._in = _Incoming()
        self._out = _Outgoing()
        self._reason: str | None = None  # why the connection broke
        self._closed = asyncio.Event()
        self._opened = asyncio.Event()
        self._keep_alive = _KeepAlive(keep_alive)
        self._rng = rng
        stream.handler = self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; break off where the body failed: at once, and the peer shall not take half for the whole."""
        if kind is None:
            await self.close()
        else:
            self.abort()

    @property
    def remote_address(self) -> Address | None:
        """Where packets go at present; None before the first."""
        return self._stream.address

    @property
    def how(self) -> str:
        """The way the packets take: `direct`, `punched` (through NATs) or `relayed`; it may change to a better one."""
        return self.path_kind()

    @property
    def closed(self) -> bool:
        """Whether the connection has ended or broken."""
        return self._closed.is_set()

    @property
    def rtt(self) -> float | None:
        """The smoothed round trip in seconds; None before the first measurement."""
        return self._stream.core.srtt

    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """Return between 1 and `max_bytes` bytes as soon as there are any, or b"" at the peer's end.

        Raises ConnectionClosed when the connection broke, once everything received before is read.
        """
        incoming = self._in
        while not incoming.chunks:
            if incoming.eof:  # first, for a peer that ended its side and then left without waiting
                return b""
            if self._reason is not None:
                raise self._gone()
            incoming.readable.clear()
            await incoming.readable.wait()
        data = incoming.take(max_bytes)
        if incoming.withheld and incoming.unread <= READ_HIGH_WATER // 2:
            self._stream.consume(incoming.withheld)
            incoming.withheld = 0
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes; returns when the send window has room for more.

        Raises ConnectionClosed when the connection is closed or breaks in the meantime.
        """
        if 0 < len(data) <= WRITE_CHUNK and not self._out.lock.locked():  # the usual case needs no lock
            self._send(data)
            self._stream.hurry()
            if self.unsent <= WRITE_HIGH_WATER:
                return
            data = b""
        async with self._out.lock:
            await self._drain()
            for start in range(0, len(data), WRITE_CHUNK):
                self._send(data[start : start + WRITE_CHUNK])
                await self._drain()

    async def _drain(self) -> None:
        """Wait until the send buffer has room again."""
        while self._stream.core.buffered > WRITE_HIGH_WATER and not self.closed:
            self._out.drained.clear()
            await self._out.drained.wait()
        if self.closed:
            raise self._gone("the connection is closed")

    async def read_frame(self) -> bytes:
        """Return the next message as the peer framed it, b"" at its end: for protocols that keep those borders.

        A peer of this library frames what `write_frame` sends, and cuts what `write` sends anywhere.
        """
        return await self.read(MAX_FRAME_BYTES)

    async def write_frame(self, data: bytes) -> None:
        """Send bytes as one message; returns when the send window has room for more."""
        async with self._out.lock:
            self.send_frame(data)
            await self._drain()

    def send_frame(self, data: bytes) -> None:
        """Queue bytes as one message at once, for control messages: mind `unsent`. Raises ConnectionClosed."""
        if self.closed or self._out.ended or self._secret is None:
            raise self._gone("the connection is closed")
        self._write_raw(self._secret.encrypt_frame(data))

    async def write_eof(self) -> None:
        """End the own side: the peer reads to the end, and may go on writing."""
        async with self._out.lock:
            self._end()

    def send_message(self, data: bytes) -> None:
        """Send one unordered, unreliable message of at most about 1,100 bytes."""
        if self._secret is None or self.closed:
            raise ConnectionClosed("the connection is closed")
        self._stream.send_message(self._secret.encrypt_message(data))

    def receive_message(self) -> bytes | None:
        """Return the oldest unordered message received, or None; the last 256 are kept."""
        return self._in.messages.popleft() if self._in.messages else None

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """End the connection: everything written is delivered first, what still comes in is dropped.

        Breaks it off after `timeout` seconds in which the peer acknowledged nothing: a slow path is no dead one.
        """
        if self.closed:
            return
        self._end()
        self._stop_reading()
        try:
            await self._wait_for_end(timeout)
        finally:
            self.abort()

    def _stop_reading(self) -> None:
        """Drop what nobody will read, or the peer's end could not come through behind it."""
        incoming = self._in
        incoming.discarding = True
        incoming.clear()
        self._stream.consume(incoming.withheld)
        incoming.withheld = 0

    async def _wait_for_end(self, timeout: float) -> None:
        """Wait until the connection has ended, or nothing was acknowledged for so long."""
        loop, sender = self._loop, self._stream.core.sender
        acknowledged, since = sender.acked_below, loop.time()
        while not self.closed and loop.time() - since < timeout:
            try:
                async with asyncio.timeout(min(CLOSE_INTERVAL, timeout)):
                    await self._closed.wait()
            except TimeoutError:
                if sender.acked_below != acknowledged:
                    acknowledged, since = sender.acked_below, loop.time()

    def abort(self) -> None:
        """Break the connection off at once; what was not delivered is lost."""
        if not self.closed:
            self._in.clear()  # the stream is remembered for a while, and so is this
            self._finish(_BROKEN_OFF_HERE)
            self._stream.destroy()

    def leave(self) -> None:
        """End the own side and go, without waiting to hear that the peer knows.

        For who has the answer to all that was written: what the peer would still send is lost.
        """
        if not self.closed:
            self._end()
            self._stream.flush()
            self.abort()

    async def wait_closed(self) -> None:
        """Wait until the connection has ended or broken."""
        await self._closed.wait()

    # For connect, server and relay

    @property
    def socket(self) -> Socket | None:
        """The socket packets leave from at present; None before the first."""
        return self._stream.socket

    @property
    def unsent(self) -> int:
        """The bytes written that have not left yet."""
        return self._stream.core.buffered

    @property
    def unread(self) -> int:
        """The bytes kept for the reader, those of a frame that is not complete yet included."""
        return self._in.unread + (0 if self._secret is None else self._secret.buffered)

    def fail(self, reason: str) -> None:
        """Break the connection off because its way is gone; what was received can still be read."""
        if not self.closed:
            self._finish(reason)
            self._stream.destroy()

    def limit_frames(self, max_bytes: int) -> None:
        """Break the connection off when the peer announces a larger frame: what a stranger can make us keep."""
        if self._secret is not None:
            self._secret.max_frame_bytes = max_bytes

    def set_keep_alive(self, seconds: float) -> None:
        """Send an empty message whenever nothing was written for so long; 0 for never."""
        self._keep_alive.cancel()
        self._keep_alive.interval = seconds
        if self._secret is not None:
            self._arm_keep_alive()

    @property
    def opened(self) -> bool:
        """Whether the peer's first bytes have arrived, which prove that it holds the keys and hears us."""
        return self._secret is not None and self._secret.opened

    async def wait_opened(self) -> None:
        """Wait for the peer's first bytes; raises ConnectionClosed if the connection breaks before."""
        await self._opened.wait()
        if not self.opened:
            raise self._gone("the connection ended before it was open")

    def start(self, noise: NoiseIK, early_data: bytes = b"") -> None:
        """Begin with the keys of a complete handshake: sends the header and first bytes, opens what came early."""
        self._secret = SecretStream(self.is_initiator, noise.handshake_hash, noise.tx_key, noise.rx_key, self._rng)
        self._write_raw(self._secret.header())
        if early_data:
            self._send(early_data)
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)
        self._arm_keep_alive()

    # StreamHandler

    def data_received(self, data: bytes) -> None:
        """Open frames and keep their plaintext for the reader; a forged one breaks the connection off."""
        if self._secret is None:
            self._early.append(data)
            return
        try:
            messages = self._secret.receive_data(data)
        except DecodeError:
            self._finish("the peer sent bytes that do not decrypt")
            self._stream.destroy()
            return
        incoming = self._in
        for message in messages:
            if message and not incoming.discarding:  # an empty one is the peer's keep-alive
                incoming.chunks.append(message)
                incoming.unread += len(message)
        if incoming.unread > READ_HIGH_WATER:
            incoming.withheld += len(data)
        else:
            self._stream.consume(len(data))
        if self._secret.opened and not self._opened.is_set():
            self._opened.set()
        if incoming.chunks:
            incoming.readable.set()

    def message_received(self, data: bytes) -> None:
        """Keep an unordered message; empty and forged ones are dropped."""
        if self._secret is None:
            return
        try:
            self._in.messages.append(self._secret.decrypt_message(data))
        except DecodeError:
            pass  # hyperdht sends empty ones to nudge a new path

    def eof_received(self) -> None:
        """Let the reader see the end."""
        self._in.eof = True
        self._in.readable.set()

    def drained(self) -> None:
        """Let a waiting writer go on."""
        self._out.drained.set()

    def stream_closed(self, error: str | None) -> None:
        """Let everybody who waits know that the stream is over."""
        if error is not None:
            self._finish(_REASONS.get(error, error))
        else:  # without the peer's end it is no clean one: the node leaves, or a handler failed
            self._finish(None if self._in.eof else _BROKEN_OFF_HERE)

    def _finish(self, reason: str | None) -> None:
        if self.closed:
            return
        self._reason = reason
        if reason is None:
            self._in.eof = True
        how = self.path_kind()
        self.path_kind = lambda: how  # no longer asks who knows this connection, which would be a cycle
        if self._secret is not None:
            self._secret.forget()
        self._keep_alive.cancel()
        for event in (self._closed, self._opened, self._in.readable, self._out.drained):
            event.set()

    def _gone(self, otherwise: str = "") -> ConnectionClosed:
        """Return why the connection broke, or `otherwise`, as an error to raise.

        A new one each time: were it kept, its traceback would keep whoever reads and writes here in a cycle with all
        they hold, until the garbage collector looks there, which counts objects and no bytes.
        """
        return ConnectionClosed(self._reason or otherwise)

    def _send(self, data: bytes) -> None:
        if self.closed or self._out.ended or self._secret is None:
            raise self._gone("the connection is closed")
        self._write_raw(self._secret.encrypt(data))

    def _write_raw(self, data: bytes) -> None:
        self._out.last_write = self._loop.time()
        self._stream.write(data)

    def _end(self) -> None:
        if not self._out.ended and not self.closed:
            self._out.ended = True
            self._stream.end()

    def _arm_keep_alive(self) -> None:
        """Send an empty message when nothing was written for the interval: NATs forget idle flows, and peers die.

        Behind the own end no message can be sent; the stream asks instead, or who still reads would wait for ever.
        """
        interval = self._keep_alive.interval
        if not interval or self.closed:
            return
        if self._loop.time() >= self._out.last_write + interval:
            if self._out.ended:
                self._out.last_write = self._loop.time()
                self._stream.ask()
            else:
                self._send(b"")
        self._keep_alive.timer = self._loop.call_at(self._out.last_write + interval, self._arm_keep_alive)
