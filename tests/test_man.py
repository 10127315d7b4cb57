"""The manual: it passes mandoc's checks and says what the programs say."""

import ast
import configparser
import importlib
import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kit.usages import PERMISSION_MODES, ROOT, TOOLS, usage_names, usage_options

from p2pclaude.cli import approve, daemon, filters, send
from p2pclaude.cli.common import Console, parse_arguments
from p2pclaude.daemon import presence, service
from p2pclaude.daemon.daemon import SHUTDOWN_SECONDS
from p2pclaude.daemon.methods import Methods
from p2pclaude.host import log
from p2pclaude.host import systemd as notify
from p2pclaude.hyperdht.peer import server, slots
from p2pclaude.hyperdht.relay import relay_server
from p2pclaude.protocol import wire
from p2pclaude.sessions import claude
from p2pclaude.sessions.table import SessionTable

MAN = ROOT / "man"
PAGES = sorted(MAN.iterdir())
SECTIONS = [
    "NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "ENVIRONMENT", "FILES", "EXIT STATUS", "EXAMPLES", "DIAGNOSTICS",
    "SEE ALSO", "SECURITY",
]  # fmt: skip


def page(name: str) -> str:
    """Read a page's source."""
    return (MAN / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """Cut a section out of a page's source."""
    found = re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", text, re.M | re.S)
    assert found, f"no section {title}"
    return found[1]


def rendered(text: str) -> str:
    """Take the macros out of a piece of mdoc, so that words stand beside each other as a reader sees them."""
    lines = [re.sub(r"^\.(?:It )?[A-Z][a-z] ", "", line) for line in text.splitlines()]
    return re.sub(r" ([.,;:])", r"\1", " ".join(lines))


def documented_options(text: str) -> set[str]:
    """Give the options that a page's list of options names, with their dashes."""
    items = re.findall(r"^\.It (Fl .*)$", section(text, "OPTIONS"), re.M)
    found = set()
    for item in items:
        names = [alternative.removeprefix("Fl ").split()[0] for alternative in item.split(" , ")]
        found |= {f"-{name}" for name in names if name != "Ns"}
    return found


def test_there_is_a_page_for_each_command() -> None:
    """One page a command, and one for the protocol."""
    assert {path.name for path in PAGES} == {"p2pclaude.7", *(f"p2pclaude-{tool}.1" for tool in TOOLS)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_lint(path: Path) -> None:
    """Nothing that mandoc would warn of."""
    mandoc = shutil.which("mandoc")
    if mandoc is None:
        pytest.skip("mandoc is not installed: the man pages are not checked")
    done = subprocess.run(
        [mandoc, "-T", "lint", "-W", "warning", str(path)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("tool", TOOLS)
def test_sections(tool: str) -> None:
    """Every page has the same sections in the same order; CAVEATS may come in between."""
    found = re.findall(r"^\.Sh (.*)$", page(f"p2pclaude-{tool}.1"), re.M)
    assert [title for title in found if title != "CAVEATS"] == SECTIONS


@pytest.mark.parametrize("tool", TOOLS)
def test_options(tool: str) -> None:
    """The page names exactly the options of the usage text."""
    assert documented_options(page(f"p2pclaude-{tool}.1")) == usage_names(tool)


@pytest.mark.parametrize("tool", TOOLS)
def test_options_of_the_synopsis(tool: str) -> None:
    """The synopsis has every option in its short form if it has one, but those for help and version."""
    synopsis = section(page(f"p2pclaude-{tool}.1"), "SYNOPSIS")
    words = {words.split()[0] for words in re.findall(r"(?:Fl|\|) (?!Fl)(\S+)", synopsis)}
    wanted = {option.names[0][1:] for option in usage_options(tool)} - {"h", "-version"}
    assert words == wanted


@pytest.mark.parametrize("tool", TOOLS)
def test_defaults(tool: str) -> None:
    """A default that stands in the usage text stands beside the option in the page."""
    text = section(page(f"p2pclaude-{tool}.1"), "OPTIONS")
    for option in usage_options(tool):
        if option.default is not None:
            name = re.escape(option.names[-1][1:])
            found = re.search(rf"^\.It Fl .*(?<= ){name}\b.*\n((?:(?!\.It ).*\n)*)", text, re.M)
            assert found, option
            assert f"The default is {option.default}" in rendered(found[1]), option


def test_permission_modes() -> None:
    """Both pages that offer a permission mode name all of them."""
    for tool in ("daemon", "send"):
        text = section(page(f"p2pclaude-{tool}.1"), "OPTIONS")
        for mode in PERMISSION_MODES:
            assert re.search(rf"^\.Cm {mode}\b", text, re.M), (tool, mode)
    assert claude.PERMISSION_MODES == PERMISSION_MODES


def test_exit_statuses() -> None:
    """Each status that a usage text names stands in the page, and those of errors.py in the page of a tool."""
    everywhere: set[str] = set()
    for tool in TOOLS:
        listed = set(re.findall(r"^\.It (\d+)$", section(page(f"p2pclaude-{tool}.1"), "EXIT STATUS"), re.M))
        usage = (ROOT / "p2pclaude" / "cli" / f"{tool}.py").read_text(encoding="utf-8")
        named = re.search(r"^Exit status: (.*?)\n\n|^Exit status: (.*?)\"\"\"", usage, re.M | re.S)
        assert named, tool
        assert set(re.findall(r"\b(\d+)\s", named[0])) <= listed, tool
        everywhere |= listed
    errors = (ROOT / "p2pclaude" / "errors.py").read_text(encoding="utf-8")
    assert set(re.findall(r"exit_status = (\d+)", errors)) <= everywhere


def enum_members(path: str, name: str) -> dict[str, str]:
    """Read a StrEnum's values, each with the docstring below it, without importing its module."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.Assign):
            doc = after.value if isinstance(after, ast.Expr) else None
            found[str(ast.literal_eval(node.value))] = str(ast.literal_eval(doc)) if doc else ""
    return found


def documented_fields(doc: str) -> set[str]:
    """Read the fields from an event's docstring."""
    fields = doc.removeprefix("Debug: ").partition(": ")[2]
    fields = re.sub(r"\([^)]*\)", "", fields).partition(".")[0]
    return {field.strip() for field in fields.split(",") if field.strip()}


@pytest.mark.parametrize(("tool", "name"), [("daemon", "Event"), ("node", "NodeEvent")])
def test_log_events(tool: str, name: str) -> None:
    """A page lists exactly the events that its program logs, each with its fields."""
    text = section(page(f"p2pclaude-{tool}.1"), "DIAGNOSTICS")
    events = enum_members("p2pclaude/host/log.py", name)
    items = dict(re.findall(r"^\.It Cm (\S+)\n((?:(?!\.It |\.El).*\n)*)", text, re.M))
    assert set(items) == set(events)
    for event, doc in events.items():
        assert set(re.findall(r"^\.Cm (\w+)", items[event], re.M)) == documented_fields(doc), event


def logged_fields() -> dict[str, set[str]]:
    """Read from the source which fields each event is logged with, by `Event.NAME` or `NodeEvent.NAME`."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "p2pclaude").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            event = ast.unparse(call.args[0]) if isinstance(call, ast.Call) and call.args else ""
            if isinstance(call, ast.Call) and event.startswith(("Event.", "NodeEvent.")):
                fields = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
                found.setdefault(event, set()).update(fields)
    return found


@pytest.mark.parametrize("enum", [log.Event, log.NodeEvent])
def test_log_fields(enum: type[log.Event | log.NodeEvent]) -> None:
    """An event's documented fields are those that it is logged with, no more and no fewer."""
    docs, logged = enum_members("p2pclaude/host/log.py", enum.__name__), logged_fields()
    for member in enum:
        name = f"{enum.__name__}.{member.name}"
        if name in logged:  # for the others, call or event are chosen at run time
            assert logged[name] == documented_fields(docs[member.value]), name


def test_session_states() -> None:
    """p2pclaude-ls(1) explains exactly the states that there are."""
    text = section(page("p2pclaude-ls.1"), "DESCRIPTION")
    states = enum_members("p2pclaude/sessions/life.py", "State")
    assert set(re.findall(r"^\.It Cm (\w+)", text, re.M)) == set(states)


LIMITS = {  # in p2pclaude-daemon(1): module, constant, unit, and how the page says it
    ("protocol.wire", "MAX_REQUEST_LINE", 1 << 20, "{} MiB, on one line"),
    ("sessions.claude", "MAX_LINE", 1 << 20, "{} MiB; a longer one ends Claude"),
    ("sessions.session", "MAX_QUEUED", 1, "{} a session"),
    ("sessions.launcher", "DEFAULT_MAX_SESSIONS", 1, "{}, or what -max-sessions says"),
    ("sessions.table", "MAX_TEXT_FIELD", 1, "{} characters"),
    ("sessions.table", "MAX_WAIT_MS", 1000, "{} seconds"),
    ("sessions.table", "MAX_UNMARKED", 1, "and, unless it clears, {} objects"),
    ("sessions.table", "MAX_UNMARKED_BYTES", 1 << 20, "for a client that asks without after {} MiB"),
    ("sessions.journalfile", "PAGE_BYTES", 1 << 10, "{} KiB, but one object at least"),
    ("protocol.permissions", "MAX_PENDING", 1, "{} a session, of"),
    ("protocol.permissions", "MAX_REQUEST_BYTES", 1 << 20, "of {} MiB each"),
    ("protocol.permissions", "MAX_ANSWERED", 1, "remembered, {} a session"),
    ("protocol.permissions", "MAX_LIST_BYTES", 1 << 20, "{} MiB, but one request at least"),
    ("daemon.service", "MAX_CONNECTIONS", 1, "{}; a new one beyond that is broken off"),
    ("daemon.service", "MAX_UNPROVEN", 1, "{}, for"),
    ("daemon.service", "PROVE_SECONDS", 1, "for {} seconds each"),
    ("daemon.service", "MAX_UNPROVEN_ERRORS", 1, "with {} error answers each"),
    ("daemon.service", "MAX_UNPROVEN_BYTES", 1 << 20, "{} MiB of unfinished lines together"),
    ("daemon.service", "MAX_IN_FLIGHT", 1, "{} a connection, and"),
    ("daemon.service", "MAX_IN_FLIGHT_BYTES", 1 << 20, "and {} MiB of them"),
}
UNLISTED = {  # nobody outside can tell
    ("sessions.table", "MAX_OPEN_JOURNALS"),
    ("protocol.permissions", "MAX_NAME_CHARS"),
}


@pytest.mark.parametrize(("module", "name", "unit", "sentence"), sorted(LIMITS))
def test_limits(module: str, name: str, unit: int, sentence: str) -> None:
    """The limits in the page are those of the code."""
    value = getattr(importlib.import_module(f"p2pclaude.{module}"), name)
    text = rendered(section(page("p2pclaude-daemon.1"), "SECURITY"))
    assert re.search(rf"(?<!\d){re.escape(sentence.format(f'{value / unit:g}'))}", text)


@pytest.mark.parametrize("module", ["daemon.service", "sessions.session", "sessions.table", "protocol.permissions"])
def test_limits_are_complete(module: str) -> None:
    """Each cap of the modules that face other people stands in the page."""
    names = {name for name in vars(importlib.import_module(f"p2pclaude.{module}")) if name.startswith("MAX_")}
    path = ROOT.joinpath("p2pclaude", *module.split(".")).with_suffix(".py")
    own = set(re.findall(r"^(MAX_\w+)", path.read_text(encoding="utf-8"), re.M))
    assert not {(module, name) for name in names & own} - {limit[:2] for limit in LIMITS} - UNLISTED


def test_limits_of_handshakes() -> None:
    """Those of the library are named too."""
    text = rendered(section(page("p2pclaude-daemon.1"), "SECURITY"))
    assert f"{server.HANDSHAKES_OF_ALL:g} a second, {server.HANDSHAKES_OF_HOST:g} of them from one address" in text
    assert f"{slots.MAX_PENDING} clients whose first packet has not come" in text
    assert f"looked at every {service.WEIGH_SECONDS:g} seconds" in text


def daemon_command(words: list[str]) -> None:
    """Check that a command line of a page is one that the daemon takes."""
    arguments = parse_arguments(daemon.USAGE, words)
    assert isinstance(arguments, dict)
    daemon.parse(arguments, Console("p2pclaude-daemon"))


def test_the_unit_and_the_agent(tmp_path: Path) -> None:
    """What systemd and launchd are given is well-formed, names options that there are, and fits the daemon."""
    displays = re.findall(r"^\.Bd .*?\n(.*?)^\.Ed", section(page("p2pclaude-daemon.1"), "EXAMPLES"), re.M | re.S)
    (unit_text,) = [display for display in displays if "[Service]" in display]
    (agent,) = [display for display in displays if "<plist" in display]
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(unit_text)
    service_part = unit["Service"]
    program, *words = service_part["ExecStart"].replace("%h", str(tmp_path)).split()
    assert program.endswith("/bin/p2pclaude-daemon")
    daemon_command(words)
    assert service_part["Type"] == "notify"
    assert float(service_part["WatchdogSec"]) / notify.PINGS < presence.ALIVE_SECONDS
    assert float(service_part["TimeoutStopSec"]) > SHUTDOWN_SECONDS
    assert unit["Install"]["WantedBy"] == "default.target"
    values = plistlib.loads(agent.encode())
    assert values["ProgramArguments"][0].endswith("/bin/p2pclaude-daemon")
    daemon_command(values["ProgramArguments"][1:])
    assert values["ExitTimeOut"] > SHUTDOWN_SECONDS


def test_limits_of_the_relay() -> None:
    """What p2pclaude-node(1) says of the relay's limits is what the relay does."""
    security = rendered(section(page("p2pclaude-node.1"), "SECURITY"))
    options = rendered(section(page("p2pclaude-node.1"), "OPTIONS"))
    limits = relay_server.RelayLimits()
    assert f"{limits.pairs} links and wishes for links a connection" in security
    assert f"{relay_server.WAIT_SECONDS:g} seconds for the other peer" in security
    assert f"{relay_server.IDLE_SECONDS:g} seconds for a connection" in security
    for number in (limits.connections, limits.links):
        assert f"The default is {number}." in options


ENVELOPES = {"OUTPUT", "MESSAGE", "TURN", "TURN_CUT", "NOTE", "PERMISSION_REQUEST", "PERMISSION_ANSWER"}


def test_limits_of_the_tools() -> None:
    """What a tool refuses for its length stands in its page, and the longest id in the protocol's."""
    description = rendered(section(page("p2pclaude-send.1"), "DESCRIPTION"))
    assert f"as one message, of {send.MAX_MESSAGE_BYTES >> 20} MiB at most" in description
    text = rendered(page("p2pclaude-approve.1"))
    assert f"on the standard input, of {approve.MAX_ANSWER_BYTES >> 20} MiB at most" in text
    assert f"or more than {filters.MAX_OUTPUT_BYTES >> 20} MiB." in text
    assert f"{wire.MAX_ID_CHARS} characters at most" in section(page("p2pclaude.7"), "FRAMING")


def test_environment() -> None:
    """Each variable that the application looks at stands in a page."""
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    for path in (ROOT / "p2pclaude").rglob("*.py"):
        for name in re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text(encoding="utf-8")):
            assert re.search(rf"\bEv (?:\w+ , )*{name}\b", text) or name == "HOME", (path.name, name)


def test_the_collecting_example(tmp_path: Path) -> None:
    """p2pclaude-tail(1)'s collection piece by piece begins by itself and goes on where the last time ended."""
    displays = re.findall(r"^\.Bd .*?\n(.*?)^\.Ed", section(page("p2pclaude-tail.1"), "EXAMPLES"), re.M | re.S)
    (script,) = [re.sub(r"^\$ ", "", display, flags=re.M) for display in displays if "--after" in display]
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in (("p2pclaude-tail", 'echo "$3" >>asked; echo 7'), ("jq", "cat")):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    for _ in range(2):
        environ = {"PATH": f"{tools}:/usr/bin:/bin"}
        subprocess.run(["/bin/sh", "-ec", script], cwd=tmp_path, env=environ, timeout=30, check=True)
    assert (tmp_path / "asked").read_text(encoding="utf-8").split() == ["0", "7"]


def test_methods() -> None:
    """The protocol's page describes each method of the wire contract, and the envelopes' types."""
    text = page("p2pclaude.7")
    methods = set(re.findall(r"^\.It Cm ([a-z-]+)(?: Pq \+)?$", section(text, "METHODS"), re.M))
    assert methods == set(Methods(SessionTable.__new__(SessionTable))._methods)
    for kind in [getattr(wire, name) for name in sorted(ENVELOPES)]:
        assert re.search(rf"^\.It Ql {kind}\b", text, re.M), kind


def test_references() -> None:
    """Pages refer only to pages of ours that exist."""
    for path in PAGES:
        for name, number in re.findall(r"^\.Xr (p2pclaude\S*) (\d)", path.read_text(encoding="utf-8"), re.M):
            assert (MAN / f"{name}.{number}").exists(), (path.name, name)
