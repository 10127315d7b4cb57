"""Two UDX streams and the network between them in virtual time; every run replays from its seed."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from p2pclaude.hyperdht.udx.stream import (
    Closed,
    DataReceived,
    Drained,
    EndReceived,
    MessageReceived,
    UdxStream,
)

DATAGRAM_OVERHEAD = 28  # IPv4 and UDP


@dataclass
class Link:
    """One direction of the network; times in seconds, rate in bytes a second, queue in bytes."""

    delay: float = 0.05
    jitter: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # share of packets that are held up by another `delay`
    rate: float | None = None
    queue: int = 250_000
    mtu: int = 1500
    blocked: Callable[[float, bytes], bool] = lambda _now, _data: False
    free_at: float = 0.0
    carried: int = 0
    dropped: int = 0

    def arrivals(self, data: bytes, now: float, rng: random.Random) -> Iterator[float]:
        """Yield when a datagram sent now arrives: never, once, or twice."""
        size = len(data) + DATAGRAM_OVERHEAD
        if size > self.mtu or self.blocked(now, data) or rng.random() < self.loss:
            self.dropped += 1
            return
        if self.rate is not None:
            start = max(now, self.free_at)
            if (start - now) * self.rate > self.queue:
                self.dropped += 1
                return
            self.free_at = start + size / self.rate
            now = self.free_at
        self.carried += size
        for _ in range(2 if rng.random() < self.duplication else 1):
            held = self.delay if rng.random() < self.reordering else 0.0
            yield now + self.delay + held + rng.random() * self.jitter


@dataclass
class End:
    """One end: its stream, what it received, and whether it reads."""

    stream: UdxStream
    link: Link  # from here to the peer
    received: bytearray = field(default_factory=bytearray)
    messages: list[bytes] = field(default_factory=list)
    ended: bool = False
    closed: Closed | None = None
    closed_at: float | None = None
    drains: int = 0
    reads: bool = True  # False: nothing is consumed
    sent: list[tuple[float, bytes]] | None = None  # a record of departures, if wanted
    on_end: Callable[[], None] = lambda: None


class Pair:
    """Both ends, the time, and the packets between them. `run` goes from event to event."""

    def __init__(
        self,
        seed: int = 0,
        *,
        a_to_b: Link | None = None,
        b_to_a: Link | None = None,
        a: UdxStream | None = None,
        b: UdxStream | None = None,
        connect: bool = True,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self._count = itertools.count()
        self._wire: list[tuple[float, int, End, bytes]] = []
        self.a = End(a or UdxStream(1), a_to_b or Link())
        self.b = End(b or UdxStream(2), b_to_a or Link())
        if connect:
            self.a.stream.connect(self.b.stream.local_id, self.now)
            self.b.stream.connect(self.a.stream.local_id, self.now)

    @property
    def ends(self) -> tuple[End, End]:
        return self.a, self.b

    def other(self, end: End) -> End:
        return self.b if end is self.a else self.a

    def run(self, until: Callable[[], bool] | None = None, *, seconds: float = 60.0) -> bool:
        """Run until the condition holds or the time is over; return whether it held."""
        deadline = self.now + seconds
        while True:
            self.settle()
            if until is not None and until():
                return True
            next_at = self._next_time()
            if next_at is None or next_at > deadline:
                self.now = deadline
                return False
            self._advance(next_at)

    def settle(self) -> None:
        """Take events and packets of both ends until they are quiet at this moment."""
        for end in self.ends:
            self._drain(end)

    def _drain(self, end: End) -> None:
        while True:
            busy = self._take_events(end)
            datagrams = end.stream.datagrams_to_send(self.now)
            for data in datagrams:
                if end.sent is not None:
                    end.sent.append((self.now, data))
                for at in end.link.arrivals(data, self.now, self.rng):
                    heapq.heappush(self._wire, (at, next(self._count), self.other(end), data))
            if not busy and not datagrams:
                return

    def _take_events(self, end: End) -> bool:
        busy = False
        while (event := end.stream.next_event()) is not None:
            busy = True
            match event:
                case DataReceived(data):
                    end.received += data
                    if end.reads:
                        end.stream.consume(len(data))
                case MessageReceived(data):
                    end.messages.append(data)
                case EndReceived():
                    end.ended = True
                    end.on_end()
                case Drained():
                    end.drains += 1
                case Closed():
                    assert end.closed is None, "closed twice"
                    end.closed, end.closed_at = event, self.now
        return busy

    def _next_time(self) -> float | None:
        times = [end.stream.get_timer() for end in self.ends]
        known = [time for time in times if time is not None]
        if self._wire:
            known.append(self._wire[0][0])
        return min(known, default=None)

    def _advance(self, to: float) -> None:
        self.now = max(self.now, to)
        batches: dict[int, list[bytes]] = {}
        while self._wire and self._wire[0][0] <= self.now:
            _, _, end, data = heapq.heappop(self._wire)
            batches.setdefault(id(end), []).append(data)
        for end in self.ends:
            if id(end) in batches:
                end.stream.receive_datagrams(batches[id(end)], self.now)
            timer = end.stream.get_timer()
            if timer is not None and timer <= self.now:
                end.stream.handle_timer(self.now)


def noise(size: int, seed: int = 1) -> bytes:
    """Return bytes whose loss, doubling or exchange a comparison shows."""
    return random.Random(seed).randbytes(size)
