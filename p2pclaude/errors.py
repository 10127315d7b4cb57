"""The application's errors: each class carries the exit status (sysexits.h) that a command ends with.

Every module of the application raises these; `cli/common.py` prints the message as `error:` and the hint as
`hint:`. Neither ever holds a key or a pairing URL.
"""

import errno


class P2PClaudeError(Exception):
    """Base of every error that a person is told about; `hint` says what could help."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(P2PClaudeError):
    """The command line asks for something that makes no sense (EX_USAGE)."""

    exit_status = 64


class DataError(P2PClaudeError):
    """A pairing URL, a key file or other input is malformed (EX_DATAERR)."""

    exit_status = 65


class NoSession(P2PClaudeError):
    """There is no such session (EX_NOINPUT)."""

    exit_status = 66


class Unavailable(P2PClaudeError):
    """The daemon, the network or a needed program is not found or not reachable (EX_UNAVAILABLE)."""

    exit_status = 69


class TryAgain(P2PClaudeError):
    """It timed out or is busy; a later try may do (EX_TEMPFAIL)."""

    exit_status = 75


class ProtocolError(P2PClaudeError):
    """The other side does not speak this protocol (EX_PROTOCOL)."""

    exit_status = 76


class WireError(ProtocolError):
    """A line, or the sealed text in it, is not what `protocol.wire` describes."""


class Refused(P2PClaudeError):
    """The key is wrong, the directory is outside the root, or permission is missing (EX_NOPERM)."""

    exit_status = 77


def cannot_bind(error: OSError, host: str | None, port: int | None) -> Unavailable:
    """Say what an error of binding a UDP socket means, and which option names another place; None is any."""
    reason = (error.strerror or str(error)).lower()
    if error.errno == errno.EADDRNOTAVAIL:
        return Unavailable(f"address {host} cannot be used: {reason}", hint="--host needs an address of this host")
    where = "the network" if port is None else f"port {port}"
    return Unavailable(f"{where} cannot be used: {reason}", hint="name another with --port")
