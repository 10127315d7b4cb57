"""Congestion control: how much may be under way and how fast it may leave (ring 1).

A BBR written from the published description (N. Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue
2016, and draft-cardwell-iccrg-bbr-congestion-control-00): the sender models the path by its bottleneck bandwidth (the
largest delivery rate of the last ten round trips) and its propagation delay (the smallest round trip of the last ten
seconds), and keeps about their product under way. Random loss does not slow it down. Departures from that text are
marked; all sizes are in bytes, all times in seconds.
"""

from collections import deque
from enum import Enum
from typing import Final

from .rate import AckSample

INITIAL_WINDOW_PACKETS: Final = 32
MIN_WINDOW_PACKETS: Final = 4
STARTUP_GAIN: Final = 2.885  # 2 / ln 2: the smallest that doubles the rate every round trip
CYCLE_GAINS: Final = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
WINDOW_GAIN: Final = 2.0
BANDWIDTH_ROUNDS: Final = 10
MIN_RTT_WINDOW_S: Final = 10.0
PROBE_RTT_S: Final = 0.2
QUANTUM_S: Final = 0.002  # a burst holds what the rate gives in this time: event loops have millisecond timers
MAX_QUANTUM: Final = 64 * 1024
MIN_RATE: Final = 10_000.0  # a floor that keeps timers short on nearly dead paths
OVERSHOOT_LOSS: Final = 0.1  # share of a round trip's bytes whose loss, without growth, ends the start-up
LOSS_COMPENSATION: Final = 0.6  # see Bbr._set_pacing_rate
MAX_COMPENSATED_LOSS: Final = 0.4
QUEUE_RTT: Final = 1.25  # round trips of this many times the minimum show a queue


class Mode(Enum):
    """What the controller is doing."""

    STARTUP = "startup"  # doubling until the pipe is full
    DRAIN = "drain"  # emptying the queue this made
    PROBE_BW = "probe_bw"  # steady state: a round trip of 5/4, one of 3/4, six of 1
    PROBE_RTT = "probe_rtt"  # a short pause that shows the path without a queue


class MaxFilter:
    """The largest value of the last `length` rounds."""

    __slots__ = ("_entries", "_length")

    def __init__(self, length: int) -> None:
        self._length = length
        self._entries: deque[tuple[int, float]] = deque()  # falling values, rising rounds

    def update(self, value: float, round_count: int) -> None:
        """Take a value measured in this round."""
        entries = self._entries
        while entries and entries[-1][1] <= value:
            entries.pop()
        entries.append((round_count, value))
        while entries[0][0] <= round_count - self._length:
            entries.popleft()

    @property
    def value(self) -> float:
        """The maximum, 0 before the first update."""
        return self._entries[0][1] if self._entries else 0.0


class RoundTrips:
    """What the round trips so far have shown: a round ends when a packet that left in it is acknowledged."""

    __slots__ = ("_acked", "_end_delivered", "_lost", "_rtt", "begins", "count", "loss_share", "lost", "queue_seen")

    def __init__(self) -> None:
        self.count = 0
        self.begins = False  # with the sample that came last
        self.lost = 0.0  # share of the bytes of the last whole round
        self.loss_share = 0.0  # the same, smoothed
        self.queue_seen = False  # the round trips are longer than the path is
        self._end_delivered = 0
        self._lost = 0
        self._acked = 0
        self._rtt: float | None = None  # the smallest of this round

    def add(self, sample: AckSample) -> None:
        """Take a sample, and note whether a new round begins with it."""
        self._lost += sample.lost
        self._acked += sample.acked
        if sample.rtt is not None and (self._rtt is None or sample.rtt < self._rtt):
            self._rtt = sample.rtt
        self.begins = sample.prior_delivered >= self._end_delivered
        if self.begins:
            self._end_delivered = sample.delivered
            self.count += 1

    def conclude(self, min_rtt: float | None) -> None:
        """Draw the conclusions of the round that is over, as the next one begins."""
        assert self.begins
        self.lost = self._lost / max(self._lost + self._acked, 1)
        self._lost = self._acked = 0
        self.loss_share += (self.lost - self.loss_share) / 4
        if self._rtt is not None and min_rtt is not None:
            self.queue_seen = self._rtt > QUEUE_RTT * min_rtt
        self._rtt = None


