"""`p2pclaude-daemon --check`: each thing that can be wrong is found, named, and has the status of a start's end."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop.harness import peers_on
from kit.daemons import daemon
from kit.free_ports import free_port
from kit.sessions import Place, prepare, run

from p2pclaude.cli.daemon import main
from p2pclaude.daemon import check as module
from p2pclaude.daemon.check import Finding, Level, check
from p2pclaude.daemon.daemon import Daemon, DaemonOptions
from p2pclaude.errors import Refused
from p2pclaude.hyperdht import KeyPair


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place whose claude says its version."""
    place = prepare(tmp_path, monkeypatch)
    place.claude.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "9.9.9 (Claude Code)"\n')
    return place


def findings(place: Place, **options: Any) -> list[Finding]:
    """Check, by default in a private network."""
    chosen: dict[str, Any] = {"private": True, "host": "127.0.0.1", "port": free_port()}
    chosen |= {"data_dir": str(place.path / "data"), "claude": str(place.claude), "root_dir": str(place.root)}
    chosen |= options
    found: list[Finding] = []

    async def collect() -> None:
        found.extend([finding async for finding in check(DaemonOptions(**chosen), dict(os.environ))])

    run(collect(), 60)
    return found


def of(found: list[Finding], subject: str) -> Finding:
    """Give the worst finding on a subject."""
    return max((f for f in found if f.subject == subject), key=lambda f: list(Level).index(f.level))


def test_all_is_well(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(place)
    assert {f.level for f in found} == {Level.OK}, found
    assert "9.9.9" in of(found, "claude").text
    arguments = ["--check", "--private", "--host", "127.0.0.1", "--port", str(free_port())]
    arguments += ["--data-dir", str(place.path / "data"), "--claude", str(place.claude)]
    assert main(arguments) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows][:2] == [["ok", "claude"], ["ok", "data directory"]]
    assert {len(row) for row in rows} == {3}


def test_it_changes_nothing_that_a_start_would_not(place: Place) -> None:
    findings(place)
    assert sorted(p.name for p in (place.path / "data").iterdir()) == [
        "daemon.lock",
        "dht-keypair.json",
        "encryption.key",
    ]


@pytest.mark.parametrize(
    ("script", "said", "seconds"),
    [
        ("#!/bin/sh\necho broken >&2; exit 3\n", "status 3: broken", 30.0),
        ("#!/nowhere\n", "could not be started", 30.0),
        ("#!/bin/sh\nexec sleep 1000\n", "does not end", 0.5),
    ],
)
def test_a_claude_that_does_not_work(
    place: Place, script: str, said: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLAUDE_SECONDS", seconds)
    place.claude.write_text(script)
    finding = of(findings(place), "claude")
    assert (finding.level, finding.status) == (Level.ERROR, 69)
    assert said in finding.text


def test_no_claude_and_another_program(place: Place) -> None:
    missing = of(findings(place, claude=str(place.path / "none")), "claude")
    assert (missing.level, missing.status, missing.hint) == (Level.ERROR, 69, "check --claude")
    place.claude.write_text("#!/bin/sh\necho something else\n")
    assert "calls itself 'something else'" in of(findings(place), "claude").text


def test_keys_modes_and_sessions(place: Place) -> None:
    findings(place)
    data = place.path / "data"
    (data / "encryption.key").chmod(0o644)
    (data / "sessions" / "broken").mkdir(parents=True)
    (data / "sessions" / "broken" / "session.json").write_text("{")
    (data / "sessions" / "of-another").mkdir()
    (data / "sessions" / ".DS_Store").write_text("no session")
    found = findings(place)
    assert "0644" in of(found, "data directory").text
    assert [f.text for f in found if f.subject == "sessions"] == [
        "0 of them can be read",
        "broken is damaged",
        "of-another is damaged",
    ]
    (data / "encryption.key").write_text("{")
    damaged = of(findings(place), "data directory")
    assert (damaged.level, damaged.status) == (Level.ERROR, 65)


def test_the_exit_status_is_that_of_the_first_error(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.path / "data").mkdir(mode=0o700)
    (place.path / "data" / "dht-keypair.json").write_text("{")
    arguments = ["--check", "--private", "--port", str(free_port()), "--host", "127.0.0.1"]
    arguments += ["--data-dir", str(place.path / "data")]
    assert main([*arguments, "--claude", str(place.claude)]) == 65
    assert main([*arguments, "--claude", str(place.path / "none")]) == 69
    capsys.readouterr()


def test_a_disk_that_is_full(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(place.path)

    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full if "data" in str(path) else real)
    assert (of(findings(place), "disk").level, of(findings(place), "disk").status) == (Level.ERROR, 75)
    Full.f_bavail = 1000
    assert of(findings(place), "disk").level is Level.WARNING


def test_a_root_that_is_none(place: Place) -> None:
    finding = of(findings(place, root_dir=str(place.path / "none")), "root directory")
    assert (finding.level, finding.status) == (Level.ERROR, 64)


def test_a_root_that_cannot_be_entered_keeps_a_daemon_from_starting_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK or (path != place.root and real(path, mode)))
    finding = of(findings(place), "root directory")
    assert (finding.level, finding.status) == (Level.ERROR, 77)
    assert "cannot be entered" in finding.text

    async def start() -> None:
        options = DaemonOptions(private=True, data_dir=str(place.path / "data"), root_dir=str(place.root))
        with pytest.raises(Refused, match="cannot be entered"):
            await Daemon(options).run()

    run(start())


