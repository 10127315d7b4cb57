"""When a sender probes, and when it gives up: by hand, in seconds."""

import pytest

from p2pclaude.hyperdht.udx.patience import GIVE_UP_S, NEW_PATHS_S, PROBES, Patience
from p2pclaude.hyperdht.udx.rtt import RttEstimator


def quick() -> RttEstimator:
    """Return a path of 100 ms that does not vary: it is probed after 210 ms."""
    rtt = RttEstimator()
    rtt.add_sample(0.1)
    rtt.variation = 0.0
    return rtt


def test_a_probe_follows_what_was_sent_last_or_the_last_progress() -> None:
    patience = Patience()
    patience.begin(10.0)
    patience.note_sent(10.0)
    assert patience.probe_at(quick(), True) == pytest.approx(10.21)
    patience.note_sent(10.1)
    assert patience.probe_at(quick(), True) == pytest.approx(10.31)
    patience.note_progress(10.2)
    assert patience.probe_at(quick(), True) == pytest.approx(10.41)
    patience.note_progress(10.1)  # a conclusion drawn late
    assert patience.probe_at(quick(), True) == pytest.approx(10.41)


def test_probes_are_two_packets_and_each_waits_longer() -> None:
    patience = Patience()
    patience.begin(10.0)
    patience.note_sent(10.0)
    assert patience.run_out(10.21, 0.0, has_room=True)
    assert (patience.probes_due, patience.attempts) == (PROBES, 1) == (2, 1)
    assert patience.probe_at(quick(), True) == pytest.approx(10.21 + 0.42)
    assert patience.run_out(10.63, 0.0, has_room=True)
    assert patience.attempts == 2
    patience.note_progress(10.7)
    assert (patience.probes_due, patience.attempts) == (0, 0)


def test_it_gives_up_when_its_time_without_progress_is_over() -> None:
    patience = Patience()
    patience.begin(10.0)
    patience.note_sent(10.0 + GIVE_UP_S - 0.1)
    assert patience.probe_at(quick(), True) == pytest.approx(10.0 + GIVE_UP_S)
    assert patience.run_out(10.0 + GIVE_UP_S - 0.01, 99.0, has_room=True)
    assert not patience.is_over
    assert not patience.run_out(10.0 + GIVE_UP_S, 99.0, has_room=True)
    assert patience.is_over


def test_answers_count_while_the_peer_has_no_room() -> None:
    patience = Patience()
    patience.begin(10.0)
    patience.note_sent(10.0)
    assert patience.run_out(10.0 + GIVE_UP_S, 15.0, has_room=False)
    assert not patience.run_out(15.0 + GIVE_UP_S, 15.0, has_room=False)
    fresh = Patience()
    fresh.begin(10.0)
    assert not fresh.run_out(10.0 + GIVE_UP_S, 9.0, has_room=False)


def test_without_room_it_looks_again_behind_its_time() -> None:
    patience = Patience()
    patience.begin(10.0)
    patience.note_sent(10.0 + GIVE_UP_S)
    assert patience.probe_at(quick(), True) == pytest.approx(10.0 + GIVE_UP_S)
    assert patience.probe_at(quick(), False) == pytest.approx(10.0 + GIVE_UP_S + 0.21)


def test_what_had_no_room_gets_its_full_time() -> None:
    patience = Patience()
    patience.begin(10.0)
    patience.note_room(15.0)
    assert patience.run_out(15.0 + GIVE_UP_S - 0.1, 0.0, has_room=True)
    assert not patience.run_out(15.0 + GIVE_UP_S, 0.0, has_room=True)


def test_another_path_gets_its_time_but_not_for_ever() -> None:
    patience = Patience()
    patience.begin(10.0)
    patience.run_out(10.5, 0.0, has_room=True)
    patience.reset_path(20.0, under_way=True)
    assert (patience.attempts, patience.probes_due) == (0, PROBES)
    assert patience.run_out(20.0 + GIVE_UP_S - 0.1, 0.0, has_room=True)
    patience.reset_path(100.0, under_way=False)
    assert patience.probes_due == 0
    assert not patience.run_out(10.0 + NEW_PATHS_S + GIVE_UP_S, 0.0, has_room=True)
    patience = Patience()
    patience.begin(10.0)
    patience.reset_path(100.0, under_way=False)
    assert patience.run_out(10.0 + NEW_PATHS_S + GIVE_UP_S - 0.1, 0.0, has_room=True)


def test_a_new_stream_has_nothing_to_probe() -> None:
    patience = Patience()
    assert (patience.probes_due, patience.attempts, patience.is_over) == (0, 0, False)
