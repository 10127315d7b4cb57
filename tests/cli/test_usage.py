"""Command lines: help, version, everything that is wrong with one. Nothing here reaches a network."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli.harness import ROOT, TOOLS, Shell, command, environment

from p2pclaude.protocol.pairing import Pairing, format_url

CLIENTS = tuple(tool for tool in TOOLS if tool not in ("daemon", "node"))
SESSION_TOOLS = {"tail": ["s"], "stop": ["s"]}


def plain(tool: str) -> list[str]:
    """Return a complete command line for a tool."""
    return ["@", *SESSION_TOOLS.get(tool, []), *(["text"] if tool == "send" else [])]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_goes_to_stdout(offline: Shell, tool: str) -> None:
    for flag in ("-h", "--help"):
        lines = offline.succeed(tool, flag)
        assert lines[0].startswith(f"p2pclaude-{tool}: ")
        assert any(line.startswith(f"  p2pclaude-{tool} [options]") for line in lines)
        assert all(len(line) < 80 for line in lines)
    assert offline.succeed("tail", "@", "--help") == offline.succeed("tail", "-h")


@pytest.mark.parametrize("tool", TOOLS)
def test_version_goes_to_stdout(offline: Shell, tool: str) -> None:
    [line] = offline.succeed(tool, "--version")
    assert line.startswith("p2pclaude 0.")


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_option(offline: Shell, tool: str) -> None:
    err = offline.fail(64, tool, *(plain(tool) if tool in CLIENTS else []), "--nonsense")
    assert err.startswith("Usage:\n")
    assert f"p2pclaude-{tool}: error: unknown option --nonsense\n" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("send", "an argument is missing"),
        ("tail @", "an argument is missing"),
        ("stop @", "an argument is missing"),
        ("ls", "an argument is missing"),
        ("ls @ more", "too many arguments"),
        ("tail @ s more", "too many arguments"),
        ("stop --all @ s", "too many arguments"),
        ("daemon more", "too many arguments"),
        ("tail -f -f @ s", "--follow is given twice"),
        ("tail @ s -n", "-n needs an argument"),
        ("tail @ s --after", "--after needs an argument"),
        ("tail --follow=x @ s", "--follow takes no argument"),
        ("tail -5 @ s", "unknown option -5"),
        ("tail -n x @ s", "--last needs a whole number, 0 or more"),
        ("tail -n -1 @ s", "--last needs a whole number, 0 or more"),
        ("tail -n 1.5 @ s", "--last needs a whole number, 0 or more"),
        ("tail --after=-3 @ s", "--after needs a whole number, 0 or more"),
        ("tail --after=3 -n 2 @ s", "--last and --after do not go together"),
        ("tail --meta --text @ s", "--meta and --text do not go together"),
        ("ls --json -q @", "--quiet and --json do not go together"),
        ("ls --dht -a @", "--all and --dht do not go together"),
        ("ping -c 0 @", "--count needs a whole number, 1 or more"),
        ("ping -c many @", "--count needs a whole number, 1 or more"),
        ("ping -t 0 @", "--timeout needs a number of seconds above 0"),
        ("ping -t -1 @", "--timeout needs a number of seconds above 0"),
        ("ping -t nan @", "--timeout needs a number of seconds above 0"),
        ("ping -t inf @", "--timeout needs a number of seconds above 0"),
        ("ping -t soon @", "--timeout needs a number of seconds above 0"),
        ("ping --bootstrap host @", "the nodes in --bootstrap are not HOST:PORT"),
        ("ping --bootstrap host:0 @", "the nodes in --bootstrap are not HOST:PORT"),
        ("ping --bootstrap= @", "the nodes in --bootstrap are not HOST:PORT"),
        ("send --permission-mode yolo @ hi", "--permission-mode is one of"),
        ("send -s s -C dir @ hi", "--directory is for a new session"),
        ("send -s s --model m @ hi", "--model is for a new session"),
        ("send -s s --permission-mode plan @ hi", "--permission-mode is for a new session"),
        ("send --directory= @ hi", "--directory needs an argument that is not empty"),
        ("send --lines @ hi", "--lines reads standard input"),
        ("send -s s --ask @ hi", "--ask is for a new session"),
        ("stop --turn --turn @ s", "--turn is given twice"),
        ("approve", "an argument is missing"),
        ("approve @ s more", "too many arguments"),
        ("approve --allow r --deny r @", "--allow and --deny do not go together"),
        ("approve --answer r -f @", "--answer and --follow do not go together"),
        ("approve --allow r --filter true @", "--allow and --filter do not go together"),
        ("approve -m no @", "--message goes with --deny"),
        ("approve --allow r -m no @", "--message goes with --deny"),
        ("approve --allow= @", "--allow needs an argument that is not empty"),
        ("approve --filter= @", "--filter needs an argument that is not empty"),
        ("approve --filter true --filter-timeout 0 @", "--filter-timeout needs a number of seconds above 0"),
        ("daemon --ask-timeout 0", "--ask-timeout needs a number of seconds above 0"),
        ("daemon --port 0", "--port needs a whole number, 1 or more"),
        ("daemon --port 70000", "--port needs a number up to 65535"),
        ("daemon --host localhost", "--host needs an IPv4 address"),
        ("daemon --host=", "--host needs an IPv4 address"),
        ("daemon --private --host ::1", "--host needs an IPv4 address"),
        ("daemon --private --bootstrap h:1", "--private is a network of its own"),
        ("daemon --permission-mode yolo", "--permission-mode is one of"),
        ("daemon --max-sessions 0", "--max-sessions needs a whole number, 1 or more"),
        ("daemon --refresh-interval 0", "--refresh-interval needs a number of seconds above 0"),
    ],
)
def test_a_wrong_command_line(offline: Shell, words: str, message: str) -> None:
    tool, *arguments = words.split()
    err = offline.fail(64, tool, *arguments)
    assert f"p2pclaude-{tool}: error: {message}" in err
    assert err.startswith("Usage:\n")


def test_text_that_looks_like_options(offline: Shell) -> None:
    for text in ("- an item", "-w is broken", "--no, do it"):
        err = offline.fail(64, "send", "@", text)
        assert "error: unknown option -" in err
        assert err.endswith("hint: text that begins with - goes after --, or to standard input\n")


def test_a_wrong_bootstrap_in_the_environment_is_named(offline: Shell) -> None:
    err = offline.fail(64, "ping", "@", env={"P2P_CLAUDE_BOOTSTRAP": "nonsense"})
    assert "P2P_CLAUDE_BOOTSTRAP are not HOST:PORT" in err


@pytest.mark.parametrize("tool", CLIENTS)
@pytest.mark.parametrize("url", ["p2p-claude://connect?code=AAAA", "http://example.org/", "p2p-claude://connect?code="])
def test_a_malformed_url(offline: Shell, tool: str, url: str) -> None:
    words = [url if word == "@" else word for word in plain(tool)]
    assert "pairing URL" in offline.fail(65, tool, *words)


def test_a_url_whose_public_key_is_none(offline: Shell) -> None:
    """Thirty-two bytes that are no point of the curve: whoever reads that has to copy the URL again."""
    url = format_url(Pairing(b"\x07" * 32, bytes(32), {"bootstrap": ["127.0.0.1:1"]}))
    err = offline.fail(65, "ls", url)
    assert "error: the pairing URL holds no usable public key\n" in err


def test_a_pairing_file(offline: Shell) -> None:
    path = offline.work / "pairing"
    assert "no such file" in offline.fail(65, "ls", "missing")
    assert "is a directory" in offline.fail(65, "ls", ".")
    path.write_bytes(b"\xff\xfe")
    assert "not text" in offline.fail(65, "ls", "pairing")
    path.write_text("something else\n")
    assert "not a pairing URL" in offline.fail(65, "ls", "pairing")
    path.chmod(0o644)
    assert "hint: other users can read" in offline.fail(65, "ls", "pairing")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the message is empty"),
        (b" \n\t\n", "the message is empty"),
        (b"caf\xe9\n", "the message is not UTF-8 (at byte 4)"),
        (b"\xe2\x82", "the message is not UTF-8 (at byte 1)"),
        (b"x" * (4 << 20) + b"y", "the message is longer than 4 MiB"),
    ],
    ids=["empty", "blank", "latin-1", "half a character", "too long"],
)
def test_a_message_that_cannot_be_sent(offline: Shell, data: bytes, message: str) -> None:
    assert message in offline.fail(65, "send", "@", text=data)


def test_an_empty_text_is_not_read_from_stdin(offline: Shell) -> None:
    assert "the message is empty" in offline.fail(65, "send", "@", "", text="from stdin")


def test_stdin_that_is_closed(offline: Shell) -> None:
    line = shlex.join(command("send", offline.url)) + " <&-"
    env = environment(offline.work / "home")
    result = subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (65, "")
    assert "no message" in result.stderr


def test_stdin_that_cannot_be_read(offline: Shell) -> None:
    with Path(os.devnull).open("wb") as only_written:  # what nohup gives, too
        for options in ([], ["--lines"]):
            err = offline.fail(74, "send", *options, "@", stdin=only_written)
            assert "error: input or output failed: bad file descriptor\n" in err


def test_words_for_a_stderr_that_is_closed_are_not_data(offline: Shell) -> None:
    for words in ("--nonsense", "missing"):
        line = shlex.join(command("ls", words)) + " 2>&-"
        env = environment(offline.work / "home")
        result = subprocess.run(["sh", "-c", line], env=env, stdout=subprocess.PIPE, text=True, timeout=60)
        assert result.returncode in (64, 65)
        assert result.stdout == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_takes_a_part_is_full(tmp_path: Path, unbuffered: str) -> None:
    script = """
