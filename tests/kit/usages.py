"""The commands' usage texts as data, for the tests that compare manual and completions with them."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from docopt import parse_docstring_sections, parse_options

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("daemon", "send", "tail", "ls", "stop", "approve", "ping", "node")
PERMISSION_MODES = ("default", "acceptEdits", "bypassPermissions", "plan")


@dataclass(frozen=True)
class UsageOption:
    """An option of a usage text: its names with their dashes, and whether it takes an argument."""

    names: tuple[str, ...]
    takes_argument: bool
    default: str | None


def usage_options(tool: str) -> list[UsageOption]:
    """Read a command's options from its usage text with the parser that the command itself uses."""
    text: str = importlib.import_module(f"p2pclaude.cli.{tool}").USAGE
    after = parse_docstring_sections(text).after_usage
    options = parse_options(after)
    found = [
        UsageOption(
            tuple(name for name in (option.short, option.longer) if name),
            bool(option.argcount),
            str(option.value) if option.argcount and option.value is not None else None,
        )
        for option in options
    ]
    assert found, f"p2pclaude-{tool} has no options in its usage text"
    return found


def usage_names(tool: str) -> set[str]:
    """Give every name of every option of a command: `-h`, `--help`, ..."""
    return {name for option in usage_options(tool) for name in option.names}
