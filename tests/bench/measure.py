"""Measure p2pclaude beside Node: both kinds of peers in turn, on one network, in one run.

Usage: tests/bench/run [--json] [--rounds N] [--seconds N] [--only PART,...]

Prints a table (with --json one object with every sample). Each figure is the median of the rounds; the ratio is to the
same figure of Node alone, of the same run. Pairings of streams read SERVER < CLIENT. A part that is not done after so
many seconds is broken off, and what it has is printed; its rounds go through all its figures, so there is something of
each. The parts:

    near      one-shots on loopback, and an idle daemon
    crowd     1, 10 and 100 one-shots at once
    tail      a long journal
    far       100 ms between two hosts and 50 ms to the DHT (as root, in network namespaces)
    streams   bulk and round trips on loopback
    fair      four downloads at once, and an idle connection
    wan       bulk over 100 ms with loss (as root)

Nothing here is a threshold: it shows where we stand.
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from bench import oneshots, streams
from bench.oneshots import Samples
from interop.harness import missing_node
from nat.lab import missing_tools

Figures = dict[tuple[str, str], list[float]]
"""Samples by figure and by who was measured."""

NODE_ALONE: Final = ("node", "node < node")
STREAM_MEGABYTES: Final = 64
WAN_MEGABYTES: Final = 32


def _streams(options: argparse.Namespace) -> Samples:
    with streams.testnet() as peers:
        yield from streams.loopback(peers, _fewer(options), STREAM_MEGABYTES)


def _fair(options: argparse.Namespace) -> Samples:
    with streams.testnet() as peers:
        yield from streams.idle(peers)
        yield from streams.fairness(peers, _fewer(options), STREAM_MEGABYTES)


def _fewer(options: argparse.Namespace) -> int:
    """Return how often a long figure is taken."""
    return max(int(options.rounds) // 4, 1)


PARTS: Final[Mapping[str, Callable[[argparse.Namespace], Samples]]] = {
    "near": lambda options: oneshots.near(options.rounds),
    "crowd": lambda options: oneshots.crowd(_fewer(options)),
    "tail": lambda options: oneshots.tail(_fewer(options), options.megabytes),
    "far": lambda options: oneshots.far(options.rounds),
    "streams": _streams,
    "fair": _fair,
    "wan": lambda options: streams.wan(_fewer(options), WAN_MEGABYTES),
}


class OutOfTimeError(BaseException):
    """The part takes too long. Not an Exception, so that nothing on the way takes it for a failure."""


def take(samples: Samples, seconds: int) -> tuple[Figures, bool]:
    """Collect samples for so many seconds; tell whether that was all."""

    def out_of_time(*_: object) -> None:
        raise OutOfTimeError

    figures: Figures = defaultdict(list)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        with contextlib.closing(samples):
            for key, value in samples:
                figures[key].append(value)
    except OutOfTimeError:
        return figures, False
    finally:
        signal.alarm(0)
    return figures, True


def can_measure(part: str) -> str | None:
    """Say why a part cannot be measured here, None if it can."""
    return missing_tools() if part in ("far", "wan") else None


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
    parser.add_argument("--seconds", type=int, default=1800, help="how long a part may take (1800)")
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
            found, is_done = take(PARTS[part](options), options.seconds)
            figures.update(found)
            if not is_done:
                print(f"{part} was broken off after {options.seconds} s", file=sys.stderr)
    if options.json:
        show_json(figures, skipped)
    else:
        show_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
