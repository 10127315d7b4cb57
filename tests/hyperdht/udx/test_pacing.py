"""The token bucket, by hand: rates in bytes a second, times in seconds."""

import pytest

from p2pclaude.hyperdht.udx.pacing import Pacer


def test_a_new_bucket_is_full() -> None:
    assert Pacer().budget(1.0, 1_000_000, 2000) == 6000
    assert Pacer().budget(1.0, 100_000, 2000) == 4000  # two bursts at least


def test_what_is_spent_comes_back_at_the_rate() -> None:
    pacer = Pacer()
    assert pacer.budget(1.0, 1_000_000, 1000) == 6000
    pacer.spend(7000)
    assert pacer.budget(1.0, 1_000_000, 1000) == -1000
    assert pacer.budget(1.002, 1_000_000, 1000) == pytest.approx(1000, abs=1)
    assert pacer.budget(1.5, 1_000_000, 1000) == 6000  # the bucket holds no more
    assert pacer.budget(1.4, 1_000_000, 1000) == 6000  # a clock that stands still takes nothing away


def test_a_burst_is_awaited() -> None:
    pacer = Pacer()
    pacer.budget(1.0, 1_000_000, 3000)
    pacer.spend(6000)
    assert pacer.ready_at(1_000_000, 3000) == pytest.approx(1.003)
    assert pacer.ready_at(1_000_000_000, 3000) == pytest.approx(1.001)  # no earlier than a tick
    pacer.spend(3000)
    assert pacer.ready_at(1_000_000, 3000) == pytest.approx(1.006)


def test_before_the_first_budget_nothing_is_spent() -> None:
    pacer = Pacer()
    pacer.spend(1_000_000)
    assert pacer.wait_until is None
    assert pacer.ready_at(1_000_000, 5000) == pytest.approx(0.005)
    assert pacer.budget(1.0, 1_000_000, 1000) == 6000