import os, resource, sys
from p2pclaude.cli.common import OutputError, write_lines
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    write_lines([b"x" * 3000])
except OutputError as error:
    print(error, file=sys.stderr, flush=True)
os._exit(0)
"""
    env = environment(tmp_path, {"PYTHONUNBUFFERED": unbuffered})
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.run(
            [sys.executable, "-c", script], env=env, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert process.stderr == "cannot write: file too large\n"


@pytest.mark.parametrize("tool", TOOLS)
def test_a_usage_error_loads_no_network(tool: str) -> None:
    script = (
        f"import sys; from p2pclaude.cli.{tool} import main\n"
        "status = main(['--nonsense'])\n"
        "heavy = {'asyncio', 'cryptography', 'nacl', 'p2pclaude.hyperdht', 'ssl', 'subprocess'} & set(sys.modules)\n"
        "sys.exit(f'{status} {sorted(heavy)}' if heavy or status != 64 else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_printing_the_url_makes_the_identity_once(tmp_path: Path) -> None:
    here = Shell(tmp_path, "")
    [url] = here.succeed("daemon", "--print-url")
    assert here.succeed("daemon", "--print-url") == [url]
    assert url.startswith("p2p-claude://connect?code=")
    assert here.succeed("daemon", "--print-url", "--data-dir", "other") != [url]
    assert (tmp_path / "other" / "dht-keypair.json").stat().st_mode & 0o777 == 0o600
