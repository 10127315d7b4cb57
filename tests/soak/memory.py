"""Two UDX streams and the roads between them in memory and virtual time, fast enough for terabytes.

Packets travel in the bursts they left in, so that a decision costs something for each burst and next to nothing for
each packet: losses are cut out of a burst with a precomputed pattern. What is sent is one block over and over, so that
it need not be made, and comparing it where it arrives need not copy it.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import compress
from math import ceil, inf
from typing import Final

from p2pclaude.hyperdht.udx.events import Closed, DataReceived, EndReceived
from p2pclaude.hyperdht.udx.packet import DATA, DATAGRAM_OVERHEAD_BYTES, END, HEADER, SEQ_MASK
from p2pclaude.hyperdht.udx.stream import UdxStream

PERIOD: Final = 262_139  # a prime, so that no whole number of packets is a period
LONGEST_READ: Final = 24 << 20  # more than a receiver gives out at a time
BLOCK: Final = random.Random(PERIOD).randbytes(PERIOD)
BLOCKS: Final = BLOCK * (LONGEST_READ // PERIOD + 2)
PATTERN_BYTES: Final = 1 << 18
LONG_WAIT_S: Final = 0.5  # of a reader; what comes sooner is not looked at
MIN_RTO_S: Final = 1.0  # as in libudx: max(1 s, srtt + 4 variations)
ENOUGH_BUFFERED: Final = 256 << 10

Burst = list[bytes]
Watcher = Callable[[Burst, Burst], None]


class SoakFailure(AssertionError):
    """A byte came wrong, a stream broke or stood still."""


@cache
def loss_pattern(loss: float, run: int) -> bytes:
    """Return one byte a packet, 0 for those that get lost: so many on average, `run` of them in a row.

    Runs have an end: packets are few while a stream asks whether anybody is there, and outages are not meant.
    """
    rng = random.Random(f"{loss} {run}")
    begins = loss / (run - loss * (run - 1))
    out = bytearray()
    while len(out) < PATTERN_BYTES:
        if rng.random() < begins:
            out += bytes(rng.randint(1, 2 * run - 1))
        else:
            out.append(1)
    return bytes(out[:PATTERN_BYTES])


class Road:
    """One direction: delay, jitter, losses, a share of bursts reordered or doubled in part, a narrow place, an MTU."""

    def __init__(
        self,
        rng: random.Random,
        *,
        delay: float,
        jitter: float = 0.0,
        loss: float = 0.0,
        loss_run: int = 1,
        reordering: float = 0.0,
        duplication: float = 0.0,
        rate: float = inf,
        queue: int = 0,
        mtu: int = 1500,
    ) -> None:
        """Times in seconds, `rate` in bytes a second, `queue` and `mtu` in bytes, the rest shares of 1."""
        self._random, self._below = rng.random, rng.randrange
        self._delay, self._jitter = delay, jitter
        self._pattern = loss_pattern(loss, loss_run) if loss else b""
        self._position = rng.randrange(PATTERN_BYTES)
        self._reordering, self._unusual = reordering, reordering + duplication
        self._rate, self._queue, self._free_at = rate, queue, 0.0
        self._largest = mtu - DATAGRAM_OVERHEAD_BYTES
        self._whole = mtu >= 1500
        self.carried_at = 0.0  # when a burst left last
        self.deliveries = 0  # bursts of which something arrived
        self.watchers: list[Watcher] = []  # told of every burst and what is left of it

    def carry(self, burst: Burst, now: float) -> list[tuple[float, Burst]]:
        """Return what arrives when."""
        arriving = self._survivors(burst, now)
        for watcher in self.watchers:
            watcher(burst, arriving)
        self.carried_at = now
        if not arriving:
            return []
        self.deliveries += 1
        at = max(now, self._free_at) + self._delay
        if self._jitter:
            at += self._jitter * self._random()
        if self._unusual:
            dice = self._random()
            if dice < self._unusual:
                return self._mistreat(arriving, at, dice)
        return [(at, arriving)]

    def _survivors(self, burst: Burst, now: float) -> Burst:
        arriving = burst
        if self._pattern:
            begin = self._position
            end = self._position = begin + len(burst)
            if end > PATTERN_BYTES:
                begin, end = 0, len(burst)
                self._position = end + self._below(1024)
            arriving = list(compress(burst, self._pattern[begin:end]))
        if not self._whole:
            arriving = [data for data in arriving if len(data) <= self._largest]
        if self._rate != inf:
            arriving = self._queued(arriving, now)
        return arriving

    def _queued(self, burst: Burst, now: float) -> Burst:
        """Let as much of a burst into the queue of the narrow place as it holds."""
        free_at = max(now, self._free_at)
        room = self._queue - (free_at - now) * self._rate
        if room < len(burst) * 1500:
            sizes = itertools.accumulate(map(len, burst))
            burst = [data for data, size in zip(burst, sizes, strict=True) if size <= room]
        self._free_at = free_at + sum(map(len, burst)) / self._rate
        return burst

    def _mistreat(self, burst: Burst, at: float, dice: float) -> list[tuple[float, Burst]]:
        """Hold some packets of a burst back, or let some of it arrive twice."""
        begin = self._below(len(burst))
        end = min(begin + 1 + self._below(8), len(burst))
        later = at + self._delay * self._random() / 2 + 0.001
        if dice < self._reordering:
            return [(at, burst[:begin] + burst[end:]), (later, burst[begin:end])]
        return [(at, burst), (later, burst[begin:end])]


class End:
    """One end: what it has to send, what it must receive, and since when its reader waits."""

    def __init__(
        self, stream: UdxStream, road: Road, to_send: int, to_receive: int, *, pieces: Sequence[bytes], ends_last: bool
    ) -> None:
        """Write the block, cut into `pieces`, over and over; end after that, or when the peer has ended as well."""
        self.stream = stream
        self.road = road  # from here to the peer
        self.peer = self
        self.timer = inf
        self.look_at = inf  # when to see after a reader that waits
        self.arrived: Burst = []
        self.closed = False
        self.ended = False  # the peer's data and end arrived
        self.done = False  # everything is written, and the end
        self.received = 0
        self.longest_wait = 0.0  # of the reader, unhindered, in retransmission timeouts
        self.excused = 0  # times the road lost what the reader waited for long
        self._left, self._expected = to_send, to_receive
        self._pieces = itertools.cycle(pieces)
        self._ends_last = ends_last
        self._read_at = 0  # in the block
        self._wait: _Wait | None = None
        self._waiting_since = inf
        self._answered_before = 0  # deliveries to the peer when the wait began: the order within an instant counts
        self._hindered_at = 0.0

    def feed(self, now: float) -> None:
        """Write while there is room, and end after the last byte."""
        if self.done:
            return
        stream = self.stream
        while self._left and stream.buffered < ENOUGH_BUFFERED:
            piece = next(self._pieces)[: self._left]
            stream.write(piece)
            self._left -= len(piece)
            self.peer.expect(now)
        if not self._left and (self.ended or not self._ends_last):
            stream.end()
            self.done = True
            self.peer.expect(now)

    def expect(self, now: float) -> None:
        """Begin to wait, if nothing was on its way before."""
        if self._waiting_since == inf:
            self._waiting_since = now
            self._answered_before = self.road.deliveries
            self.look_at = now + LONG_WAIT_S

    def take_events(self, now: float) -> None:
        """Compare what came, and tell the peer's window."""
        stream = self.stream
        while (event := stream.next_event()) is not None:
            match event:
                case DataReceived(data):
                    self._compare(data)
                    stream.consume(len(data))
                    self._progress(now)
                case EndReceived():
                    if self.received != self._expected:
                        raise SoakFailure(f"the end came after {self.received} bytes of {self._expected}")
                    self.ended = True
                    self._progress(now)
                case Closed(error):
                    if error is not None or not self.ended or not self.done:
                        raise SoakFailure(f"closed early: {error}")
                    self.closed = True

    def _compare(self, data: bytes) -> None:
        size = len(data)
        if size > LONGEST_READ or not BLOCKS.startswith(data, self._read_at):
            raise SoakFailure(f"wrong bytes among {size} after {self.received}")
        self.received += size
        self._read_at = (self._read_at + size) % PERIOD

    def _progress(self, now: float) -> None:
        waited = now - max(self._waiting_since, self._hindered_at)
        if waited > LONG_WAIT_S:
            self._note_wait(waited)
        if self._wait is not None:
            self._wait.close()
            self._wait = None
        nothing_comes = self.ended or (self.received == self._expected and not self.peer.done)
        self._waiting_since = inf if nothing_comes else now
        self._answered_before = self.road.deliveries
        self.look_at = self._waiting_since + LONG_WAIT_S

    @property
    def _rto(self) -> float:
        """The retransmission timeout of what comes here."""
        rtt = self.peer.stream.sender.rtt
        return max(MIN_RTO_S, (rtt.srtt or 0.0) + 4 * rtt.variation)

    def check_stall(self, now: float) -> None:
        """Fail if the reader waits for two timeouts although what it waits for could have come.

        It could not as long as the road loses that very packet, or as the sender tries in vain to learn what is
        missing: no answer came through since the wait began.
        """
        if self._wait is None:
            if now < self.look_at:
                return
            self._wait = _Wait(self)
            self.look_at = inf
            self._hindered_at = max(self._hindered_at, self._sent_at())
        limit = 2 * self._rto
        ignorant = self.road.deliveries == self._answered_before and now - self.peer.road.carried_at < limit
        if ignorant or self._wait.lost_again:
            self.excused += self._wait.lost_again
            self._wait.lost_again = False
            self._hindered_at = now
        else:
            self._note_wait(now - max(self._waiting_since, self._hindered_at))

    def _sent_at(self) -> float:
        """Return when what the reader waits for left last: nobody has watched yet whether it got lost on the way."""
        packet = self.peer.stream.sender._packets.get(self.stream.receiver.next_seq)
        return 0.0 if packet is None else packet.flight.sent_at

    def _note_wait(self, seconds: float) -> None:
        """Take a wait, over or not, that nothing hindered."""
        rto = self._rto
        self.longest_wait = max(self.longest_wait, seconds / rto)
        if seconds > 2 * rto:
            raise SoakFailure(f"no progress in {seconds:.3f} s, the timeout being {rto:.3f} s")


