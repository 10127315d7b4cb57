"""The application's errors: exit statuses that scripts rely on."""

import pytest

from p2pclaude import errors


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("P2PClaudeError", 1),
        ("UsageError", 64),
        ("DataError", 65),
        ("NoSession", 66),
        ("Unavailable", 69),
        ("TryAgain", 75),
        ("ProtocolError", 76),
        ("WireError", 76),
        ("Refused", 77),
    ],
)
def test_exit_status(name: str, status: int) -> None:
    error = getattr(errors, name)("what happened", hint="what helps")
    assert (error.exit_status, str(error), error.hint) == (status, "what happened", "what helps")
    assert isinstance(error, errors.P2PClaudeError)


def test_the_hint_may_be_left_out() -> None:
    assert errors.TryAgain("busy").hint is None
