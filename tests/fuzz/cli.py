"""The command `tests/fuzz/run`."""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from fuzz import engine, guided
from fuzz.engine import Result
from fuzz.target import Target

DESCRIPTION = """\
Fuzz the decoders and state machines of p2pclaude. Without --seconds and --runs each target tries a small number of
inputs. With TARGET and a FILE that input alone is run."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(prog="tests/fuzz/run", description=DESCRIPTION)
    limit = made.add_mutually_exclusive_group()
    limit.add_argument("--seconds", type=float, metavar="N", help="fuzz each target for N seconds, and keep new inputs")
    limit.add_argument("--runs", type=int, metavar="N", help="try N inputs a target")
    made.add_argument("--seed", type=int, default=1, metavar="S", help="what random choices begin with (1)")
    made.add_argument("--keep", action="store_true", help="with --runs too, go on from and keep what is found")
    made.add_argument("--random", action="store_true", help="mutate at random even where atheris is installed")
    made.add_argument("--quick", action="store_true", help="without TARGET: only those quick at a million")
    made.add_argument("--list", action="store_true", help="print the targets' names")
    made.add_argument("words", nargs="*", metavar="TARGET", help="what to fuzz (all), or TARGET FILE to replay")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 when something failed, 64 for wrong usage."""
    options = parser().parse_args(arguments)
    replays = len(options.words) == 2 and Path(options.words[1]).is_file()
    atheris = None if options.random or options.list or replays else guided.load_atheris()
    with nullcontext() if atheris is None else guided.instrument(atheris):
        targets: Mapping[str, Target] = importlib.import_module("fuzz.targets").TARGETS
    if options.list:
        print("\n".join(targets))
        return 0
    words: list[str] = options.words
    if len(words) == 2 and words[0] in targets and words[1] not in targets:
        return _replay(targets[words[0]], Path(words[1]))
    if unknown := [word for word in words if word not in targets]:
        print(f"tests/fuzz/run: error: no target {unknown[0]}; --list names them", file=sys.stderr)
        return 64
    if atheris is None and not options.random:
        print("tests/fuzz/run: atheris is not installed: NO COVERAGE GUIDANCE, random mutations only", file=sys.stderr)
    failed = False
    for target in [targets[word] for word in words] or [each for each in targets.values() if _wanted(each, options)]:
        result = _run_one(atheris, target, options)
        print(result, flush=True)
        failed = failed or result.crash is not None
    return int(failed)


def _wanted(target: Target, options: argparse.Namespace) -> bool:
    return target.quick or not options.quick


def _run_one(atheris: object, target: Target, options: argparse.Namespace) -> Result:
    runs = options.runs or (None if options.seconds else target.runs)
    if atheris is not None:
        limits = {"runs": runs, "seconds": options.seconds, "seed": options.seed}
        return guided.run(atheris, target, **limits, keep=options.keep)
    return engine.run(target, runs=runs, seconds=options.seconds, seed=options.seed)


def _replay(target: Target, path: Path) -> int:
    engine.replay(target, path.read_bytes())
    print(f"{target.name}: {path} runs to its end, pid {os.getpid()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
