"""Make mutants of modules, and say which of them survive the modules' tests.

A module's tests are those of its file (p2pclaude/sessions/inbox.py: tests/sessions/test_inbox.py), and for what
survives them those of its folder. A survivor is a missing test, or a mutant that does the same as the module.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from mutation.mutants import Mutant, make_mutants
from mutation.plugin import LOADED_BEFORE
from mutation.runner import LEAST_SECONDS, PATIENCE, Outcome, end_all, run_tests

ROOT: Final = Path(__file__).resolve().parents[2]
USAGE_ERROR: Final = 2

PURE: Final = (  # what is looked at unless modules are named
    "p2pclaude/hyperdht/udx",
    "p2pclaude/hyperdht/encoding.py",
    "p2pclaude/hyperdht/crypto.py",
    "p2pclaude/hyperdht/expiring.py",
    "p2pclaude/hyperdht/rpc/timeouts.py",
    "p2pclaude/hyperdht/rpc/window.py",
    "p2pclaude/hyperdht/rpc/messages.py",
    "p2pclaude/hyperdht/rpc/tokens.py",
    "p2pclaude/hyperdht/peer/setup_messages.py",
    "p2pclaude/hyperdht/peer/attempt_life.py",
    "p2pclaude/hyperdht/peer/punch_throttle.py",
    "p2pclaude/hyperdht/relay/link_messages.py",
    "p2pclaude/hyperdht/relay/mux_frames.py",
    "p2pclaude/hyperdht/secure/noise.py",
    "p2pclaude/hyperdht/secure/secretstream.py",
    "p2pclaude/hyperdht/node/routing.py",
    "p2pclaude/hyperdht/node/nat.py",
    "p2pclaude/hyperdht/node/budget.py",
    "p2pclaude/hyperdht/node/forwards.py",
    "p2pclaude/hyperdht/node/health.py",
    "p2pclaude/hyperdht/storage/records.py",
    "p2pclaude/protocol",
    "p2pclaude/sessions/journalfile.py",
    "p2pclaude/sessions/seqindex.py",
    "p2pclaude/sessions/inbox.py",
    "p2pclaude/sessions/life.py",
    "p2pclaude/sessions/message_life.py",
)


class Problem(Exception):
    """Something that keeps the command from its work; its text is for whoever runs it."""


def find_modules(names: Sequence[str], root: Path) -> list[Path]:
    """Return the files of modules: paths, dotted names, or folders, without the folders in them."""
    found: list[Path] = []
    for name in names:
        path = root / name
        if not path.exists() and "/" not in name:
            path = root / name.replace(".", "/")
        if path.is_dir():
            files = sorted(file for file in path.glob("*.py") if file.name != "__init__.py")
            if not files:
                raise Problem(f"{name}: no modules in it")
            found += files
        elif (file := path if path.suffix == ".py" else path.parent / f"{path.name}.py").is_file():
            found.append(file)
        else:
            raise Problem(f"{name}: no such module; name a path, a dotted name or a folder of this tree")
    for file in found:
        if not file.resolve().is_relative_to(root.resolve()):
            raise Problem(f"{file}: not in {root}")
        if file.name == "__init__.py":
            raise Problem(f"{file.relative_to(root)}: a package's own file cannot be replaced; name its modules")
    return list(dict.fromkeys(found))


def tests_of(module: Path, root: Path) -> list[list[Path]]:
    """Return the test files of a module in two parts: its own, and the others of its folder."""
    package = module.relative_to(root).parts[0]
    folder = root / "tests" / module.relative_to(root / package).parent
    own = sorted({*folder.glob(f"test_{module.stem}.py"), *folder.glob(f"test_{module.stem}_*.py")})
    others = [file for file in sorted(folder.glob("test_*.py")) if file not in own]
    parts = [part for part in (own, others) if part]
    if not parts:
        raise Problem(f"{module.relative_to(root)}: no tests in {folder.relative_to(root)}; name some with --tests")
    return parts


def check_tests(parts: list[list[Path]], root: Path) -> list[float]:
    """Run the tests without any fault, and return how long a mutant's may take; they must pass."""
    allowed = []
    for part in parts:
        outcome = run_tests(root, part)
        if outcome.status != 0:
            last = outcome.text.strip().splitlines()[-1:] or [""]
            raise Problem(f"{part[0].parent.relative_to(root)}: tests fail without any mutant: {last[0]}")
        allowed.append(max(LEAST_SECONDS, PATIENCE * outcome.seconds))
    return allowed


