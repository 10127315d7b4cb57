"""Channels over one connection, as the JavaScript's protomux has them (ring 2).

`relay_client` and `relay_server` open their channels here. What a channel sends becomes a frame (`mux_frames`), one
encrypted message of the `Connection`; `run` reads the peer's frames and hands messages to the channels.

A channel is open when both sides have opened one of the same protocol and id; each side counts its own channels, and
a message names the sender's number. Messages may follow the sender's open at once: they wait until this side opens
too. A number is free again when the channel is closed, or when the peer has answered an open that was taken back.
Source: protomux index.js.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from typing import Final

from ..errors import ConnectionClosed, DecodeError
from ..secure.connection import Connection
from .mux_frames import (
    ChannelClose,
    ChannelMessage,
    ChannelOpen,
    ChannelReject,
    Frame,
    decode_frames,
    encode_frame,
)

MAX_REMOTE_CHANNELS: Final = 256  # open or waiting at a time; upstream has no limit
MAX_WAITING_BYTES: Final = 32768  # of messages for channels not opened here; beyond it nothing is read
MESSAGE_COST: Final = 512  # what a waiting message counts besides its bytes
MAX_UNSENT_BYTES: Final = 1 << 20  # a peer that does not take what it is sent is broken off

Key = tuple[str, bytes | None]
OnMessage = Callable[[int, bytes], None]
OnOpen = Callable[[bytes], None]
OnClose = Callable[[], None]
OnOffer = Callable[[str, bytes | None], bool]


class Channel:
    """One channel; made by `Mux.open`. Its callbacks are called from `Mux.run` and must not block."""

    def __init__(
        self, mux: "Mux", key: Key, number: int, on_message: OnMessage, on_open: OnOpen | None, on_close: OnClose | None
    ) -> None:
        self._mux = mux
        self.protocol, self.channel_id = key
        self.number = number
        """Our number for the channel."""
        self.opened = False
        """Whether the peer has opened it too."""
        self.closed = False
        self._remote: _Remote | None = None
        self._on_message = on_message
        self._on_open = on_open
        self._on_close = on_close

    def send(self, kind: int, payload: bytes) -> None:
        """Send a message of a kind; also before the peer has opened. Nothing happens once the channel is closed."""
        if not self.closed:
            self._mux._send(ChannelMessage(self.number, kind, payload))

    def close(self) -> None:
        """Close the channel on both sides; `on_close` is called."""
        if not self.closed:
            self._mux._send(ChannelClose(self.number))
            self._mux._close(self)

    # For the mux

    def _pair(self, remote: "_Remote") -> None:
        remote.channel = self
        self._remote = remote
        self.opened = True
        if self._on_open is not None:
            self._on_open(remote.open.handshake)

    def _finish(self) -> None:
        self.closed = True
        if self._on_close is not None:
            self._on_close()


class _Remote:
    """A channel as the peer opened it, and what waits until this side opens it as well."""

    __slots__ = ("channel", "open", "waiting", "waiting_bytes")

    def __init__(self, open_frame: ChannelOpen) -> None:
        self.open = open_frame
        self.channel: Channel | None = None
        self.waiting: deque[ChannelMessage] = deque()
        self.waiting_bytes = 0


class Mux:
    """All channels of one connection; somebody must await `run`.

    `on_offer(protocol, channel_id)` is asked about a channel that the peer opens first: it may open it at once, or
    return True to let it wait for a later `open`; else it is rejected.
    """

    def __init__(self, connection: Connection, on_offer: OnOffer | None = None) -> None:
        self.connection = connection
        self._on_offer = on_offer
        self._local: dict[int, Channel] = {}
        self._free: list[int] = []
        self._next = 1
        self._outgoing: dict[Key, deque[int]] = {}  # opened here, unanswered; closed ones too
        self._remote: dict[int, _Remote] = {}
        self._remote_high = 0
        self._incoming: dict[Key, deque[int]] = {}  # opened by the peer, not here
        self._waiting_bytes = 0
        self._room = asyncio.Event()

    def open(
        self,
        protocol: str,
        channel_id: bytes | None = None,
        *,
        on_message: OnMessage,
        on_open: OnOpen | None = None,
        on_close: OnClose | None = None,
        handshake: bytes = b"",
    ) -> Channel:
        """Open a channel: joined to the one that the peer opened or will open under the same protocol and id.

        `on_open(handshake)` is called when the peer's open is there, `on_message(kind, payload)` for each message
        (DecodeError breaks the connection off), `on_close()` once: closed by either side, rejected, or connection over.
        Raises ConnectionClosed.
        """
        if self.connection.closed:
            raise ConnectionClosed("the connection is closed")
        key = (protocol, channel_id or None)
        number = heapq.heappop(self._free) if self._free else self._next
        self._next = max(self._next, number + 1)
        channel = Channel(self, key, number, on_message, on_open, on_close)
        self._local[number] = channel
        self._send(ChannelOpen(number, protocol, channel_id, handshake))
        if (remote_number := _take_first(self._incoming, key)) is None:
            self._outgoing.setdefault(key, deque()).append(number)
        else:
            remote = self._remote[remote_number]
            # in a turn of its own, so that the caller holds the channel before its callbacks run
            remote.channel = channel
            channel._remote = remote
            asyncio.get_running_loop().call_soon(self._deliver_waiting, remote)
        return channel

    async def run(self) -> None:
        """Read to the connection's end, then close every channel. A peer that breaks the rules is broken off."""
        try:
            while frame := await self.connection.read_frame():
                for decoded in decode_frames(frame):
                    self._receive(decoded)
                await self._wait_for_room()
        except DecodeError:
            self.connection.abort()
        except ConnectionClosed:
            pass
        finally:
            self._finish_all()

    async def _wait_for_room(self) -> None:
        """Stop reading while too much waits for channels that nobody has opened here."""
        while self._waiting_bytes > MAX_WAITING_BYTES and not self.connection.closed:
            self._room.clear()
            waits = [asyncio.create_task(wait) for wait in (self._room.wait(), _closed(self.connection))]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def _receive(self, frame: Frame) -> None:
        match frame:
            case ChannelMessage():
                self._receive_message(frame)
            case ChannelOpen():
                self._receive_open(frame)
            case ChannelReject(id):
                self._receive_reject(id)
            case ChannelClose(id):
                self._receive_close(id)

    def _receive_message(self, message: ChannelMessage) -> None:
        remote = self._remote.get(message.id)
        if remote is None:
            return  # sent before the peer knew that the channel is closed
        channel = remote.channel
        if channel is not None and channel.opened:
            channel._on_message(message.type, message.payload)
            return
        remote.waiting.append(message)
        self._count_waiting(remote, MESSAGE_COST + len(message.payload))

    def _receive_open(self, frame: ChannelOpen) -> None:
        if frame.id == 0:
            self._send(ChannelReject(0))
            return
        if frame.id > self._remote_high + 1 or frame.id in self._remote or len(self._remote) >= MAX_REMOTE_CHANNELS:
            raise DecodeError("the peer opens a channel under a number that is not free, or too many")
        self._remote_high = max(self._remote_high, frame.id)
        key = (frame.protocol, frame.channel_id)
        number = _take_first(self._outgoing, key)
        if number is None:
            self._offer(frame, key)
        elif (channel := self._local.get(number)) is None:
            heapq.heappush(self._free, number)  # closed here meanwhile, as the peer will hear
        else:
            remote = self._remote[frame.id] = _Remote(frame)
            channel._pair(remote)

    def _offer(self, frame: ChannelOpen, key: Key) -> None:
        remote = self._remote[frame.id] = _Remote(frame)
        self._incoming.setdefault(key, deque()).append(frame.id)
        kept = self._on_offer is not None and self._on_offer(*key)
        if not kept and remote.channel is None:
            self._reject(frame.id, remote)

    def _reject(self, number: int, remote: _Remote) -> None:
        _remove(self._incoming, (remote.open.protocol, remote.open.channel_id), number)
        del self._remote[number]
        self._count_waiting(remote, -remote.waiting_bytes)
        self._send(ChannelReject(number))

    def _receive_reject(self, number: int) -> None:
        key = next((key for key, numbers in self._outgoing.items() if number in numbers), None)
        if key is None:
            raise DecodeError("the peer rejects a channel that it was not offered")
        _remove(self._outgoing, key, number)
        heapq.heappush(self._free, number)
        channel = self._local.pop(number, None)
        if channel is not None:
            channel._finish()

    def _receive_close(self, number: int) -> None:
        remote = self._remote.get(number)
        if remote is None:
            return  # closed here too, at the same time
        if remote.channel is None:
            self._reject(number, remote)  # nobody here has opened it: this gives its number back to the peer
            return
        self._deliver_waiting(remote)
        if not remote.channel.closed:
            self._close(remote.channel)

    def _deliver_waiting(self, remote: _Remote) -> None:
        """Open a channel that the peer opened first, and give it what came in the meantime."""
        channel = remote.channel
        if channel is None or channel.closed or channel.opened:
            return
        channel._pair(remote)
        try:
            while remote.waiting and not channel.closed:
                message = remote.waiting.popleft()
                channel._on_message(message.type, message.payload)
        except DecodeError:
            self.connection.abort()
        self._count_waiting(remote, -remote.waiting_bytes)

    def _close(self, channel: Channel) -> None:
        """Forget a channel that either side closed."""
        self._local.pop(channel.number, None)
        remote = channel._remote
        if remote is not None:
            # Unpaired numbers are free only when the peer has answered, paired ones at once.
            heapq.heappush(self._free, channel.number)
            self._remote.pop(remote.open.id, None)
            remote.waiting.clear()
            self._count_waiting(remote, -remote.waiting_bytes)
        channel._finish()

    def _finish_all(self) -> None:
        for channel in list(self._local.values()):
            self._close(channel)

    def _count_waiting(self, remote: _Remote, size: int) -> None:
        remote.waiting_bytes += size
        self._waiting_bytes += size
        if self._waiting_bytes <= MAX_WAITING_BYTES:
            self._room.set()

    def _send(self, frame: Frame) -> None:
        try:
            self.connection.send_frame(encode_frame(frame))
        except ConnectionClosed:
            return  # `run` closes the channels
        if self.connection.unsent > MAX_UNSENT_BYTES:
            self.connection.abort()


def _take_first(numbers: dict[Key, deque[int]], key: Key) -> int | None:
    """Take the oldest number under a key."""
    if key not in numbers:
        return None
    number = numbers[key][0]
    _remove(numbers, key, number)
    return number


def _remove(numbers: dict[Key, deque[int]], key: Key, number: int) -> None:
    numbers[key].remove(number)
    if not numbers[key]:
        del numbers[key]


async def _closed(connection: Connection) -> None:
    await connection.wait_closed()
