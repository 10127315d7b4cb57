"""The parts of congestion control by hand: rounds, the full pipe, the smallest round trip, phases, the window."""

import pytest

from p2pclaude.hyperdht.udx.congestion import (
    CYCLE_GAINS,
    INITIAL_WINDOW_PACKETS,
    MIN_RATE,
    MIN_RTT_WINDOW_S,
    MIN_WINDOW_PACKETS,
    PROBE_RTT_S,
    STARTUP_GAIN,
    Bbr,
    FullPipe,
    GainCycle,
    MaxFilter,
    MinRtt,
    Mode,
    RoundTrips,
)
from p2pclaude.hyperdht.udx.rate import AckSample

MSS = 1000


def sample(
    *, acked: int = 1000, lost: int = 0, delivered: int = 0, prior: int = 0, in_flight: int = 0,
    rate: float | None = None, app_limited: bool = False, rtt: float | None = 0.1,
) -> AckSample:  # fmt: skip
    """Return a batch of acknowledgements."""
    return AckSample(acked, lost, delivered, prior, in_flight, rate, app_limited, rtt)


def test_the_largest_value_of_ten_rounds() -> None:
    largest = MaxFilter(10)
    assert largest.value == 0.0
    for count, value in [(0, 5.0), (1, 9.0), (2, 3.0), (5, 4.0)]:
        largest.update(value, count)
    assert largest.value == 9.0
    largest.update(1.0, 10)
    assert largest.value == 9.0  # of round 1
    largest.update(1.0, 11)
    assert largest.value == 4.0
    largest.update(4.0, 12)
    largest.update(0.5, 21)
    assert largest.value == 4.0
    largest.update(0.5, 22)
    assert largest.value == 0.5


def test_a_round_ends_when_a_packet_that_left_in_it_arrives() -> None:
    rounds = RoundTrips()
    for delivered, prior, begins in [(10, 0, True), (20, 5, False), (30, 10, True), (40, 29, False), (50, 30, True)]:
        rounds.add(sample(delivered=delivered, prior=prior))
        assert rounds.begins == begins
    assert rounds.count == 3


def test_the_losses_of_a_round_are_smoothed() -> None:
    rounds = RoundTrips()
    rounds.add(sample(acked=900, lost=100, delivered=1000))
    rounds.conclude(0.1)
    assert rounds.lost == pytest.approx(0.1) and rounds.loss_share == pytest.approx(0.025)
    rounds.add(sample(acked=1000, lost=0, delivered=2000, prior=1000))
    rounds.conclude(0.1)
    assert rounds.lost == 0.0 and rounds.loss_share == pytest.approx(0.025 * 0.75)
    rounds.add(sample(acked=0, lost=0, delivered=3000, prior=2000))
    rounds.conclude(0.1)
    assert rounds.lost == 0.0


@pytest.mark.parametrize(
    ("rtts", "queue"), [([0.125], False), ([0.126], True), ([0.3, 0.12], False), ([0.13, 0.3], True)]
)
def test_long_round_trips_show_a_queue(rtts: list[float], queue: bool) -> None:
    rounds = RoundTrips()
    for rtt in rtts:
        rounds.add(sample(rtt=rtt, delivered=1))
        rounds.begins = True
    rounds.conclude(0.1)
    assert rounds.queue_seen == queue
    rounds.add(sample(rtt=None, delivered=2, prior=1))
    rounds.conclude(0.1)
    assert rounds.queue_seen == queue  # nothing was measured
    rounds.add(sample(rtt=9.0, delivered=3, prior=2))
    rounds.conclude(None)
    assert rounds.queue_seen == queue


