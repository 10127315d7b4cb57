"""p2pclaude-daemon: serve Claude Code sessions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pclaude.cli.common import (
    Arguments,
    Console,
    check_address,
    is_terminal,
    parse_bootstrap,
    parse_count,
    parse_seconds,
    printable,
    run,
    write_line,
)
from p2pclaude.errors import UsageError

if TYPE_CHECKING:
    from p2pclaude.daemon.daemon import DaemonOptions

NAME = "p2pclaude-daemon"
USAGE = f"""\
{NAME}: serve Claude Code sessions over HyperDHT

Usage:
  {NAME} [options]
  {NAME} (-h | --help)
  {NAME} --version

Stays in the foreground until SIGINT or SIGTERM. Prints its log, a JSON object
a line; the pairing URL stands in pairing.url in the data directory.

Options:
  -r, --root-dir DIR           allow sessions in DIR and below only
  --data-dir DIR               keep keys and sessions in DIR; else in
                               P2P_CLAUDE_DATA_DIR or ~/.p2p-claude
  --print-url                  print the pairing URL and exit
  --rotate                     make a new data key, which revokes every URL
                               handed out, print the new URL and exit
  --check                      test claude, data directory and network, print
                               a line for each, and exit
  --private                    be a DHT of one's own, whose address the pairing
                               URL carries; no other network is needed
  --bootstrap NODES            HOST:PORT,... of the DHT's nodes to start from;
                               else P2P_CLAUDE_BOOTSTRAP, or the public
                               network's
  --relay KEY                  meet clients at this blind relay (64 hexadecimal
                               digits, as p2pclaude-node prints them) where no
                               direct way is found
  --strict                     shake hands only with tools that hold the data
                               key; the TypeScript client does not get in
  --host ADDRESS               IPv4 address to bind; else all of the host's
  --port PORT                  UDP port to bind (--private: 49737)
  --claude PATH                the claude program; else the one on PATH or in
                               one of the usual places
  --permission-mode MODE       default, acceptEdits, bypassPermissions or plan,
                               unless the client asks for one
                               [default: acceptEdits]
  --model MODEL                the model, unless the client asks for one
  --refresh-interval SECONDS   how often to announce the daemon [default: 60]
  --max-sessions N             how many sessions may run at once [default: 64]
  --retain DAYS                delete sessions that ended longer ago; else all
                               are kept
  --ask-timeout SECONDS        deny a permission request that nobody has
                               answered by then; else it waits
  -v, --verbose                log more, as DEBUG=1 does
  -h, --help                   show this text
  --version                    show the version

Exit status: 0 ended by a signal, 64 usage, 65 damaged file in the data
directory, 69 the network or claude cannot be used, 75 another daemon uses the
data directory, 77 no permission. With --check: 0 if there was no error, else
the status of the first one.
"""

PERMISSION_MODES = ("default", "acceptEdits", "bypassPermissions", "plan")


@dataclass(frozen=True, slots=True)
class Options:
    """What to do: serve, unless `instead` is print-url, rotate or check."""

    daemon: DaemonOptions
    instead: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError."""
    for option in ("--root-dir", "--data-dir", "--claude", "--model"):
        if arguments[option] == "":
            raise UsageError(f"{option} needs an argument that is not empty")
    check_address(arguments, "--host")
    if arguments["--permission-mode"] not in PERMISSION_MODES:
        raise UsageError(f"--permission-mode is one of {', '.join(PERMISSION_MODES)}")
    if arguments["--private"] and arguments["--bootstrap"] is not None:
        raise UsageError("--private is a network of its own, it does not go with --bootstrap")
    port = parse_count(arguments, "--port", least=1)
    if port is not None and port > 0xFFFF:
        raise UsageError("--port needs a number up to 65535")
    bootstrap = () if arguments["--private"] else parse_bootstrap(arguments["--bootstrap"], os.environ)
    relay = _parse_relay(arguments["--relay"])
    refresh_interval = parse_seconds(arguments, "--refresh-interval")
    ask_timeout = None if arguments["--ask-timeout"] is None else parse_seconds(arguments, "--ask-timeout")
    max_sessions = parse_count(arguments, "--max-sessions", least=1) or 1
    retain_days = parse_count(arguments, "--retain", least=1)

    from p2pclaude.cli import lean  # noqa: F401 (asyncio is to come through it)
    from p2pclaude.daemon.daemon import DaemonOptions

    daemon = DaemonOptions(
        root_dir=arguments["--root-dir"],
        data_dir=arguments["--data-dir"],
        bootstrap=bootstrap or None,
        host=arguments["--host"],
        port=port,
        private=arguments["--private"],
        relay=relay,
        claude=arguments["--claude"],
        permission_mode=arguments["--permission-mode"],
        model=arguments["--model"],
        refresh_interval=refresh_interval,
        max_sessions=max_sessions,
        retain_days=retain_days,
        ask_timeout=ask_timeout,
        strict=arguments["--strict"],
        debug=arguments["--verbose"],
    )
    return Options(daemon, _instead(arguments))


def _instead(arguments: Arguments) -> str | None:
    asked = [name for name in ("print-url", "rotate", "check") if arguments[f"--{name}"]]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0]} does not go with --{asked[1]}")
    return asked[0] if asked else None


def _parse_relay(text: str | None) -> bytes | None:
    from p2pclaude.protocol.pairing import parse_relay

    try:
        return None if text is None else parse_relay(text)
    except ValueError as error:
        raise UsageError(f"--relay: {error}") from None


def execute(options: Options, console: Console) -> int:
    """Serve until a signal, or do what was asked for instead."""
    from p2pclaude.cli.lean import run as run_loop
    from p2pclaude.cli.lean import settle
    from p2pclaude.daemon.daemon import pairing_url, rotate, run_daemon

    settle()
    if options.instead == "print-url":
        write_line(pairing_url(options.daemon))
    elif options.instead == "rotate":
        write_line(rotate(options.daemon))
    elif options.instead == "check":
        return run_loop(_check(options.daemon))
    else:
        return run_loop(run_daemon(options.daemon))
    return 0


async def _check(options: DaemonOptions) -> int:
    """Print what is found, and return the status of the first error."""
    from p2pclaude.daemon.check import check

    status, aligned = 0, is_terminal()
    async for finding in check(options, os.environ):
        text = finding.text if finding.hint is None else f"{finding.text}; hint: {finding.hint}"
        row = (finding.level, finding.subject, printable(text))
        write_line(f"{row[0]:7}  {row[1]:14}  {row[2]}" if aligned else "\t".join(row))
        status = status or finding.status
    return status