class _Wait:
    """Sees whether the road loses again what a reader has waited for long."""

    def __init__(self, end: End) -> None:
        self.lost_again = False
        self._seq = end.stream.receiver.next_seq & SEQ_MASK
        self._road = end.peer.road
        self._road.watchers.append(self._see)

    def close(self) -> None:
        """Look no longer."""
        self._road.watchers.remove(self._see)

    def _see(self, burst: Burst, arriving: Burst) -> None:
        for data in burst:
            if data[2] & (DATA | END) and HEADER.unpack_from(data)[5] == self._seq:
                self.lost_again |= data not in arriving


class SoakPair:
    """Both ends, the time, and the bursts between them."""

    def __init__(self, a: End, b: End, *, batch: int, tick: float) -> None:
        """Join two ends; a stream gets up to `batch` datagrams at a time, and those of `tick` seconds together."""
        self.now = 1000.0
        self.steps = 0
        self._batch = batch
        self._tick = tick
        self._ends = (a, b)
        self._count = itertools.count()
        self._wire: list[tuple[float, int, End, Burst]] = []
        a.peer, b.peer = b, a
        for end in self._ends:
            end.stream.connect(end.peer.stream.local_id, self.now)

    def run(self, seconds: float) -> float:
        """Go on until both streams are closed; return the virtual seconds it took."""
        began = self.now
        a, b = self._ends
        wire, tick = self._wire, self._tick
        for end in self._ends:
            self._pump(end)
        while not (a.closed and b.closed):
            due = min(a.timer, b.timer, a.look_at, b.look_at, wire[0][0] if wire else inf)
            if due > began + seconds:
                raise SoakFailure(f"no end in {seconds} s")
            self.now = now = max(self.now, due, ceil(due / tick) * tick if tick else due)
            self.steps += 1
            while wire and wire[0][0] <= now:
                _, _, end, burst = heapq.heappop(wire)
                end.arrived += burst
            for end in self._ends:
                if end.arrived:
                    self._deliver(end)
                if end.timer <= now:
                    end.stream.handle_timer(now)
                    self._pump(end)
                end.check_stall(now)
        return self.now - began

    def _deliver(self, end: End) -> None:
        burst, end.arrived = end.arrived, []
        batch = self._batch
        for first in range(0, len(burst), batch):
            end.stream.receive_datagrams(burst[first : first + batch], self.now)
            self._pump(end)

    def _pump(self, end: End) -> None:
        """Take events, write, send, and note the timer."""
        now, stream = self.now, end.stream
        end.take_events(now)
        end.feed(now)
        if burst := stream.datagrams_to_send(now):
            for at, part in end.road.carry(burst, now):
                heapq.heappush(self._wire, (at, next(self._count), end.peer, part))
        end.take_events(now)
        timer = stream.get_timer()
        end.timer = inf if timer is None or (end.closed and end.peer.closed) else timer
