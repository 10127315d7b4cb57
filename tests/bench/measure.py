"""Measure p2pclaude beside Node: both kinds of peers in turn, on one network, in one run.

Usage: tests/bench/run [--json] [--rounds N] [--only PART,...]

Prints a table (with --json one object with every sample). Each figure is the median of the rounds; the ratio is to the
same figure of Node alone, of the same run. Pairings of streams read SERVER < CLIENT. The parts: `near` is loopback,
`far` is 100 ms between two hosts and 50 ms to the DHT (as root, in network namespaces), `streams` is bulk and round
trips on loopback, `wan` bulk over 100 ms with loss. Nothing here is a threshold: it shows where we stand.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Mapping

from bench.oneshots import Figures, far, near
from interop.harness import missing_node
from nat.lab import missing_tools

PARTS = ("near", "far", "streams", "wan")
NODE_ALONE = ("node", "node < node")


def measure(part: str, options: argparse.Namespace) -> Figures:
    """Return the samples of one part."""
    if part == "near":
        return near(options.rounds, options.megabytes)
    if part == "far":
        return far(options.rounds)
    streams = importlib.import_module("bench.streams")
    parts = {"wan"} if part == "wan" else {"loopback"}
    wanted = argparse.Namespace(
        rounds=max(options.rounds // 4, 3), megabytes=64, wan_megabytes=32, rtt=100.0, losses="0,0.01,0.02"
    )
    return dict(streams.measure(parts, wanted))


def can_measure(part: str) -> str | None:
    """Say why a part cannot be measured here, None if it can."""
    if part in ("far", "wan") and (missing := missing_tools()):
        return missing
    if part in ("streams", "wan") and importlib.util.find_spec("bench.streams") is None:
        return "there is no bench.streams in this tree"
    return None


def rows(figures: Figures) -> Iterator[tuple[str, str, float, float | None]]:
    """Yield figure, who, median, and the ratio to Node's own median of that figure."""
    medians = {key: statistics.median(values) for key, values in figures.items()}
    base = {figure: median for (figure, who), median in medians.items() if who in NODE_ALONE}
    for (figure, who), median in medians.items():
        yield figure, who, median, median / base[figure] if base.get(figure) else None


def show_table(figures: Figures) -> None:
    """Print medians and ratios."""
    print(f"{'figure':<42} {'who':<17} {'median':>10} {'to node':>8}")
    for figure, who, median, ratio in sorted(rows(figures)):
        shown = "" if ratio is None else f"{ratio:.2f}"
        print(f"{figure:<42} {who:<17} {median:>10.2f} {shown:>8}")


def show_json(figures: Figures, skipped: Mapping[str, str]) -> None:
    """Print everything, samples included."""
    listed = [
        {"figure": figure, "who": who, "median": median, "to_node": ratio, "samples": figures[figure, who]}
        for figure, who, median, ratio in rows(figures)
    ]
    print(json.dumps({"python": sys.version.split()[0], "skipped": skipped, "rows": listed}))


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tests/bench/run", description="Measure p2pclaude beside Node.")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every sample")
    parser.add_argument("--rounds", type=int, default=12, help="how often a short figure is taken (12)")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the journal that is printed (100)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to measure ({','.join(PARTS)})")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if missing := missing_node():
        print(missing, file=sys.stderr)
        return 69
    figures: Figures = {}
    skipped = {part: reason for part in wanted if (reason := can_measure(part))}
    for part, reason in skipped.items():
        print(f"{part} is left out: {reason}", file=sys.stderr)
    for part in wanted:
        if part not in skipped:
            figures.update(measure(part, options))
    if options.json:
        show_json(figures, skipped)
    else:
        show_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
