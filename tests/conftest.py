"""What every test shares: a time limit, and under CI a skipped test fails unless the machine has no way to run it.

`tests/run` names what cannot be had here in P2PCLAUDE_TESTS_WITHOUT (words such as `node` or `root`); a skip is
accepted when its reason contains one of them.
"""

import gc
import os
import re
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent

# How fast a machine makes up inputs says nothing about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Whole files go to workers; those that take the longest go first, so that none of them runs alone in the end.
LONGEST = (
    "nat/test_nat_pairs",
    "cli/test_transcripts",
    "soak/test_connects",
    "soak/test_crash",
    "soak/test_strangers",
)
REAL_PROCESSES = {"cli", "interop", "nat"}  # folders whose tests run for seconds each

begun: set[Path] = set()  # the files of which a test has run

TEST_SECONDS = 200  # a test that waits for what never comes must not hold up the others; most take less than one


def pytest_configure() -> None:
    """Take SIGINT seriously again: xdist's workers ignore it, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, then the directories of real processes, then the rest."""

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(HERE).with_suffix("")
        if path.as_posix() in LONGEST:
            return LONGEST.index(path.as_posix())
        return len(LONGEST) + (path.parts[0] not in REAL_PROCESSES)

    items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the garbage collector look at no object of earlier files again: each simulation ends with a collection."""
    if item.path not in begun:
        begun.add(item.path)
        gc.collect()
        gc.freeze()


def is_forbidden(reason: str) -> bool:
    """Tell whether a test may not be skipped for this reason; a word in the middle of another one is none."""
    without = os.environ.get("P2PCLAUDE_TESTS_WITHOUT", "").split()
    words = (rf"(?<![a-z]){re.escape(word)}(?![a-z])" for word in without)
    return os.environ.get("CI") == "true" and not any(re.search(word, reason.lower()) for word in words)


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and is_forbidden(report.longrepr[2]):
        report.outcome = "failed"
        report.longrepr = f"skipped although CI could run it: {report.longrepr[2]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a test's skip into a failure where skipping is forbidden."""
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the skip of a whole module into a failure where skipping is forbidden."""
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """End a test that takes too long: the signal interrupts whatever it waits for."""

    def give_up(*_: object) -> None:
        pytest.fail(f"the test took longer than {TEST_SECONDS} s")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS, 5.0)  # and again, should a callback have swallowed it
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