@pytest.mark.parametrize(
    ("bandwidths", "lost", "full_after"),
    [
        ([100, 125, 157, 196], 0.0, None),
        ([100, 124, 124, 124], 0.0, 3),
        ([100, 125, 156, 156, 156], 0.0, 4),
        ([100, 110, 110], 0.11, 2),
        ([100, 110, 110], 0.1, None),
    ],
)
def test_the_pipe_is_full_when_three_rounds_bring_no_quarter_more(
    bandwidths: list[float], lost: float, full_after: int | None
) -> None:
    pipe = FullPipe()
    seen = []
    for bandwidth in bandwidths:
        pipe.check(bandwidth, lost)
        seen.append(pipe.is_full)
    assert seen == [full_after is not None and number >= full_after for number in range(len(bandwidths))]
    if pipe.is_full:
        pipe.check(1e9, 0.0)
        assert pipe.is_full  # for good


def test_the_smallest_round_trip_of_ten_seconds() -> None:
    rtt = MinRtt()
    assert not rtt.update(None, 0.0) and rtt.value is None
    assert not rtt.update(0.2, 1.0) and not rtt.update(0.3, 2.0)
    assert rtt.value == 0.2
    assert not rtt.update(0.2, 3.0)  # as small: its age is new
    assert not rtt.update(0.5, 3.0 + MIN_RTT_WINDOW_S)
    assert rtt.value == 0.2
    assert rtt.update(None, 3.1 + MIN_RTT_WINDOW_S) and rtt.value == 0.2
    assert rtt.update(0.5, 3.1 + MIN_RTT_WINDOW_S) and rtt.value == 0.5
    assert not rtt.update(0.4, 4.0 + MIN_RTT_WINDOW_S) and rtt.value == 0.4


def test_the_pause_is_timed_from_when_the_queue_is_gone() -> None:
    rtt = MinRtt()
    rtt.update(0.1, 0.0)
    rtt.begin_pause()
    assert not rtt.is_paused_enough(20.0, empty=False)
    assert not rtt.is_paused_enough(21.0, empty=True)
    assert not rtt.is_paused_enough(21.0 + PROBE_RTT_S - 0.01, empty=True)
    assert rtt.is_paused_enough(21.0 + PROBE_RTT_S, empty=False)
    assert not rtt.update(0.2, 21.0 + MIN_RTT_WINDOW_S)  # the value counts as new
    assert rtt.value == 0.1
    rtt.begin_pause()
    assert not rtt.is_paused_enough(99.0, empty=False)


def test_phases_go_round_and_begin_with_a_neutral_one() -> None:
    for variety in range(12):
        cycle = GainCycle(variety)
        cycle.begin(5.0)
        assert cycle.gain == 1.0
        gains = []
        for _ in range(8):
            gains.append(cycle.gain)
            cycle.advance(6.0)
        assert sorted(gains) == sorted(CYCLE_GAINS) and cycle.gain == 1.0
        start = 2 + variety % 6
        assert gains == [*CYCLE_GAINS[start:], *CYCLE_GAINS[:start]]
    assert not cycle.lasts_longer(1.0, 7.0) and cycle.lasts_longer(1.0, 7.01)


def test_the_window_and_the_rate_of_an_unknown_path() -> None:
    bbr = Bbr(MSS)
    assert bbr.window == INITIAL_WINDOW_PACKETS * MSS and bbr.mode is Mode.STARTUP and bbr.bandwidth == 0.0
    bbr.on_ack(sample(rate=None, rtt=0.1, delivered=1000), 1.0)
    assert bbr.pacing_rate == pytest.approx(STARTUP_GAIN * INITIAL_WINDOW_PACKETS * MSS / 0.1)
    assert bbr.window == INITIAL_WINDOW_PACKETS * MSS + 1000
    bbr.on_outage()
    assert bbr.window == MIN_WINDOW_PACKETS * MSS


def test_a_burst_is_two_milliseconds_of_the_rate_within_bounds() -> None:
    bbr = Bbr(MSS)
    bbr.pacing_rate = 1_000_000.0
    assert bbr.quantum == 2000
    bbr.pacing_rate = 10_000_000.0
    assert bbr.quantum == 20_000
    bbr.pacing_rate = 1e12
    assert bbr.quantum == 64 * 1024


