"""p2pclaude-stop: end sessions, or their turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from p2pclaude.cli.common import COMMON_OPTIONS, Arguments, Console, Target, parse_target, printable, run, write_line
from p2pclaude.errors import UsageError

if TYPE_CHECKING:
    from p2pclaude.client.rpc_client import Client

NAME = "p2pclaude-stop"
USAGE = f"""\
{NAME}: stop Claude Code sessions

Usage:
  {NAME} [options] URL SESSION...
  {NAME} [options] --all URL
  {NAME} (-h | --help)
  {NAME} --version

URL is the pairing URL, or the path of a file that holds it. Prints the id of
each session that was stopped.

Options:
  --all                    stop every session
  --turn                   end what the session is doing, not the session
{COMMON_OPTIONS}
Exit status: 0 done, 64 usage, 65 malformed URL, 66 no such session (the others
are stopped all the same), 69 daemon not found or not reachable, 75 timed out,
76 not a p2pclaude daemon, 77 wrong key, 130 interrupted.
"""


class Options(NamedTuple):
    """Which sessions to stop; `sessions` None means all. With `turn` only their turns end."""

    target: Target
    sessions: list[str] | None
    turn: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError or DataError."""
    sessions = None if arguments["--all"] else list(dict.fromkeys(arguments["SESSION"]))
    if sessions is not None and "" in sessions:
        raise UsageError("SESSION is empty")
    return Options(parse_target(arguments, console), sessions, arguments["--turn"])


def execute(options: Options, console: Console) -> int:
    """Stop the sessions."""
    from p2pclaude.cli.network import run_with_client

    return run_with_client(options.target, console, lambda client: _stop(client, options, console), acts=True)


async def _stop(client: Client, options: Options, console: Console) -> int:
    """Ask for all at once, print in order; a session that ended by itself meanwhile is no error with --all."""
    import asyncio

    from p2pclaude.client.remote_sessions import interrupt, list_sessions, no_session, stop

    sessions = options.sessions
    if sessions is None:
        sessions = [str(entry["sessionId"]) for entry in await list_sessions(client)]
    status = 0
    end = interrupt if options.turn else stop
    stopping = [asyncio.create_task(end(client, session)) for session in sessions]
    try:
        for session, stopped in zip(sessions, stopping, strict=True):
            if await stopped:
                write_line(printable(session))
            elif options.sessions is not None:
                status = console.report(no_session(session))
    finally:
        for task in stopping:
            task.cancel()
        await asyncio.gather(*stopping, return_exceptions=True)
    return status
