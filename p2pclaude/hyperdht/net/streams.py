"""The node's UDX streams: which packets are whose, timers, and what leaves when (ring 2).

The table belongs to the whole set of sockets: a stream is found by the id in its packets wherever they arrive, and may
move between sockets and addresses (hole punching, relays). One timer serves all streams.
"""

import asyncio
import heapq
import logging
import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, TypeVar

from ..encoding import Address
from ..errors import HyperDHTError
from ..udx.packet import local_id_of
from ..udx.stream import Closed, DataReceived, Drained, EndReceived, Event, MessageReceived, UdxStream
from .sockets import Socket

log = logging.getLogger(__name__)

MAX_STREAMS = 65536


class StreamHandler(Protocol):
    """Whom a stream tells what it received."""

    def data_received(self, data: bytes) -> None:
        """Take bytes, in order."""

    def message_received(self, data: bytes) -> None:
        """Take an unordered, unreliable message."""

    def eof_received(self) -> None:
        """Learn that the peer ended its side."""

    def drained(self) -> None:
        """Learn that the send buffer has room again."""

    def stream_closed(self, error: str | None) -> None:
        """Learn that both sides ended or this one broke it off (`None`), else why (`ECONNRESET`, `ETIMEDOUT`)."""


class Stream:
    """A UDX stream with its way through the network: socket and remote address."""

    __slots__ = (
        "_dirty", "_streams", "_timer", "address", "core", "firewall", "handler", "heard", "on_forgotten", "on_packet",
        "own_socket", "socket",
    )  # fmt: skip

    def __init__(self, streams: "StreamSet", core: UdxStream) -> None:
        self._streams = streams
        self._dirty = False
        self._timer: float | None = None
        self.core = core
        self.socket: Socket | None = None
        self.address: Address | None = None
        self.handler: StreamHandler | None = None
        self.firewall: Callable[[Socket, Address], bool] | None = None
        """Asked for every packet that comes in on another way than the stream's own, socket and remote address.

        A hook that connects the stream gets that very packet processed. Without one the stream keeps to its socket.
        """
        self.on_packet: Callable[[Socket, Address], None] | None = None
        """Called once, for the first packet that was let in."""
        self.heard = False
        """Set by every packet that comes in on the stream's own way; whoever wants to know clears it before."""
        self.own_socket: Socket | None = None
        """A socket that serves this stream alone, and is closed when the stream is forgotten."""
        self.on_forgotten: Callable[[], None] | None = None
        """Called once, when the stream is over for good: closed, and nothing left to repeat to the peer."""

    @property
    def id(self) -> int:
        """The id the peer addresses this stream by."""
        return self.core.local_id

    @property
    def forgotten(self) -> bool:
        """Whether the stream is over for good."""
        return self._streams.find_id(self.id) is not self

    @property
    def acknowledged(self) -> bool:
        """Whether the peer has acknowledged a packet: then it hears us."""
        return self.core.sender.acked_below > 0

    def connect(self, socket: Socket, remote_id: int, address: Address) -> None:
        """Set the way to the peer and its id for the stream, which a relay changes; what was queued leaves now."""
        now = self._streams.now()
        if not self.core.connected:
            self.core.connect(remote_id, now)
        elif (socket, address) != (self.socket, self.address):
            self.core.remote_id = remote_id
            self.core.reset_path(now)
        self.socket, self.address = socket, address
        self.flush()

    def repeat(self) -> None:
        """Send the first packets again, on a way that has not shown yet how long an answer takes."""
        self.core.reset_path(self._streams.now())
        self.flush()

    def try_way(self, socket: Socket, remote_id: int, address: Address) -> None:
        """Send a packet on another way, which shows the peer that it is there; the stream stays where it is."""
        if not self.core.closed:
            socket.send([self.core.heartbeat(remote_id)], address)

    def write(self, data: bytes) -> None:
        """Queue bytes; they leave at the end of this turn of the event loop, so that small writes share packets."""
        self.core.write(data)
        self._flush_soon()

    def hurry(self) -> None:
        """Let what is queued leave at once where an answer is near and nothing is under way (not from a handler).

        What is written before the answer comes still shares packets.
        """
        if self.core.may_hurry:
            self.flush()

    def send_message(self, data: bytes) -> None:
        """Send one unreliable message of at most a packet."""
        self.core.send_message(data)
        self._flush_soon()

    def consume(self, size: int) -> None:
        """Say that `size` received bytes were taken, so that the peer may send that many more."""
        if self.core.consume(size):
            self._flush_soon()

    def end(self) -> None:
        """End the own side once everything queued is delivered."""
        self.core.end()
        self._flush_soon()

    def ask(self) -> None:
        """Have the peer show that it is there, though there is nothing to send."""
        self.core.liveness.ask(self._streams.now())
        self._streams.schedule(self)

    def destroy(self) -> None:
        """Break the stream off; the peer is told, several times."""
        self.core.destroy()
        self.flush()

    def say_again(self) -> None:
        """Say once more what was to be repeated later, as nobody will be here then: a single packet gets lost."""
        if self.core.closed and self.socket is not None and self.address is not None:
            self.socket.send(self.core.datagrams_to_send(math.inf), self.address)

    def is_way(self, socket: Socket, source: Address) -> bool:
        """Tell whether this is the stream's own way at present."""
        return socket is self.socket and source == self.address

    def accepts(self, socket: Socket, source: Address) -> bool:
        """Decide about a packet by its way in; new ways are the firewall hook's choice."""
        if self.is_way(socket, source):
            self.heard = True
        elif self.firewall is not None:
            if not self.firewall(socket, source):
                return False
        elif socket is not self.socket:
            return False
        if self.on_packet is not None:
            on_packet, self.on_packet = self.on_packet, None
            on_packet(socket, source)
        return True

    def receive(self, datagrams: Sequence[bytes]) -> None:
        """Process a batch of packets for this stream.

        A bare acknowledgement waits for the reader, who gets the next turn of the event loop: the answer may carry it.
        """
        self.core.receive_datagrams(datagrams, self._streams.now())
        self._dispatch()
        if self.core.owes_only_ack:
            self._flush_soon()
        else:
            self.flush()

    def handle_timer(self, now: float) -> None:
        """Let the core act on its timer."""
        self.core.handle_timer(now)
        self._dispatch()
        self.flush()

    def flush(self) -> None:
        """Send all that may leave now and arm the timer."""
        self._dirty = False
        now = self._streams.now()
        datagrams = self.core.datagrams_to_send(now)
        if datagrams and self.socket is not None and self.address is not None:
            whole, oversized = self.core.sender.path.search.part(datagrams)
            self.socket.send(whole, self.address)
            if oversized:
                self.socket.send(oversized, self.address, fragment=True)
            if seconds := self.core.prompt_answer_s:
                self.socket.stay_awake(seconds)
        self._dispatch()
        self._streams.schedule(self)

    def _flush_soon(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._streams.loop.call_soon(self._flush_if_dirty)

    def _flush_if_dirty(self) -> None:
        if self._dirty:
            self.flush()

    def _dispatch(self) -> None:
        while (event := self.core.next_event()) is not None:
            if self.handler is None:
                continue
            try:
                _tell(self.handler, event)
            except Exception:  # a bug in one handler must not cost other streams their packets and timers
                log.exception("the handler of a stream failed")
                self.core.destroy()  # the reader has a gap now
                self._flush_soon()


def _tell(handler: StreamHandler, event: Event) -> None:
    match event:
        case DataReceived(data):
            handler.data_received(data)
        case MessageReceived(data):
            handler.message_received(data)
        case EndReceived():
            handler.eof_received()
        case Drained():
            handler.drained()
        case Closed(error):
            handler.stream_closed(error)


StreamT = TypeVar("StreamT", bound=Stream)


class StreamSet:
    """All streams of a node, by the id their peers use."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._by_id: dict[int, Stream] = {}
        self._deadlines: list[tuple[float, int, Stream]] = []
        self._alarm: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._by_id)

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop all this happens on: asking for it takes a system call each time."""
        return asyncio.get_running_loop()

    def now(self) -> float:
        """Return the event loop's time, in seconds."""
        return self.loop.time()

    def create(self) -> Stream:
        """Make a stream with an unused random id; raises HyperDHTError when there are too many."""
        return self.create_of(Stream)

    def create_of(self, kind: type[StreamT]) -> StreamT:
        """Make a stream of a derived class, as `create` does."""
        if len(self._by_id) >= MAX_STREAMS:
            raise HyperDHTError(f"more than {MAX_STREAMS} streams")
        stream_id = self._rng.getrandbits(32)
        while stream_id in self._by_id:
            stream_id = self._rng.getrandbits(32)
        stream = kind(self, UdxStream(stream_id))
        self._by_id[stream_id] = stream
        return stream

    def find(self, data: bytes) -> Stream | None:
        """Return the stream a datagram belongs to, or None if it is none of ours."""
        stream_id = local_id_of(data)
        return None if stream_id is None else self._by_id.get(stream_id)

    def find_id(self, stream_id: int) -> Stream | None:
        """Return the stream with that id."""
        return self._by_id.get(stream_id)

    def discard(self, stream: Stream) -> None:
        """Forget a stream at once; its packets are ignored from now on."""
        self._by_id.pop(stream.id, None)
        if stream.own_socket is not None:
            stream.own_socket.close()
        if stream.on_forgotten is not None:
            on_forgotten, stream.on_forgotten = stream.on_forgotten, None
            on_forgotten()
        stream.handler = stream.firewall = stream.on_packet = None  # they know the stream: no cycle shall keep them all

    def close(self) -> None:
        """Break off and forget every stream."""
        for stream in list(self._by_id.values()):
            stream.destroy()
            stream.say_again()
            self.discard(stream)
        self._deadlines.clear()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def schedule(self, stream: Stream) -> None:
        """Keep the stream's next deadline; drop the stream when it is finished.

        The heap holds at most one live entry a stream: one that is too early is looked at again when it comes up, so
        that a deadline which moves back with every packet costs nothing.
        """
        if stream.core.finished:
            self.discard(stream)
            return
        deadline = stream.core.get_timer()
        if deadline is None or stream.id not in self._by_id:
            return
        if stream._timer is None or deadline < stream._timer:
            stream._timer = deadline
            heapq.heappush(self._deadlines, (deadline, stream.id, stream))
            self._arm()

    def _arm(self) -> None:
        when = self._deadlines[0][0]
        if self._alarm is not None:
            if self._alarm.when() <= when:
                return
            self._alarm.cancel()
        self._alarm = self.loop.call_at(when, self._wake)

    def _wake(self) -> None:
        self._alarm = None
        now = self.now()
        while self._deadlines and self._deadlines[0][0] <= now:
            entry, _, stream = heapq.heappop(self._deadlines)
            if stream._timer != entry or self._by_id.get(stream.id) is not stream:
                continue
            stream._timer = None
            try:
                self._look_at(stream, now)
            except Exception:  # a bug in one stream must not stop the timers of all others
                log.exception("the timer of a stream failed")
                self._give_up(stream)
        if self._deadlines:
            self._arm()

    def _look_at(self, stream: Stream, now: float) -> None:
        deadline = stream.core.get_timer()
        if deadline is not None and deadline <= now:
            stream.handle_timer(now)
        else:
            self.schedule(stream)

    def _give_up(self, stream: Stream) -> None:
        """Break off a stream whose timer cannot be relied on, so that nobody waits for it."""
        try:
            if not stream.core.closed:
                stream.destroy()
                return
        except Exception:  # nor can the rest of it
            log.exception("a stream that failed cannot be broken off")
            stream._dispatch()  # its reader learns it all the same
        self.discard(stream)
