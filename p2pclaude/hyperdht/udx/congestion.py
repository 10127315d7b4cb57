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


class Bbr:
    """The controller of one path: feed it `on_ack`, obey `window` and `pacing_rate`."""

    def __init__(self, mss: int, variety: int = 0) -> None:
        """Start on an unknown path; streams with different `variety` probe at different times."""
        self.mss = mss
        self._first_phase = 2 + variety % (len(CYCLE_GAINS) - 2)
        self.mode = Mode.STARTUP
        self.window = INITIAL_WINDOW_PACKETS * mss
        self.pacing_rate = STARTUP_GAIN * self.window / 0.001  # as good as none before the first round trip
        self._rate_known = False
        self._bandwidth = MaxFilter(BANDWIDTH_ROUNDS)
        self._pacing_gain = STARTUP_GAIN
        self._window_gain = STARTUP_GAIN
        self._round_count = 0
        self._round_start = False
        self._round_end_delivered = 0
        self._round_lost = 0
        self._round_acked = 0
        self._loss_share = 0.0  # smoothed share of bytes that get lost
        self._round_rtt: float | None = None  # the smallest of this round trip
        self._queue_seen = False  # the round trips are longer than the path is
        self._full_bandwidth = 0.0
        self._full_rounds = 0
        self._pipe_filled = False
        self._min_rtt: float | None = None
        self._min_rtt_at = 0.0
        self._probe_rtt_until: float | None = None
        self._cycle_index = 0
        self._cycle_at = 0.0

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
        self._update_round(sample)
        if sample.rate is not None and (not sample.app_limited or sample.rate >= self._bandwidth.value):
            self._bandwidth.update(sample.rate, self._round_count)
        self._check_full_pipe(sample)
        self._advance_mode(sample, now)
        self._update_min_rtt(sample, now)
        self._set_pacing_rate()
        self._set_window(sample)

    def on_outage(self) -> None:
        """Restart small after a silence: the window grows back with each acknowledgement."""
        self.window = MIN_WINDOW_PACKETS * self.mss

    def _update_round(self, sample: AckSample) -> None:
        self._round_lost += sample.lost
        self._round_acked += sample.acked
        if sample.rtt is not None and (self._round_rtt is None or sample.rtt < self._round_rtt):
            self._round_rtt = sample.rtt
        self._round_start = sample.prior_delivered >= self._round_end_delivered
        if self._round_start:
            self._round_end_delivered = sample.delivered
            self._round_count += 1

    def _check_full_pipe(self, sample: AckSample) -> None:
        """Call the pipe full when the bandwidth has not grown by a quarter in three round trips.

        Two are enough if a good part of them got lost: a short queue overflows long before the third (departure).
        """
        if not self._round_start:
            return
        lost = self._round_lost / max(self._round_lost + self._round_acked, 1)
        self._round_lost = self._round_acked = 0
        self._loss_share += (lost - self._loss_share) / 4
        if self._round_rtt is not None and self._min_rtt is not None:
            self._queue_seen = self._round_rtt > QUEUE_RTT * self._min_rtt
        self._round_rtt = None
        if self._pipe_filled or sample.app_limited:
            return
        if self._bandwidth.value >= self._full_bandwidth * 1.25:
            self._full_bandwidth = self._bandwidth.value
            self._full_rounds = 0
            return
        self._full_rounds += 2 if lost > OVERSHOOT_LOSS else 1
        self._pipe_filled = self._full_rounds >= 3

    def _advance_mode(self, sample: AckSample, now: float) -> None:
        if self.mode is Mode.STARTUP and self._pipe_filled:
            self._enter(Mode.DRAIN, 1 / STARTUP_GAIN, STARTUP_GAIN)
        if self.mode is Mode.DRAIN and sample.in_flight <= self._target(1.0):
            self._enter_probe_bw(now)
        if self.mode is Mode.PROBE_BW and self._phase_is_over(sample, now):
            self._cycle_index = (self._cycle_index + 1) % len(CYCLE_GAINS)
            self._cycle_at = now
            self._pacing_gain = CYCLE_GAINS[self._cycle_index]

    def _phase_is_over(self, sample: AckSample, now: float) -> bool:
        elapsed = now - self._cycle_at > (self._min_rtt or 0.0)
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
        # Any neutral phase will do, if only streams that share a path do not all probe at once.
        self._cycle_index = self._first_phase
        self._cycle_at = now
        self._enter(Mode.PROBE_BW, 1.0, WINDOW_GAIN)

    def _update_min_rtt(self, sample: AckSample, now: float) -> None:
        expired = self._min_rtt is not None and now > self._min_rtt_at + MIN_RTT_WINDOW_S
        if sample.rtt is not None and (self._min_rtt is None or sample.rtt <= self._min_rtt or expired):
            self._min_rtt = sample.rtt
            self._min_rtt_at = now
        if expired and self.mode is not Mode.PROBE_RTT and not sample.app_limited:
            self._enter(Mode.PROBE_RTT, 1.0, 0.5)
            self._probe_rtt_until = None
        if self.mode is Mode.PROBE_RTT:
            self._run_probe_rtt(sample, now)

    def _run_probe_rtt(self, sample: AckSample, now: float) -> None:
        if self._probe_rtt_until is None:
            if sample.in_flight <= self._probe_rtt_window():
                self._probe_rtt_until = now + PROBE_RTT_S
        elif now >= self._probe_rtt_until:
            self._min_rtt_at = now
            if self._pipe_filled:
                self._enter_probe_bw(now)
            else:
                self._enter(Mode.STARTUP, STARTUP_GAIN, STARTUP_GAIN)

    def _probe_rtt_window(self) -> int:
        """Half of what the path holds (as in later BBR) instead of four packets: the pause costs less."""
        return max(MIN_WINDOW_PACKETS * self.mss, int(self._product() / 2))

    def _product(self) -> float:
        return self._bandwidth.value * (self._min_rtt or 0.0)

    def _target(self, gain: float) -> int:
        """Return the bytes that should be under way: a multiple of the product, and room for three bursts.

        One burst waits to leave, one travels, one is being acknowledged.
        """
        if not self._bandwidth.value or self._min_rtt is None:
            return INITIAL_WINDOW_PACKETS * self.mss
        return int(gain * self._product()) + 3 * self.quantum

    def _set_pacing_rate(self) -> None:
        """Follow the bandwidth, and send more by part of what gets lost (departure).

        Only what arrives counts as bandwidth. At 25 % random loss not even a gain of 5/4 would deliver what was
        delivered before, and the estimate would sink round by round. An overloaded path betrays itself by its queue;
        where that is too short to see, the compensation is partial, so that the losses it feeds die away.
        """
        rate = self._pacing_gain * self._bandwidth.value
        if not self._rate_known and self._min_rtt is not None:
            # Bandwidth is not known before there was more to send than the few small packets a connection begins with.
            rate = max(rate, self._pacing_gain * INITIAL_WINDOW_PACKETS * self.mss / max(self._min_rtt, 0.001))
        if not rate:
            return
        if not self._queue_seen:
            rate /= 1 - LOSS_COMPENSATION * min(self._loss_share, MAX_COMPENSATED_LOSS)
        if self._pipe_filled or not self._rate_known or rate > self.pacing_rate:
            self.pacing_rate = max(rate, MIN_RATE)
            self._rate_known = True

    def _set_window(self, sample: AckSample) -> None:
        if self.mode is Mode.PROBE_RTT:
            self.window = min(self.window, self._probe_rtt_window())
            return
        target = self._target(self._window_gain)
        if self._pipe_filled:
            self.window = min(self.window + sample.acked, target)
        elif self.window < target or sample.delivered < INITIAL_WINDOW_PACKETS * self.mss:
            self.window += sample.acked
        self.window = max(self.window, MIN_WINDOW_PACKETS * self.mss)
