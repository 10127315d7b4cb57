"""p2pclaude-node: a node of the DHT, and a blind relay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pclaude.cli.common import (
    Arguments,
    Console,
    check_address,
    parse_bootstrap,
    parse_count,
    parse_seconds,
    run,
    write_line,
)
from p2pclaude.errors import UsageError

if TYPE_CHECKING:
    from p2pclaude.node.dhtnode import NodeOptions

NAME = "p2pclaude-node"
USAGE = f"""\
{NAME}: run a node of the DHT, and a relay for peers behind NATs

Usage:
  {NAME} [options]
  {NAME} (-h | --help)
  {NAME} --version

Stays in the foreground until SIGINT or SIGTERM. Prints its log, a JSON object
a line. Without --bootstrap, P2P_CLAUDE_BOOTSTRAP and --public the node is the
bootstrap node of a network of one's own.

Options:
  --bootstrap NODES        HOST:PORT,... of the network to join; else
                           P2P_CLAUDE_BOOTSTRAP
  --public                 join the public network
  --private                be a network of one's own, whatever
                           P2P_CLAUDE_BOOTSTRAP says
  --host ADDRESS           IPv4 address to bind; else all of the host's
  --port PORT              UDP port to bind; else 49737
  --public-host ADDRESS    IPv4 address at which others reach the node, if it
                           is not one of the host's
  --relay                  relay connections between peers that name the key
                           in the log's first line
  --key-file FILE          keep the relay's key pair in FILE; else in
                           relay-keypair.json in P2P_CLAUDE_DATA_DIR or
                           ~/.p2p-claude
  --print-key              print the relay's public key and exit
  --max-connections N      how many clients the relay may have [default: 256]
  --max-links N            how many pairs of them it links [default: 1024]
  --max-bytes BYTES        end a link that has carried so much; else no limit
  --max-seconds SECONDS    end a link that is so old; else no limit
  -v, --verbose            log more, as DEBUG=1 does
  -h, --help               show this text
  --version                show the version

Exit status: 0 ended by a signal, 64 usage, 65 damaged key file, 69 the network
cannot be used, 75 the disk is full, 77 no permission.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What to do: run, or only print the relay's key."""

    node: NodeOptions
    print_key: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError."""
    if arguments["--key-file"] == "":
        raise UsageError("--key-file needs an argument that is not empty")
    for option in ("--host", "--public-host"):
        check_address(arguments, option)
    if arguments["--public-host"] == "0.0.0.0":
        raise UsageError("--public-host needs one address, not all")
    port = parse_count(arguments, "--port", least=1)
    if port is not None and port > 0xFFFF:
        raise UsageError("--port needs a number up to 65535")

    from p2pclaude.cli import lean  # noqa: F401 (asyncio is to come through it)
    from p2pclaude.node.dhtnode import NodeOptions

    node = NodeOptions(
        bootstrap=_network(arguments),
        host=arguments["--host"],
        port=port,
        public_host=arguments["--public-host"],
        relay=arguments["--relay"],
        key_file=arguments["--key-file"],
        max_connections=parse_count(arguments, "--max-connections", least=1) or 1,
        max_links=parse_count(arguments, "--max-links", least=1) or 1,
        max_bytes=parse_count(arguments, "--max-bytes", least=1),
        max_seconds=None if arguments["--max-seconds"] is None else parse_seconds(arguments, "--max-seconds"),
        debug=arguments["--verbose"],
    )
    return Options(node, arguments["--print-key"])


def _network(arguments: Arguments) -> tuple[str, ...] | None:
    """Return the nodes to join: none of them is the public network, None is a network of one's own."""
    chosen = [option for option in ("--bootstrap", "--public", "--private") if arguments[option] not in (None, False)]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} do not go together")
    if arguments["--public"]:
        return ()
    if arguments["--private"]:
        return None
    return parse_bootstrap(arguments["--bootstrap"], os.environ) or None


def execute(options: Options, console: Console) -> int:
    """Run until a signal, or print the key."""
    from p2pclaude.cli.lean import run as run_loop
    from p2pclaude.cli.lean import settle
    from p2pclaude.node.dhtnode import relay_key, run_node

    settle()

    if options.print_key:
        write_line(relay_key(options.node))
        return 0
    return run_loop(run_node(options.node))