class Driven:
    """A controller on a path of a megabyte a second and 100 ms, fed one sample a round."""

    def __init__(self, rate: float = 1e6, rtt: float = 0.1) -> None:
        self.bbr = Bbr(MSS)
        self.now, self.delivered, self.rate, self.rtt = 1.0, 0, rate, rtt

    def mode(self) -> Mode:
        """Tell what the controller does."""
        return self.bbr.mode

    def round(self, **changes: object) -> None:
        """Let one round trip pass."""
        prior, self.delivered = self.delivered, self.delivered + 100_000
        values: dict[str, object] = {
            "acked": 100_000, "delivered": self.delivered, "prior": prior, "rate": self.rate, "rtt": self.rtt,
            "in_flight": 100_000,
        }  # fmt: skip
        self.now += self.rtt + 0.001
        self.bbr.on_ack(sample(**(values | changes)), self.now)  # type: ignore[arg-type]


def test_from_start_up_over_draining_to_the_steady_state() -> None:
    driven = Driven()
    driven.round(in_flight=500_000)
    assert driven.mode() is Mode.STARTUP and driven.bbr.bandwidth == 1e6
    assert driven.bbr.pacing_rate == pytest.approx(STARTUP_GAIN * 1e6)
    for _ in range(3):
        driven.round(in_flight=500_000)
    assert driven.mode() is Mode.DRAIN
    assert driven.bbr.pacing_rate == pytest.approx(1e6 / STARTUP_GAIN)
    driven.round(in_flight=100_000)
    assert driven.mode() is Mode.PROBE_BW
    assert driven.bbr.pacing_rate == pytest.approx(1e6)
    assert driven.bbr.window == int(2.0 * 1e5) + 3 * driven.bbr.quantum


def steady() -> Driven:
    """Return a controller in the steady state, at the beginning of its first phase."""
    driven = Driven()
    for _ in range(4):
        driven.round(in_flight=500_000)
    driven.round()
    assert driven.mode() is Mode.PROBE_BW
    return driven


def test_phases_of_the_steady_state() -> None:
    driven = steady()
    gains = []
    for _ in range(9):
        driven.round(in_flight=140_000)
        gains.append(driven.bbr._pacing_gain)
    assert gains == [1.0, 1.0, 1.0, 1.0, 1.0, 1.25, 0.75, 1.0, 1.0]


def test_a_probe_lasts_until_it_has_filled_the_pipe_or_lost_something() -> None:
    driven = steady()
    while driven.bbr._pacing_gain == 1.0:
        driven.round(in_flight=130_000)
    assert driven.bbr._pacing_gain == 1.25
    driven.round(in_flight=50_000)
    assert driven.bbr._pacing_gain == 1.25
    driven.round(in_flight=50_000, lost=1)
    assert driven.bbr._pacing_gain == 0.75
    assert driven.now > 0
    driven.bbr.on_ack(sample(in_flight=90_000, delivered=driven.delivered, rate=1e6), driven.now)  # drained at once
    assert driven.bbr._pacing_gain == 1.0


def test_an_old_round_trip_is_measured_anew_in_a_pause() -> None:
    driven = steady()
    while driven.mode() is Mode.PROBE_BW:
        driven.round(rtt=0.2)
    assert driven.now > 1.0 + MIN_RTT_WINDOW_S and driven.mode() is Mode.PROBE_RTT
    window = driven.bbr.window
    assert window == int(1e6 * 0.2 / 2)  # half of what the path holds, as far as is known
    driven.round(rtt=0.1, in_flight=window)
    driven.round(rtt=0.1, in_flight=window)
    driven.round(rtt=0.1, in_flight=window)
    assert driven.mode() is Mode.PROBE_BW


