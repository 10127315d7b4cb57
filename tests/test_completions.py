"""Completions for bash, zsh and fish: they load in the real shells and offer what the usage texts name."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from kit.usages import PERMISSION_MODES, ROOT, TOOLS, usage_names, usage_options

COMPLETIONS = ROOT / "completions"


def command_of(tool: str) -> str:
    """Give a tool's command name."""
    return f"p2pclaude-{tool}"


def shell(name: str) -> str:
    """Find a shell; skips the test where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: its completions are not tested")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty home and a directory to complete in: one file, one directory."""
    (tmp_path / "home").mkdir()
    work = tmp_path / "work"
    (work / "folder").mkdir(parents=True)
    (work / "pairing.url").write_text("")
    bin_dir = tmp_path / "bin"  # fish completes commands that exist only
    bin_dir.mkdir()
    for tool in TOOLS:
        (bin_dir / command_of(tool)).touch(0o755)
    monkeypatch.setenv("PATH", str(bin_dir), prepend=os.pathsep)
    for name in [name for name in os.environ if name.startswith(("XDG_", "ZDOTDIR", "FPATH"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    return work


def ask_bash(place: Path, words: Sequence[str]) -> set[str]:
    """Complete the last word as bash does: source the file, call its function, read COMPREPLY."""
    script = """
        set -u
        source "$1"
        shift
        entry=$(complete -p "$1")
        entry=${entry##*-F }
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE=$* COMP_POINT=${#COMP_LINE}
        "${entry%% *}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    source = COMPLETIONS / "bash" / words[0]
    command = [shell("bash"), "--norc", "-c", script, "bash", str(source), *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return {line for line in done.stdout.splitlines() if line}


def ask_fish(place: Path, words: Sequence[str]) -> set[str]:
    """Complete a command line with fish, which finds the file by the command's name."""
    script = "set fish_complete_path $argv[1]; complete -C (string join ' ' -- $argv[2..])"
    command = [shell("fish"), "--no-config", "-c", script, str(COMPLETIONS / "fish"), *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return {line.partition("\t")[0].rstrip("/") for line in done.stdout.splitlines()}


class Zsh:
    """An interactive zsh on a pseudo terminal; what its completion system adds is written to a file as well."""

    SETUP = r"""
        stty -echo; PROMPT= RPROMPT= LISTMAX=0
        fpath=($COMPLETIONS $fpath); autoload -Uz compinit; compinit -u -d $HOME/.zcompdump
        bindkey '^I' complete-word
        # Keys count only when the line editor listens; what it has done is over when the next key is read.
        zle-line-init() { print -n '<listening>' }
        finish() { BUFFER=; print -n '<finished>' }
        zle -N zle-line-init; zle -N finish; bindkey '^U' finish
        compadd() {
            if [[ " $* " != *" -"[OAD]" "* ]]; then
                local -a found
                builtin compadd -A found "$@"
                print -rl -- $found >>$MATCHES
            fi
            builtin compadd "$@"
        }
    """

    def __init__(self, place: Path) -> None:
        path = shell("zsh")
        self.matches = place.parent / "matches"
        setup = place.parent / "setup.zsh"
        setup.write_text(self.SETUP)
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.chdir(place)
            environment = {**os.environ, "COMPLETIONS": str(COMPLETIONS / "zsh"), "MATCHES": str(self.matches)}
            os.execve(path, [path, "-f", "-i"], environment)
        self._send(f"source {shlex.quote(str(setup))}\n", "<listening>")

    def ask(self, words: Sequence[str]) -> set[str]:
        """Type a command line and a tab; return what zsh offers."""
        self.matches.write_text("")
        self._send(" ".join(words) + "\t\x15", "<finished>")
        return {line.rstrip("/") for line in self.matches.read_text().splitlines() if line}

    def _send(self, keys: str, awaited: str) -> None:
        os.write(self.terminal, keys.encode())
        text, deadline = "", time.monotonic() + 60
        while awaited not in text:
            assert time.monotonic() < deadline, f"zsh did not answer; it printed {text!r}"
            if select.select([self.terminal], [], [], 1.0)[0]:
                text += os.read(self.terminal, 65536).decode(errors="replace")

    def close(self) -> None:
        """End the shell."""
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture
def zsh(place: Path) -> Iterator[Zsh]:
    """Start a zsh with the completions on its function path."""
    running = Zsh(place)
    yield running
    running.close()


Ask = Callable[[Sequence[str]], set[str]]


@pytest.fixture(params=["bash", "zsh", "fish"])
def ask(request: pytest.FixtureRequest, place: Path) -> Ask:
    """Give the way to ask a shell for completions of the last of some words."""
    if request.param == "zsh":
        running: Zsh = request.getfixturevalue("zsh")
        return running.ask
    return partial(ask_bash if request.param == "bash" else ask_fish, place)


def test_every_option_is_offered(ask: Ask) -> None:
    """A dash brings exactly the options of the usage text: shells that split them by kind are asked for both kinds."""
    for tool in TOOLS:
        offered = ask([command_of(tool), "-"]) | ask([command_of(tool), "--"])
        assert offered == usage_names(tool), tool


def test_permission_modes_are_offered(ask: Ask) -> None:
    """Both spellings of an option with a value are completed."""
    for tool in ("daemon", "send"):
        assert ask([command_of(tool), "--permission-mode", ""]) == set(PERMISSION_MODES)
        assert ask([command_of(tool), "--permission-mode", "by"]) == {"bypassPermissions"}


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in ("daemon", "node")])
def test_the_url_is_a_file(ask: Ask, tool: str) -> None:
    """Where the pairing URL stands, files are offered."""
    assert ask([command_of(tool), "pair"]) == {"pairing.url"}


def test_directories(ask: Ask) -> None:
    """Options that want a directory are given directories only."""
    for tool, option in (("send", "-C"), ("daemon", "-r"), ("daemon", "--root-dir"), ("daemon", "--data-dir")):
        offered = ask([command_of(tool), option, ""])
        assert "folder" in offered, option
        assert "pairing.url" not in offered, option


@pytest.mark.parametrize(("tool", "option"), [("daemon", "--claude"), ("node", "--key-file"), ("approve", "--filter")])
def test_files(ask: Ask, tool: str, option: str) -> None:
    """--claude and --filter want a program, --key-file a file."""
    assert ask([command_of(tool), option, "pair"]) == {"pairing.url"}


def test_other_values_are_not_guessed(ask: Ask) -> None:
    """After an option whose value only the user knows nothing is offered, least of all files."""
    for tool in TOOLS:
        for option in usage_options(tool):
            if not option.takes_argument or set(option.names) & OFFERED:
                continue
            for name in option.names:
                assert ask([command_of(tool), name, ""]) == set(), (tool, name)


OFFERED = {"--permission-mode", "--model", "--root-dir", "--data-dir", "--directory"}  # values of a known kind
OFFERED |= {"--claude", "--key-file", "--filter"}


def test_bash_takes_values_after_an_equals_sign(place: Path) -> None:
    """Bash hands over --option=value as three words."""
    assert ask_bash(place, ["p2pclaude-send", "--permission-mode", "=", "pl"]) == {"plan"}
    assert ask_bash(place, ["p2pclaude-send", "--permission-mode", "="]) == set(PERMISSION_MODES)


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_syntax(name: str) -> None:
    """Every file passes its shell's own syntax check."""
    files = sorted((COMPLETIONS / name).iterdir())
    assert files
    for path in files:
        done = subprocess.run([shell(name), "-n", str(path)], capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, ""), path


def test_zsh_serves_every_command() -> None:
    """The one file of zsh names all commands in its first line."""
    first = (COMPLETIONS / "zsh" / "_p2pclaude").read_text().splitlines()[0]
    assert first.split() == ["#compdef", *map(command_of, TOOLS)]
