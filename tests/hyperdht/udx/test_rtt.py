"""The round trip's estimate, and the timeouts that follow from it, by hand."""

import pytest

from p2pclaude.hyperdht.udx.rtt import RttEstimator


def test_the_first_sample_is_the_estimate() -> None:
    rtt = RttEstimator()
    assert (rtt.latest, rtt.minimum, rtt.srtt, rtt.variation) == (None, None, None, 0.0)
    rtt.add_sample(0.2)
    assert (rtt.latest, rtt.minimum, rtt.srtt, rtt.variation) == (0.2, 0.2, 0.2, 0.1)


def test_later_samples_are_smoothed() -> None:
    rtt = RttEstimator()
    for sample in (0.2, 0.3, 0.1):
        rtt.add_sample(sample)
    assert (rtt.latest, rtt.minimum) == (0.1, 0.1)
    assert rtt.variation == pytest.approx(0.1 + (0.1 - 0.1) / 4 + (abs(0.2125 - 0.1) - 0.1) / 4)
    assert rtt.srtt == pytest.approx(0.2125 + (0.1 - 0.2125) / 8)
    rtt.reset()
    assert (rtt.latest, rtt.minimum, rtt.srtt, rtt.variation) == (None, None, None, 0.0)


def test_a_sample_of_nothing_is_a_microsecond() -> None:
    rtt = RttEstimator()
    rtt.add_sample(0.0)
    assert rtt.srtt == rtt.minimum == 1e-6


@pytest.mark.parametrize(("attempts", "seconds"), [(0, 0.5), (1, 1.0), (2, 1.0), (12, 1.0)])
def test_before_a_sample_half_a_second(attempts: int, seconds: float) -> None:
    assert RttEstimator().probe_timeout(attempts) == seconds


def test_twice_the_round_trip_or_more_when_it_varies() -> None:
    rtt = RttEstimator()
    rtt.add_sample(0.1)
    assert rtt.probe_timeout(0) == pytest.approx(0.1 + 4 * 0.05 + 0.01)
    rtt.variation = 0.01
    assert rtt.probe_timeout(0) == pytest.approx(0.21)
    assert rtt.probe_timeout(1) == pytest.approx(0.42)
    assert rtt.probe_timeout(2) == pytest.approx(0.84)
    assert rtt.probe_timeout(3) == 1.0


def test_timeouts_are_bounded_by_three_seconds_and_twice_the_round_trip() -> None:
    rtt = RttEstimator()
    rtt.add_sample(5.0)
    assert rtt.probe_timeout(0) == 3.0
    assert rtt.probe_timeout(1) == pytest.approx(10.01)
    assert rtt.probe_timeout(9) == pytest.approx(10.01)
