"""p2pclaude-tail: a session's output as Claude's own objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

from p2pclaude.cli.common import (
    COMMON_OPTIONS,
    Arguments,
    Console,
    Target,
    parse_count,
    parse_target,
    run,
    write_lines,
)
from p2pclaude.errors import UsageError

if TYPE_CHECKING:
    from p2pclaude.client.remote_sessions import Page
    from p2pclaude.client.rpc_client import Client

NAME = "p2pclaude-tail"
USAGE = f"""\
{NAME}: print what a Claude Code session prints

Usage:
  {NAME} [options] URL SESSION
  {NAME} (-h | --help)
  {NAME} --version

URL is the pairing URL, or the path of a file that holds it. Prints the JSON
objects of Claude's stream-json output, one a line, from the first one on.

Options:
  -f, --follow             go on until the session ends
  -n, --last N             begin with the last N objects
  --after SEQ              begin after this sequence number (see --meta)
  --meta                   print the envelope around each object, with its
                           sequence number "seq" and "timestamp"; messages to
                           Claude and other events too, and with -f a line for
                           each change of the session's state
  --text                   print only what a person would read
{COMMON_OPTIONS}
Exit status: 0 done, 64 usage, 65 malformed URL, 66 no such session, 69 daemon
not found or not reachable, 75 timed out, 76 not a p2pclaude daemon, 77 wrong
key, 130 interrupted.
"""


class Options(NamedTuple):
    """Which session, from where on, and in which form."""

    target: Target
    session: str
    follow: bool
    last: int | None
    after: int
    form: str  # "data", "meta" or "text"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError or DataError."""
    last, after = parse_count(arguments, "--last"), parse_count(arguments, "--after")
    if last is not None and after is not None:
        raise UsageError("--last and --after do not go together")
    if arguments["--meta"] and arguments["--text"]:
        raise UsageError("--meta and --text do not go together")
    if not arguments["SESSION"]:
        raise UsageError("SESSION is empty")
    form = "meta" if arguments["--meta"] else "text" if arguments["--text"] else "data"
    target = parse_target(arguments, console)
    return Options(target, arguments["SESSION"], arguments["--follow"], last, after or 0, form)


def execute(options: Options, console: Console) -> int:
    """Print the session's output."""
    from p2pclaude.cli.network import run_with_client

    return run_with_client(options.target, console, lambda client: _tail(client, options))


async def _tail(client: Client, options: Options) -> int:
    from p2pclaude.client.remote_sessions import follow, last_seq, read_journal

    last, after = options.last, options.after
    if last == 0:
        after = await last_seq(client, options.session)
    elif last is not None:
        after = -last
    states = options.follow and options.form == "meta"
    if options.follow:
        reading = follow(client, options.session, after=after, states=states)
    else:
        reading = read_journal(client, options.session, after=after)
    known: str | None = None
    async with aclosing(reading) as pages:
        async for page in pages:
            messages = page.messages
            if last is not None and page.next is None:  # without a journal, all that there is comes first
                messages = messages[max(0, len(messages) - last) :]
            print_messages(messages, options.form)
            if states and page.state != known:
                print_state(page)
                known = page.state
            last = None
    return 0


def print_state(page: Page) -> None:
    """Print the state that a session is in now, as a line that is not of the journal and so has no "seq"."""
    from p2pclaude.protocol.wire import dump_json

    line = {"type": "state", "state": page.state}
    write_lines([dump_json(line if page.error is None else line | {"error": page.error})])


def print_messages(envelopes: Iterable[Mapping[str, Any]], form: str) -> None:
    """Print the envelopes of a page in one of the forms data, meta and text."""
    from p2pclaude.protocol.wire import JsonLine

    text_of = {"data": _data, "meta": _meta, "text": _text}[form]
    lines: list[bytes] = []
    for envelope in envelopes:
        output = envelope.output if form == "data" and isinstance(envelope, JsonLine) else None
        lines += text_of(envelope) if output is None else (output,)
    write_lines(lines)


def _data(envelope: Mapping[str, Any]) -> Iterable[bytes]:
    from p2pclaude.protocol.wire import OUTPUT, dump_json

    return (dump_json(envelope.get("data")),) if envelope.get("type") == OUTPUT else ()


def _meta(envelope: Mapping[str, Any]) -> Iterable[bytes]:
    from p2pclaude.protocol.wire import JsonLine, dump_json

    return (envelope.text if isinstance(envelope, JsonLine) else dump_json(envelope),)


def _text(envelope: Mapping[str, Any]) -> Iterable[bytes]:
    from p2pclaude.cli.text import render_envelope

    return [line.encode("utf-8", "replace") for line in render_envelope(envelope)]