def judge(module: str, mutant: Mutant, parts: list[list[Path]], allowed: list[float], root: Path) -> bool:
    """Tell whether any of a module's tests notices a mutant."""
    for part, seconds in zip(parts, allowed, strict=True):
        outcome: Outcome = run_tests(root, part, module=module, source=mutant.source, seconds=seconds)
        if outcome.status == LOADED_BEFORE:
            raise Problem(f"{module}: pytest or its plugins load it, and no mutant can take its place")
        if outcome.noticed:
            return True
    return False


def describe(path: Path, mutant: Mutant) -> Iterator[str]:
    """Yield what a mutant is, for people."""
    yield f"  {path}:{mutant.line}: {mutant.kind}"
    yield f"    - {mutant.before}"
    yield f"    + {mutant.after}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        prog="tests/mutate",
        description="Make seeded mutants of modules, and say which of them survive the modules' tests.",
        epilog="Exit status: 0 if enough mutants of each module were noticed, 1 if not, 2 for wrong usage.",
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="a path, a dotted name or a folder; the pure ones")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="mutants of each module (20)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which ones they are (1)")
    parser.add_argument("--floor", type=float, default=90.0, metavar="PERCENT", help="how many must be noticed (90)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for the tests of one mutant (5 times theirs)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at the same time")
    parser.add_argument("--tests", nargs="+", type=Path, metavar="PATH", help="tests to run instead of the module's")
    parser.add_argument("--list", action="store_true", help="show the mutants, and run nothing")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.jobs < 1:
        parser.error("--count and --jobs take numbers from 1 on")
    if options.timeout is not None and not 0 < options.timeout < math.inf:
        parser.error("--timeout takes a number of seconds above 0")
    if not 0 <= options.floor <= 100:
        parser.error("--floor takes a number from 0 to 100")
    return options


def look_at(module: Path, options: argparse.Namespace, root: Path) -> tuple[int, int]:
    """Make one module's mutants, run its tests, print what survived; return how many were noticed, of how many."""
    path = module.relative_to(root)
    try:
        mutants = make_mutants(module.read_text(encoding="utf-8"), options.count, options.seed)
    except (SyntaxError, ValueError) as error:  # and UnicodeDecodeError
        raise Problem(f"{path}: not the source of a module: {error}") from None
    if options.list:
        print(f"{path}: {len(mutants)} mutants")
        for mutant in mutants:
            print(*describe(path, mutant), sep="\n")
        return len(mutants), len(mutants)
    if not mutants:
        print(f"{path}: nothing to change in it")
        return 0, 0
    parts = [[test.resolve() for test in options.tests]] if options.tests else tests_of(module, root)
    allowed = check_tests(parts, root)
    if options.timeout is not None:
        allowed = [options.timeout] * len(parts)
    name = ".".join(path.with_suffix("").parts)
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            noticed = list(pool.map(lambda mutant: judge(name, mutant, parts, allowed, root), mutants))
        except BaseException:  # an interrupt too: the pool would wait for the runs, which are in sessions of their own
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise
    print(f"{path}: {sum(noticed)} of {len(mutants)} noticed")
    for mutant, seen in zip(mutants, noticed, strict=True):
        if not seen:
            print(*describe(path, mutant), sep="\n")
    sys.stdout.flush()
    return sum(noticed), len(mutants)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; return its exit status."""
    options = parse(arguments)
    began, counts = time.monotonic(), []
    try:
        for test in options.tests or ():
            if not test.exists():
                raise Problem(f"{test}: no such file")
        for module in find_modules(options.modules or PURE, root):
            counts.append(look_at(module, options, root))
    except Problem as problem:
        print(f"tests/mutate: {problem}", file=sys.stderr)
        return USAGE_ERROR
    noticed, made = (sum(numbers) for numbers in zip(*counts, strict=True))
    if not options.list:
        seconds = time.monotonic() - began
        print(f"{noticed} of {made} mutants noticed in {len(counts)} modules, seed {options.seed}, {seconds:.0f} s")
    return int(any(seen < options.floor / 100 * count for seen, count in counts))


def run(root: Path = ROOT) -> int:
    """Run the command as a process of its own, which ends its runs when it is interrupted or terminated."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        return main(root=root)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the last flush has no reader either
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(run())