class FullPipe:
    """Whether the pipe is full: the bandwidth has not grown by a quarter in three round trips."""

    __slots__ = ("_bandwidth", "_rounds", "is_full")

    def __init__(self) -> None:
        self.is_full = False
        self._bandwidth = 0.0
        self._rounds = 0

    def check(self, bandwidth: float, lost: float) -> None:
        """Look at one more round, of whose bytes that share got lost.

        Two rounds are enough if a good part of them got lost: a short queue overflows long before the third
        (departure).
        """
        if self.is_full:
            return
        if bandwidth >= self._bandwidth * 1.25:
            self._bandwidth = bandwidth
            self._rounds = 0
            return
        self._rounds += 2 if lost > OVERSHOOT_LOSS else 1
        self.is_full = self._rounds >= 3


class MinRtt:
    """The smallest round trip of the last ten seconds, in seconds, and the pause that measures it anew."""

    __slots__ = ("_at", "_pause_until", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self._at = 0.0
        self._pause_until: float | None = None

    def update(self, rtt: float | None, now: float) -> bool:
        """Take a measurement, if there is one; return whether the value had grown too old."""
        expired = self.value is not None and now > self._at + MIN_RTT_WINDOW_S
        if rtt is not None and (self.value is None or rtt <= self.value or expired):
            self.value = rtt
            self._at = now
        return expired

    def begin_pause(self) -> None:
        """Wait for the queue to empty; the pause is timed from then on."""
        self._pause_until = None

    def is_paused_enough(self, now: float, *, empty: bool) -> bool:
        """Tell whether the path was seen without a queue for long enough; `empty` tells whether it is now."""
        if self._pause_until is None:
            if empty:
                self._pause_until = now + PROBE_RTT_S
            return False
        if now < self._pause_until:
            return False
        self._at = now
        return True


class GainCycle:
    """The phases of the steady state: a round trip of 5/4 of the rate, one of 3/4, six of 1."""

    __slots__ = ("_at", "_first", "_index")

    def __init__(self, variety: int) -> None:
        # Any neutral phase will do to begin with, if only streams that share a path do not all probe at once.
        self._first = 2 + variety % (len(CYCLE_GAINS) - 2)
        self._index = 0
        self._at = 0.0

    @property
    def gain(self) -> float:
        """The gain of the phase."""
        return CYCLE_GAINS[self._index]

    def begin(self, now: float) -> None:
        """Enter the first phase."""
        self._index = self._first
        self._at = now

    def advance(self, now: float) -> None:
        """Enter the next phase."""
        self._index = (self._index + 1) % len(CYCLE_GAINS)
        self._at = now

    def lasts_longer(self, seconds: float, now: float) -> bool:
        """Tell whether the phase has lasted longer than that."""
        return now - self._at > seconds


class Bbr:
    """The controller of one path: feed it `on_ack`, obey `window` and `pacing_rate`."""

    def __init__(self, mss: int, variety: int = 0) -> None:
        """Start on an unknown path; streams with different `variety` probe at different times."""
        self.mss = mss
        self.mode = Mode.STARTUP
        self.window = INITIAL_WINDOW_PACKETS * mss
        self.pacing_rate = STARTUP_GAIN * self.window / 0.001  # as good as none before the first round trip
        self._rate_known = False
        self._bandwidth = MaxFilter(BANDWIDTH_ROUNDS)
        self._pacing_gain = STARTUP_GAIN
        self._window_gain = STARTUP_GAIN
        self._rounds = RoundTrips()
        self._pipe = FullPipe()
        self._min_rtt = MinRtt()
        self._cycle = GainCycle(variety)

    @property
    def bandwidth(self) -> float:
        """The estimated bottleneck bandwidth in bytes a second, 0 while unknown."""
        return self._bandwidth.value

    @property
    def quantum(self) -> int:
        """The size of a burst: what the timers' granularity asks for at this rate."""
        return max(2 * self.mss, min(int(self.pacing_rate * QUANTUM_S), MAX_QUANTUM))

    def on_ack(self, sample: AckSample, now: float) -> None:
        """Learn from a batch of acknowledgements."""
        rounds = self._rounds
        rounds.add(sample)
        if sample.rate is not None and (not sample.app_limited or sample.rate >= self._bandwidth.value):
            self._bandwidth.update(sample.rate, rounds.count)
        if rounds.begins:
            rounds.conclude(self._min_rtt.value)
            if not sample.app_limited:
                self._pipe.check(self._bandwidth.value, rounds.lost)
        self._advance_mode(sample, now)
        self._update_min_rtt(sample, now)
        self._set_pacing_rate()
        self._set_window(sample)
        assert self.window >= MIN_WINDOW_PACKETS * self.mss or self.mode is Mode.PROBE_RTT

    def on_outage(self) -> None:
        """Restart small after a silence: the window grows back with each acknowledgement."""
        self.window = MIN_WINDOW_PACKETS * self.mss

    def _advance_mode(self, sample: AckSample, now: float) -> None:
        if self.mode is Mode.STARTUP and self._pipe.is_full:
            self._enter(Mode.DRAIN, 1 / STARTUP_GAIN, STARTUP_GAIN)
        if self.mode is Mode.DRAIN and sample.in_flight <= self._target(1.0):
            self._enter_probe_bw(now)
        if self.mode is Mode.PROBE_BW and self._phase_is_over(sample, now):
            self._cycle.advance(now)
            self._pacing_gain = self._cycle.gain

    def _phase_is_over(self, sample: AckSample, now: float) -> bool:
        elapsed = self._cycle.lasts_longer(self._min_rtt.value or 0.0, now)
        gain = self._pacing_gain
        if gain > 1:
            return elapsed and (sample.lost > 0 or sample.in_flight >= self._target(gain))
        if gain < 1:
            return elapsed or sample.in_flight <= self._target(1.0)
        return elapsed

    def _enter(self, mode: Mode, pacing_gain: float, window_gain: float) -> None:
        self.mode = mode
        self._pacing_gain = pacing_gain
        self._window_gain = window_gain

    def _enter_probe_bw(self, now: float) -> None:
        self._cycle.begin(now)
        self._enter(Mode.PROBE_BW, 1.0, WINDOW_GAIN)

    def _update_min_rtt(self, sample: AckSample, now: float) -> None:
        expired = self._min_rtt.update(sample.rtt, now)
        if expired and self.mode is not Mode.PROBE_RTT and not sample.app_limited:
            self._enter(Mode.PROBE_RTT, 1.0, 0.5)
            self._min_rtt.begin_pause()
        if self.mode is Mode.PROBE_RTT:
            empty = sample.in_flight <= self._probe_rtt_window()
            if self._min_rtt.is_paused_enough(now, empty=empty):
                self._leave_probe_rtt(now)

    def _leave_probe_rtt(self, now: float) -> None:
        if self._pipe.is_full:
            self._enter_probe_bw(now)
        else:
            self._enter(Mode.STARTUP, STARTUP_GAIN, STARTUP_GAIN)

    def _probe_rtt_window(self) -> int:
        """Half of what the path holds (as in later BBR) instead of four packets: the pause costs less."""
        return max(MIN_WINDOW_PACKETS * self.mss, int(self._product() / 2))

    def _product(self) -> float:
        return self._bandwidth.value * (self._min_rtt.value or 0.0)

    def _target(self, gain: float) -> int:
        """Return the bytes that should be under way: a multiple of the product, and room for three bursts.

        One burst waits to leave, one travels, one is being acknowledged.
        """
        bandwidth, min_rtt = self._bandwidth.value, self._min_rtt.value
        if not bandwidth or min_rtt is None:
            return INITIAL_WINDOW_PACKETS * self.mss
        return int(gain * (bandwidth * min_rtt)) + 3 * self.quantum

    def _set_pacing_rate(self) -> None:
        """Follow the bandwidth, and send more by part of what gets lost (departure).

        Only what arrives counts as bandwidth. At 25 % random loss not even a gain of 5/4 would deliver what was
        delivered before, and the estimate would sink round by round. An overloaded path betrays itself by its queue;
        where that is too short to see, the compensation is partial, so that the losses it feeds die away.
        """
        rate, min_rtt = self._pacing_gain * self._bandwidth.value, self._min_rtt.value
        if not self._rate_known and min_rtt is not None:
            # Bandwidth is not known before there was more to send than the few small packets a connection begins with.
            rate = max(rate, self._pacing_gain * INITIAL_WINDOW_PACKETS * self.mss / max(min_rtt, 0.001))
        if not rate:
            return
        if not self._rounds.queue_seen:
            rate /= 1 - LOSS_COMPENSATION * min(self._rounds.loss_share, MAX_COMPENSATED_LOSS)
        if self._pipe.is_full or not self._rate_known or rate > self.pacing_rate:
            self.pacing_rate = max(rate, MIN_RATE)
            self._rate_known = True

    def _set_window(self, sample: AckSample) -> None:
        if self.mode is Mode.PROBE_RTT:
            self.window = min(self.window, self._probe_rtt_window())
            return
        target = self._target(self._window_gain)
        if self._pipe.is_full:
            self.window = min(self.window + sample.acked, target)
        elif self.window < target or sample.delivered < INITIAL_WINDOW_PACKETS * self.mss:
            self.window += sample.acked
        self.window = max(self.window, MIN_WINDOW_PACKETS * self.mss)
