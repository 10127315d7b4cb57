"""Acknowledgements that are said again: when, how often, and until when."""

import pytest

from p2pclaude.hyperdht.udx.ackduty import AckDuty


@pytest.mark.parametrize(("srtt", "pause"), [(None, 0.2), (0.1, 0.2), (0.001, 0.05), (1.0, 2.0)])
def test_it_is_said_four_times_more_each_after_twice_the_time(srtt: float | None, pause: float) -> None:
    duty = AckDuty()
    assert not duty.due and duty.at is None
    duty.begin(srtt, 10.0)
    now, times = 10.0, list[float]()
    while duty.at is not None:
        times.append(duty.at - now)
        now = duty.at
        duty.handle_timer(now - 0.0001)
        assert not duty.due
        duty.handle_timer(now)
        assert duty.due
        duty.due = False
    assert times == pytest.approx([pause, 2 * pause, 4 * pause, 8 * pause])


def test_it_begins_anew() -> None:
    duty = AckDuty()
    duty.begin(0.1, 10.0)
    duty.handle_timer(10.2)
    duty.begin(0.1, 11.0)
    assert duty.at == pytest.approx(11.2)
    duty.at = None
    duty.due = False
    duty.handle_timer(99.0)
    assert not duty.due
