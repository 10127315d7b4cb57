"""Measure connections through NATs: the long variant of test_nat_pairs.py, a command of its own, for root.

    cd tests && PYTHONPATH=.. python -m nat.measure --runs 30 --pair cone-symmetric --sides node-python

A pair is the client's NAT and the server's; sides are likewise. Every run has new homes, a new server and a new client,
so no throttle of an earlier one is felt. Prints one line a run on stderr and one a case on stdout: how many connected,
and the times until the connection was open in milliseconds. With --again each run connects once more at once, and the
second connects have a line of their own: the same client, but a new one of Node's, which waits 20 s by itself.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import cast

from interop.harness import Event, Side, peers_on
from nat.lab import KINDS, PUBLIC_HOSTS, Kind, Lab, remove_stale
from nat.peers import Dwellers, exchange, homes_of, nodes_of

SIDES: tuple[Side, ...] = ("python", "node")
AGAIN_TIMEOUT = 40_000  # milliseconds; a server of Node's refuses random punches for 20 s after one
Pair = tuple[Kind, Kind]
Sides = tuple[Side, Side]


def percentile(values: Sequence[float], part: float) -> float:
    """Return the value that `part` of all values do not exceed (nearest rank); infinity without values."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * part) - 1)] if ranked else math.inf


def once(
    lab: Lab, bootstrap: Sequence[str], pair: Pair, sides: Sides, *, loss: float = 0.0, again: bool = False
) -> list[Event]:
    """Connect once between two new homes, or twice; returns the client's results."""
    with homes_of(lab, *pair) as (client_home, server_home), peers_on(bootstrap) as group:
        dwellers = Dwellers(group)
        server = dwellers.start(server_home, sides[1], "server")
        client = dwellers.start(client_home, sides[0], "client")
        client_home.lose(loss)
        results = [exchange(client, server)]
        if again:
            if sides[0] == "node":
                client = dwellers.start(client_home, sides[0], "client")
            results.append(exchange(client, server, connectTimeout=AGAIN_TIMEOUT))
        return results


def describe(results: Sequence[Event]) -> str:
    """Return a case's figures on one line."""
    times = [result["openMs"] for result in results if result["ok"]]
    figures = " ".join(f"{name} {percentile(times, part):.0f}" for name, part in PARTS.items())
    return f"{len(times)}/{len(results)} {figures}"


PARTS = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "max": 1.0}


@contextmanager
def laboratory(side: Side) -> Iterator[tuple[Lab, list[str]]]:
    """Give a laboratory with six DHT nodes of that side."""
    remove_stale()
    with Lab() as lab, nodes_of(lab, side, PUBLIC_HOSTS[:6]) as nodes:
        yield lab, nodes.bootstrap


def main() -> None:
    """Run every case that was asked for."""
    parser = argparse.ArgumentParser(description="Measure connections through NATs.")
    parser.add_argument("--pair", action="append", help="CLIENT-SERVER of open, cone, symmetric; default: all")
    parser.add_argument("--sides", action="append", help="CLIENT-SERVER of python, node; default: all")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--loss", type=float, default=0.0, help="lost at the client's NAT, each way")
    parser.add_argument("--again", action="store_true", help="connect a second time at once")
    parser.add_argument("--nodes", choices=SIDES, default="node", help="what the DHT consists of")
    options = parser.parse_args()
    pairs = options.pair or [f"{client}-{server}" for client in KINDS for server in KINDS]
    all_sides = options.sides or [f"{client}-{server}" for client in SIDES for server in SIDES]
    with laboratory(options.nodes) as (lab, bootstrap), ThreadPoolExecutor(options.parallel) as pool:
        for pair in pairs:
            for sides in all_sides:

                def run(_: int, pair: str = pair, sides: str = sides) -> list[Event]:
                    kinds, who = cast(Pair, pair.split("-")), cast(Sides, sides.split("-"))
                    results = once(lab, bootstrap, kinds, who, loss=options.loss, again=options.again)
                    for result in results:
                        print(pair, sides, result.get("openMs"), result.get("error", ""), file=sys.stderr)
                    return results

                rounds = zip(*pool.map(run, range(options.runs)), strict=True)
                for name, results in zip(("", "again "), rounds, strict=False):
                    print(pair, sides, name + describe(results), flush=True)


if __name__ == "__main__":
    main()
