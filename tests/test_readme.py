"""README.md and tests/README.md tell the truth: their commands, options, paths and example are real."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from kit.free_ports import free_port
from kit.usages import ROOT, TOOLS, usage_names

README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_TESTS = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


def shell_lines() -> list[str]:
    """Give the lines that a reader is meant to type: the indented blocks that run something."""
    blocks = re.findall(r"(?:^    .*\n)+", README, re.M)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_the_two_commands_come_first() -> None:
    """The first block starts a daemon in a private network, the second passes the tests."""
    first, second = shell_lines()[:2]
    assert first == "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/p2pclaude-daemon --private"
    assert second == "tests/run"
    assert (ROOT / second).stat().st_mode & 0o111


def test_options_exist() -> None:
    """Each option of a command in the text is one that the command has."""
    found = 0
    for command in re.findall(r"p2pclaude-(?:\w+)[^`|)\n]*", README):
        words = shlex.split(command.replace("$(", " ").split("#")[0], posix=False)
        tool = words[0].removeprefix("p2pclaude-")
        assert tool in TOOLS, command
        given = {word.rstrip(",.;:") for word in words[1:] if word.startswith("-")}
        assert given <= usage_names(tool), command
        found += len(given)
    assert found > 5


def test_the_transcript_is_one_of_these_commands() -> None:
    """It runs the commands of the tour, and shows something for each."""
    (transcript,) = re.findall(r"```console\n(.*?)```", README, re.S)
    typed = [line for line in transcript.splitlines() if line.startswith("$ ")]
    assert {tool for tool in TOOLS if any(f"p2pclaude-{tool} " in line for line in typed)} == {
        "send", "tail", "approve", "stop",
    }  # fmt: skip
    assert len(transcript.splitlines()) > 2 * len(typed)


def test_paths_exist() -> None:
    """What the text names in the tree is there; names in capitals and folders of the package stand for others."""
    paths = set(re.findall(r"(?<![\w/.-])((?:tests|p2pclaude)/[\w./]*\w)", README + OF_TESTS))
    paths |= set(re.findall(r"\]\(([\w./]+)\)", README))
    paths |= {f"tests/{name}" for name in re.findall(r"^\| `(\w+/)` \|", OF_TESTS, re.M)}
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


KINDS = sorted(set(re.findall(r"tests/((?:soak|fuzz|bench)/\w+|mutate|draw)\b(?!\.)", OF_TESTS)))


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_test_has_a_help(name: str) -> None:
    """Each is a command of its own with `--help`."""
    environ = os.environ | {"PYTHON": sys.executable}
    command = [str(ROOT / "tests" / name), "--help"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


def test_exit_statuses_are_those_of_the_errors() -> None:
    """The table has a row for each status that an error carries."""
    source = (ROOT / "p2pclaude" / "errors.py").read_text(encoding="utf-8")
    statuses = set(re.findall(r"exit_status = (\d+)", source))
    assert statuses <= set(re.findall(r"^\| (\d+) \|", README, re.M))


def test_the_example_runs() -> None:
    """The library's example prints what the text says, on a port that is free."""
    code, said = re.findall(r"```python\n(.*?)```\n\nIt prints `(.*?)`", README, re.S)[0]
    assert code.count("40000") == 2
    command = [sys.executable, "-W", "error", "-c", code.replace("40000", str(free_port()))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr, done.stdout.strip()) == ("", said)
