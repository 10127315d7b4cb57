"""Probes of a closed window: when they are due, how seldom they become, and for how long nobody answered."""

import pytest

from p2pclaude.hyperdht.udx.windowprobe import WindowProbe


def test_an_open_window_is_not_asked_about() -> None:
    probe = WindowProbe()
    probe.watch(False, 0.1, 1.0)
    probe.handle_timer(100.0)
    assert probe.at is None and not probe.due and probe.silence(0.0, 100.0) == 0.0


def test_questions_become_rarer_up_to_two_seconds() -> None:
    probe, now, gaps = WindowProbe(), 1.0, []
    for _ in range(6):
        probe.watch(True, 0.3, now)
        assert probe.at is not None
        gaps.append(probe.at - now)
        probe.watch(True, 99.0, now)  # already under way
        probe.handle_timer(probe.at - 0.001)
        assert not probe.due
        now = probe.at
        probe.handle_timer(now)
        assert probe.due and probe.at is None
        probe.due = False
    assert gaps == pytest.approx([0.3, 0.6, 1.2, 2.0, 2.0, 2.0])


def test_a_quick_path_is_asked_after_a_quarter_of_a_second() -> None:
    probe = WindowProbe()
    probe.watch(True, 0.01, 1.0)
    assert probe.at == 1.25


def test_silence_counts_from_the_last_word_or_from_when_it_closed() -> None:
    probe = WindowProbe()
    probe.watch(True, 0.25, 1.0)
    assert probe.silence(0.0, 5.0) == 0.0  # nothing was asked yet
    probe.handle_timer(1.25)
    assert probe.silence(0.5, 5.0) == 4.0
    assert probe.silence(3.0, 5.0) == 2.0
    probe.watch(True, 0.25, 1.3)
    assert probe.silence(0.0, 5.0) == 4.0  # it has been closed since then
    probe.watch(False, 0.0, 6.0)
    assert probe.silence(0.0, 9.0) == 0.0


def test_stop() -> None:
    probe = WindowProbe()
    probe.watch(True, 0.25, 1.0)
    probe.due = True
    probe.stop()
    assert probe.at is None and not probe.due
