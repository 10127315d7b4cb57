"""p2pclaude-ping: is the daemon there, and how is it reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from p2pclaude.cli.common import COMMON_OPTIONS, Arguments, Console, Target, parse_count, parse_target, run, write_line
from p2pclaude.errors import ProtocolError

if TYPE_CHECKING:
    from p2pclaude.client.rpc_client import Client

NAME = "p2pclaude-ping"
USAGE = f"""\
{NAME}: test the connection to a daemon

Usage:
  {NAME} [options] URL
  {NAME} (-h | --help)
  {NAME} --version

URL is the pairing URL, or the path of a file that holds it. Prints a line a
reply: round trip, how connected (direct, punched or relayed), remote address.

Options:
  -c, --count N            ask N times, a second apart [default: 1]
{COMMON_OPTIONS}
Exit status: 0 done, 64 usage, 65 malformed URL, 69 daemon not found or not
reachable, 75 timed out, 76 not a p2pclaude daemon, 77 wrong key, 130
interrupted.
"""

INTERVAL_SECONDS = 1.0


class Options(NamedTuple):
    """Whom to ask, and how often."""

    target: Target
    times: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError or DataError."""
    count = parse_count(arguments, "--count", least=1) or 1
    return Options(parse_target(arguments, console), count)


def execute(options: Options, console: Console) -> int:
    """Ask and print."""
    from p2pclaude.cli.network import run_with_client

    return run_with_client(options.target, console, lambda client: _ping(client, options, console))


async def _ping(client: Client, options: Options, console: Console) -> int:
    import asyncio

    from p2pclaude.client.rpc_client import format_address

    clock = asyncio.get_running_loop().time
    for turn in range(options.times):
        if turn:
            await asyncio.sleep(INTERVAL_SECONDS)
        stream = await client.connect()
        asked = clock()
        answer = await client.call("ping")
        spent_ms = (clock() - asked) * 1000
        if not isinstance(answer, dict) or answer.get("pong") is not True:
            raise ProtocolError("the daemon's answer to a ping is something else")
        write_line(f"{spent_ms:.1f} ms {stream.how} {format_address(stream)}")
        console.note(f"the daemon is version {answer.get('version', 'unknown')}")
    return 0
