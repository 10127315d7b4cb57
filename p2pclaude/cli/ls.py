"""p2pclaude-ls: the sessions of a daemon, asked of it or read from the DHT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from p2pclaude.cli.common import (
    COMMON_OPTIONS,
    Arguments,
    Console,
    Target,
    is_terminal,
    parse_target,
    printable,
    run,
    write_line,
)
from p2pclaude.errors import UsageError

if TYPE_CHECKING:
    from p2pclaude.client.rpc_client import Client

NAME = "p2pclaude-ls"
USAGE = f"""\
{NAME}: list Claude Code sessions

Usage:
  {NAME} [options] URL
  {NAME} (-h | --help)
  {NAME} --version

URL is the pairing URL, or the path of a file that holds it. Prints a line a
session: id, state, pid, time of creation, directory; separated by tabs, or in
columns under a header on a terminal. What is not known is a "-".

Options:
  -a, --all                ended sessions too
  -q, --quiet              ids only
  --json                   a JSON object a line, with all that the daemon tells
  --dht                    read the daemon's record in the DHT, without
                           reaching the daemon
{COMMON_OPTIONS}
Exit status: 0 done, 64 usage, 65 malformed URL, 69 daemon not found or not
reachable, 75 timed out, 76 not a p2pclaude daemon, 77 wrong key, 130
interrupted.
"""

HEADER = ("SESSION", "STATE", "PID", "CREATED", "DIRECTORY")


class Options(NamedTuple):
    """Whom to ask, and how to print the answer."""

    target: Target
    every: bool
    form: str  # "table", "ids" or "json"
    dht: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError or DataError."""
    if arguments["--quiet"] and arguments["--json"]:
        raise UsageError("--quiet and --json do not go together")
    if arguments["--dht"] and arguments["--all"]:
        raise UsageError("--all and --dht do not go together: the record holds live sessions only")
    form = "ids" if arguments["--quiet"] else "json" if arguments["--json"] else "table"
    return Options(parse_target(arguments, console), arguments["--all"], form, arguments["--dht"])


def execute(options: Options, console: Console) -> int:
    """Print the list."""
    from p2pclaude.cli.network import run_until_interrupted, run_with_client

    if options.dht:
        return run_until_interrupted(lambda: _list_record(options, console))
    return run_with_client(options.target, console, lambda client: _list(client, options))


async def _list(client: Client, options: Options) -> int:
    from p2pclaude.client.remote_sessions import list_sessions

    print_sessions(await list_sessions(client, every=options.every), options.form)
    return 0


async def _list_record(options: Options, console: Console) -> int:
    from p2pclaude.client.remote_sessions import read_record

    target = options.target
    record = await read_record(target.pairing, bootstrap=target.bootstrap, timeout=target.timeout)
    console.note(f"the record is number {record.seq}, updated {format_time(record.updated_at)}")
    if record.omitted:
        console.hint(f"{record.omitted} older sessions did not fit the record")
    print_sessions(record.sessions, options.form)
    return 0


def print_sessions(sessions: Sequence[Mapping[str, Any]], form: str) -> None:
    """Print sessions in one of the forms table, ids and json."""
    from p2pclaude.protocol.wire import dump_json

    if form == "json":
        for session in sessions:
            write_line(dump_json(session))
    elif form == "ids":
        for session in sessions:
            write_line(_cell(session.get("sessionId")))
    else:
        _print_rows([_row(session) for session in sessions])


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    if not is_terminal():
        for row in rows:
            write_line("\t".join(row))
        return
    rows = [HEADER, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(session: Mapping[str, Any]) -> tuple[str, ...]:
    cells = (_cell(session.get(name)) for name in ("sessionId", "state", "pid"))
    return (*cells, format_time(session.get("createdAt")), _cell(session.get("directory")))


def _cell(value: object) -> str:
    """Return one column's text: no tab, newline or escape sequence of the other side's making."""
    return (printable(str(value)) if value is not None else "") or "-"


def format_time(value: object) -> str:
    """Return milliseconds since 1970 (or ISO 8601 text) as ISO 8601 in UTC, "-" for anything else."""
    from datetime import UTC, datetime

    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            moment = datetime.fromtimestamp(value / 1000, UTC)
        else:
            return "-"
        return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "-"
