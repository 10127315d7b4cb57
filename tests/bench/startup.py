"""Where the start of a one-shot goes: the share of every group of modules, and of what follows the imports.

    PYTHONPATH=.:tests python -m bench.startup [--rounds N]

Starts `p2pclaude-ls` against a daemon that is not there with -X importtime, takes the least of the rounds for every
module, and prints the groups, the most expensive first.
"""

import argparse
import re
import resource
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

from bench.oneshots import installed_tools, plain_environment

from p2pclaude.hyperdht import KeyPair
from p2pclaude.protocol.pairing import Pairing, format_url

_LINE = re.compile(r"import time: +(\d+) \| +\d+ \| *(\S+)")


def import_ms(argv: Sequence[str], env: Mapping[str, str]) -> dict[str, float]:
    """Return the milliseconds that each module took by itself."""
    done = subprocess.run(argv, env=env, check=False, capture_output=True, text=True)
    return {name: int(microseconds) / 1000 for microseconds, name in _LINE.findall(done.stderr)}


def group_of(module: str) -> str:
    """Return what a module is counted under: a package of ours, or the top of any other."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "p2pclaude" else parts[0]


def processor_ms(argv: Sequence[str], env: Mapping[str, str]) -> float:
    """Run a command and return the processor time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, env=env, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.startup", description="Where the start of a one-shot goes.")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is taken (7)")
    rounds = range(parser.parse_args().rounds)
    url = format_url(Pairing(KeyPair.from_seed(bytes(32)).public_key, bytes(32), {"bootstrap": ["127.0.0.1:9"]}))
    env = plain_environment("127.0.0.1:9")
    with installed_tools() as tools:
        python = str(tools / "python")
        ls = [str(tools / "p2pclaude-ls"), "--timeout", "0.05", url]
        samples = [import_ms([python, "-X", "importtime", *ls], env) for _ in rounds]
        whole = {
            "the interpreter alone": [python, "-c", "pass"],
            "ls --version (docopt)": [python, ls[0], "--version"],
            "ls, daemon not found": [python, *ls],
        }
        processor = {what: [processor_ms(argv, env) for _ in rounds] for what, argv in whole.items()}
    least = {name: min(sample.get(name, float("inf")) for sample in samples) for name in samples[0]}
    groups: dict[str, float] = defaultdict(float)
    for name, spent in least.items():
        groups[group_of(name)] += spent
    print(f"{len(least)} modules, {sum(least.values()):.1f} ms in all (with the cost of measuring)")
    for group, spent in sorted(groups.items(), key=lambda item: -item[1])[:25]:
        print(f"{spent:8.2f} ms  {group}")
    for what, times in processor.items():
        print(f"{statistics.median(times):8.1f} ms of processor time  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
