"""Learnt timeouts, the send window, the health monitor, the budget of verifications: pure and stepped by hand."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pclaude.hyperdht.node import budget
from p2pclaude.hyperdht.node.budget import VerifyBudget
from p2pclaude.hyperdht.node.health import HealthMonitor
from p2pclaude.hyperdht.rpc import timeouts
from p2pclaude.hyperdht.rpc.timeouts import AdaptiveTimeouts
from p2pclaude.hyperdht.rpc.window import CongestionWindow

HOST = ("10.0.0.1", 1)
OTHER = ("10.0.0.2", 1)


def learner() -> AdaptiveTimeouts:
    return AdaptiveTimeouts(random.Random(1))


def settled(rtt: float, count: int = 30) -> AdaptiveTimeouts:
    learnt = learner()
    for i in range(count):
        learnt.put(HOST, rtt, 1, float(i))
    return learnt


@pytest.mark.parametrize("rtt", [0.0005, 0.05, 0.3, 1.0, 3.0])
def test_a_known_host_gets_what_it_needs(rtt: float) -> None:
    learnt = settled(rtt)
    timeout = learnt.get(HOST, 1, 30)
    assert timeout > rtt
    assert timeouts.MIN_TIMEOUT <= timeout <= max(2 * rtt, 1.1 * timeouts.MIN_TIMEOUT)


@given(st.floats(0.0001, 10), st.integers(1, 10))
def test_timeouts_grow_and_are_bounded(rtt: float, sends: int) -> None:
    learnt = settled(rtt, 3)
    grown = [learnt.get(HOST, attempt, 3) for attempt in range(1, sends + 1)]
    limit = timeouts.MAX_TIMEOUT * (1 + timeouts.JITTER)
    assert all(timeouts.MIN_TIMEOUT <= t <= limit for t in grown)
    ceiling = min(max(timeouts.BACKOFF_LIMIT, 2 * grown[0] / (1 + timeouts.JITTER)), timeouts.MAX_TIMEOUT)
    assert all(a < b or b >= ceiling for a, b in pairwise(grown))


def test_an_unknown_host_gets_what_the_network_needs() -> None:
    first = learner().get(OTHER, 1, 0)
    assert timeouts.UNKNOWN_TIMEOUT <= first <= 1.1 * timeouts.UNKNOWN_TIMEOUT
    assert settled(0.001).get(OTHER, 1, 30) < first
    assert settled(0.8).get(OTHER, 1, 30) > first
    assert settled(3.0).get(OTHER, 1, 30) <= 1.1  # one slow network shall not make every dead node slow


def test_resends_do_not_teach_a_known_host_their_own_delay() -> None:
    learnt = settled(0.01)
    before = [learnt.get(HOST, 1, 30) for _ in range(20)]
    for i in range(50):
        learnt.put(HOST, 2.0, 2, 30.0 + i)
    assert max(learnt.get(HOST, 1, 80) for _ in range(20)) <= 1.1 * min(before)


def test_a_host_slower_than_the_first_guess_is_learnt_from_its_second_send() -> None:
    learnt = learner()
    learnt.put(HOST, 1.2, 2, 0)
    assert learnt.get(HOST, 1, 1) > 1.2


def test_old_hosts_are_forgotten_and_their_number_is_bounded() -> None:
    learnt = settled(2.0)
    assert learnt.get(HOST, 1, 30 + timeouts.MAX_AGE) < 2.0
    for i in range(timeouts.MAX_HOSTS + 100):
        learnt.put((f"10.1.{i >> 8}.{i & 255}", 1), 0.1, 1, 31.0)
    assert len(learnt._hosts) == timeouts.MAX_HOSTS


def test_the_window_fills_by_slot_and_in_all_and_runs_empty() -> None:
    window = CongestionWindow(10)
    for _ in range(10):
        assert not window.full
        window.sent()
    assert window.full
    window.settled()
    assert not window.full
    window.sent()
    window.rotate()
    for _ in range(10):
        window.sent()
    window.rotate()
    assert window.full and window.total == 20  # twice the maximum in all
    window.rotate()
    window.rotate()
    assert not window.full and window.total == 10
    for _ in range(100):
        window.settled()
    assert window.total >= 0
    window.clear()
    assert window.total == 0


def ticks(monitor: HealthMonitor, *deltas: tuple[int, int]) -> list[bool]:
    """Feed answered and lost requests of several ticks; the totals live on the monitor."""
    changes = []
    totals = list(monitor._totals[-1]) if monitor._totals else [0, 0]
    for answered, lost in deltas:
        totals = [totals[0] + answered, totals[1] + lost]
        changes.append(monitor.update(*totals))
    return changes


WARM = ((9, 0),) * 4


def test_silence_means_offline_after_two_ticks_and_one_answer_means_online() -> None:
    monitor = HealthMonitor()
    assert ticks(monitor, *WARM, (0, 9)) == [False] * 5
    assert monitor.online
    assert ticks(monitor, (0, 9)) == [True]
    assert not monitor.online
    assert ticks(monitor, (9, 0)) == [True]
    assert monitor.online


def test_idle_and_cold_ticks_say_nothing() -> None:
    monitor = HealthMonitor()
    assert ticks(monitor, (0, 9), (0, 9), (0, 9)) == [False] * 3
    monitor = HealthMonitor()
    ticks(monitor, *WARM)
    assert ticks(monitor, *(((0, 3),) * 10)) == [False] * 10
    assert monitor.online


def test_mostly_timeouts_mean_degraded_after_four_ticks_until_four_good_ones() -> None:
    monitor = HealthMonitor()
    ticks(monitor, *WARM)
    assert ticks(monitor, *(((3, 6),) * 3)) == [False] * 3
    assert ticks(monitor, (3, 6)) == [True]
    assert monitor.degraded and monitor.online
    assert ticks(monitor, *(((9, 1),) * 3)) == [False] * 3
    assert ticks(monitor, (9, 1)) == [True]
    assert not monitor.degraded


def test_offline_is_not_degraded_and_reset_forgets() -> None:
    monitor = HealthMonitor()
    ticks(monitor, *WARM, *(((3, 6),) * 4), (0, 9), (0, 9))
    assert (monitor.online, monitor.degraded) == (False, False)
    assert monitor.reset() and monitor.online
    assert not monitor.reset()


def test_one_host_cannot_spend_more_than_its_share() -> None:
    allowed = VerifyBudget()
    assert sum(allowed.take("10.0.0.1", 5.0) for _ in range(5000)) == budget.HOST_RATE * budget.BURST_SECONDS
    assert allowed.take("10.0.0.2", 5.0)
    assert sum(allowed.take("10.0.0.1", 6.0) for _ in range(5000)) == budget.HOST_RATE


def test_all_hosts_together_are_bounded_in_cost_and_in_memory() -> None:
    allowed = VerifyBudget()
    taken = sum(allowed.take(f"10.1.{i >> 8}.{i & 255}", 5.0) for i in range(9000))
    assert taken == budget.TOTAL_RATE * budget.BURST_SECONDS
    assert len(allowed._hosts) == budget.MAX_HOSTS
