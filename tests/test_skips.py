"""What may be skipped under CI: that which the machine cannot have, and nothing that merely sounds like it."""

import pytest
from conftest import is_forbidden
from host.test_processes import linux_only
from interop import harness
from nat import lab
from sessions.test_stop import pytestmark as stops


@pytest.mark.parametrize(
    ("without", "reason", "forbidden"),
    [
        ("", "Skipped: fish is not installed: its completions are not tested", True),
        ("fish", "Skipped: fish is not installed: its completions are not tested", False),
        ("ip", "Skipped: ip is not installed: NO NAT IS TESTED", False),
        ("ip tc", "Skipped: the matching shell is not installed", True),  # both sound in it
        ("root", "Skipped: not root, so there are no network namespaces", False),
        ("node", "Skipped: Node.js is not installed", False),
        ("node", "Skipped: no hyperdht in /x/node_modules, run `npm ci`", False),
    ],
)
def test_only_what_cannot_be_had_may_be_skipped(
    monkeypatch: pytest.MonkeyPatch, without: str, reason: str, forbidden: bool
) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("P2PCLAUDE_TESTS_WITHOUT", without)
    assert is_forbidden(reason) is forbidden
    monkeypatch.delenv("CI")
    assert not is_forbidden(reason)


@pytest.mark.parametrize("mark", [linux_only, stops])
def test_what_only_linux_has_is_no_fault_of_another_system(
    monkeypatch: pytest.MonkeyPatch, mark: pytest.MarkDecorator
) -> None:
    """`tests/run` says "linux" on macOS."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("P2PCLAUDE_TESTS_WITHOUT", "linux")
    assert not is_forbidden(mark.kwargs["reason"])


def test_the_words_are_those_of_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("P2PCLAUDE_TESTS_WITHOUT", "node ip")
    monkeypatch.setenv("PATH", "")
    assert not is_forbidden(harness.missing_node() or "")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert not is_forbidden(lab.missing_tools() or "")