def test_beside_a_daemon_that_runs(place: Place) -> None:
    with daemon(place) as process:
        finding = of(findings(place), "data directory")
        assert finding.level is Level.WARNING
        assert f"pid {process.pid}" in finding.text


def test_a_taken_port(place: Place) -> None:
    port = free_port()
    with daemon(place, port=port):
        other = findings(place, port=port, data_dir=str(place.path / "other"))
    assert (of(other, "network").level, of(other, "network").status) == (Level.ERROR, 69)


@pytest.fixture(scope="module")
def network() -> Iterator[list[str]]:
    """Run a network of Python nodes."""
    with peers_on([]) as peers:
        yield peers.start("python", "testnet", size=4).ready["bootstrap"]


@pytest.fixture
def unanswered() -> Iterator[str]:
    """Give an address where nobody answers, for as long as the test takes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{silent.getsockname()[1]}"


def test_the_network(place: Place, network: list[str], unanswered: str) -> None:
    chosen = {"private": False, "port": None, "bootstrap": (*network, unanswered)}
    found = findings(place, **chosen, relay=KeyPair.generate().public_key)
    assert of(found, "announcement").level is Level.OK, found
    assert of(found, "NAT").level is Level.OK
    assert [f.level for f in found if f.subject == "bootstrap"].count(Level.WARNING) == 1
    assert unanswered in of(found, "bootstrap").text
    assert of(found, "relay").level is Level.WARNING


def test_a_network_that_is_not_there(place: Place, unanswered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NETWORK_SECONDS", 3.0)
    found = findings(place, private=False, port=None, bootstrap=(unanswered,))
    assert (of(found, "bootstrap").level, of(found, "bootstrap").status) == (Level.ERROR, 69)
    assert not [f for f in found if f.subject in ("announcement", "NAT")]


def test_nat_verdicts() -> None:
    class Node:
        remote_address = None
        seen_address: tuple[str | None, int] = ("192.0.2.1", 0)

    def verdict(**options: Any) -> Level:
        return module._nat(Node, DaemonOptions(**options)).level  # type: ignore[arg-type]

    assert verdict() is Level.WARNING
    assert verdict(relay=bytes(32)) is Level.OK
    Node.seen_address = ("192.0.2.1", 7)
    assert verdict() is Level.OK
    Node.seen_address = (None, 0)
    assert verdict() is Level.WARNING


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--rotate"]) == 64
    assert "--rotate does not go with --check" in capsys.readouterr().err
