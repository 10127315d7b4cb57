"""A tenth of `tests/soak/crash`: a daemon that is killed again and again loses no message and runs none twice."""

import signal
from pathlib import Path

from soak.crash import crash

KILLS = 100


def test_a_hundred_kills(tmp_path: Path) -> None:
    signal.setitimer(signal.ITIMER_REAL, 500)  # on a busy machine each life takes seconds: the usual limit is shorter
    report = crash(KILLS, seed=7, sessions=3, path=tmp_path)
    assert report.problems == []
    assert report.kills == KILLS
    assert report.acknowledged > KILLS / 2 and report.cut > 0  # it was not idle