def test_an_idle_application_needs_no_pause() -> None:
    driven = steady()
    for _ in range(150):
        driven.round(rtt=0.2, app_limited=True)
        assert driven.mode() is Mode.PROBE_BW


def test_a_rate_that_the_application_limits_counts_when_it_is_higher() -> None:
    driven = Driven()
    driven.round(rate=500.0)
    driven.round(rate=400.0, app_limited=True)
    assert driven.bbr.bandwidth == 500.0
    driven.round(rate=500.0, app_limited=True)
    driven.round(rate=600.0, app_limited=True)
    assert driven.bbr.bandwidth == 600.0
    for _ in range(10):
        driven.round(rate=700.0, app_limited=True)
    assert driven.mode() is Mode.STARTUP  # what is not the path's says nothing of the pipe


def test_random_losses_are_made_up_for_but_not_those_of_a_queue() -> None:
    driven = steady()
    for _ in range(30):
        driven.round(lost=25_000, acked=75_000, in_flight=130_000)
        driven.bbr._pacing_gain = 1.0
    share = driven.bbr._rounds.loss_share
    assert share == pytest.approx(0.25, abs=0.01)
    driven.bbr._set_pacing_rate()
    assert driven.bbr.pacing_rate == pytest.approx(1e6 / (1 - 0.6 * share))
    driven.bbr._rounds.loss_share = 0.9
    driven.bbr._set_pacing_rate()
    assert driven.bbr.pacing_rate == pytest.approx(1e6 / (1 - 0.6 * 0.4))
    driven.bbr._rounds.queue_seen = True
    driven.bbr._set_pacing_rate()
    assert driven.bbr.pacing_rate == pytest.approx(1e6)


def test_the_rate_has_a_floor_and_in_start_up_it_only_grows() -> None:
    driven = Driven(rate=100.0, rtt=100.0)
    driven.round()
    assert driven.bbr.pacing_rate == MIN_RATE
    driven = Driven()
    driven.round()
    before = driven.bbr.pacing_rate
    driven.bbr._pacing_gain = 0.1
    driven.bbr._set_pacing_rate()
    assert driven.bbr.pacing_rate == before


def test_in_start_up_the_window_grows_by_what_arrives() -> None:
    driven = Driven()
    before = driven.bbr.window
    driven.round(acked=5000)
    assert driven.bbr.window == before + 5000
    driven.bbr.window = 10**9
    driven.round(acked=5000)
    assert driven.bbr.window == 10**9  # beyond its target it waits
    driven.bbr.window = 1
    driven.bbr._set_window(sample(acked=0, delivered=10**9))
    assert driven.bbr.window == MIN_WINDOW_PACKETS * MSS


def test_when_the_pipe_is_full_the_window_is_bounded_by_its_target() -> None:
    driven = steady()
    target = int(2.0 * 1e5) + 3 * driven.bbr.quantum
    driven.bbr.window = target - 500
    driven.bbr._set_window(sample(acked=200))
    assert driven.bbr.window == target - 300
    driven.bbr._set_window(sample(acked=1000))
    assert driven.bbr.window == target


def test_a_pause_before_the_pipe_was_full_goes_back_to_the_start_up() -> None:
    bbr = Bbr(MSS)
    bbr.on_ack(sample(delivered=1000, rate=1e6), 1.0)
    modes = [bbr.mode]
    begun = 1.0 + MIN_RTT_WINDOW_S + 0.1
    bbr.on_ack(sample(delivered=1000, rtt=0.2), begun)  # of the same round trip: nothing is known of the pipe
    modes.append(bbr.mode)
    bbr.on_ack(sample(delivered=1000, rtt=0.2), begun + PROBE_RTT_S)
    assert [*modes, bbr.mode] == [Mode.STARTUP, Mode.PROBE_RTT, Mode.STARTUP]
    assert bbr._pacing_gain == bbr._window_gain == STARTUP_GAIN
