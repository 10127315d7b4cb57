"""Would a daemon with these options work here? What `p2pclaude-daemon --check` finds out, a finding at a time.

`cli.daemon` prints them. Nothing is changed that a start would not change, and nothing of a daemon that runs: the
announcement is tried with a key pair that is thrown away.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from p2pclaude.daemon.daemon import DaemonOptions, data_dir_of, default_dir_of, new_dht, start_dht
from p2pclaude.errors import P2PClaudeError, TryAgain, Unavailable, WireError
from p2pclaude.host.datadir import DataDir, file_errors, write_atomically
from p2pclaude.host.log import first_line
from p2pclaude.sessions.claude import child_environment, find_claude
from p2pclaude.sessions.directory import Info

if TYPE_CHECKING:
    from p2pclaude.hyperdht import Connection, HyperDHT

CLAUDE_SECONDS = 20.0
"""How long `claude --version` may take."""
NETWORK_SECONDS = 20.0
"""How long each question to the network may take."""
LITTLE_SPACE = 256 * 1024 * 1024
"""Free bytes below which the disk is worth a warning."""
NO_SPACE = 1024 * 1024
"""Free bytes below which nothing can be written that matters."""


class Level(StrEnum):
    """How good a finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `status` is the exit status that an error stands for."""

    level: Level
    subject: str
    text: str
    hint: str | None = None
    status: int = 0

    @classmethod
    def of(cls, subject: str, error: P2PClaudeError) -> "Finding":
        """Give the finding for an error that a start would end with."""
        return cls(Level.ERROR, subject, str(error), error.hint, error.exit_status)


async def check(options: DaemonOptions, environ: Mapping[str, str]) -> AsyncIterator[Finding]:
    """Look at everything that a daemon needs; give findings as they come, and go on after an error where it can."""
    yield await _check_claude(options, environ)
    try:
        warnings: list[str] = []
        data_dir = data_dir_of(options, environ, warnings.append)
        running = _is_running(data_dir)
        for finding in _check_data_dir(data_dir, running):
            yield finding
        for warning in warnings:
            yield Finding(Level.WARNING, "data directory", warning)
    except P2PClaudeError as error:
        yield Finding.of("data directory", error)
        running = None
    yield _check_root(options)
    async for finding in _check_network(options, beside_daemon=running is not None):
        yield finding


async def _check_claude(options: DaemonOptions, environ: Mapping[str, str]) -> Finding:
    try:
        path = find_claude(options.claude, environ)
        return Finding(Level.OK, "claude", f"{path}, {await _claude_version(path, environ)}")
    except P2PClaudeError as error:
        return Finding.of("claude", error)


async def _claude_version(path: Path, environ: Mapping[str, str]) -> str:
    """Run `claude --version` and give what it says. Raises Unavailable."""
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(environ),
        )
    except OSError as error:
        raise Unavailable(f"{path} could not be started: {(error.strerror or str(error)).lower()}") from error
    try:
        async with asyncio.timeout(CLAUDE_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"{path} --version does not end") from None
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    said = first_line(out.decode("utf-8", "replace")) or ""
    if process.returncode != 0:
        words = first_line(err.decode("utf-8", "replace")) or said
        raise Unavailable(f"{path} --version ended with status {process.returncode}: {words}")
    return said if "Claude Code" in said else f"which calls itself {said!r}"


def _is_running(data_dir: DataDir) -> str | None:
    """Say which daemon uses a data directory, None if there is none."""
    try:
        data_dir.lock()
    except TryAgain as error:
        return str(error)
    data_dir.unlock()
    return None


def _check_data_dir(data_dir: DataDir, running: str | None) -> list[Finding]:
    """Try its keys, its modes (by opening it), its sessions, and whether it can be written. Raises P2PClaudeError."""
    data_dir.load_or_create_identity()
    probe = data_dir.path / f".check.{os.getpid()}"
    with file_errors(data_dir.path):
        write_atomically(probe, b"x")
        probe.unlink()
        disk = os.statvfs(data_dir.path)
    findings = [Finding(Level.OK, "data directory", f"{data_dir.path}, its keys are good and it can be written")]
    if running is not None:
        findings.append(Finding(Level.WARNING, "data directory", running, "another start would end with status 75"))
    return [*findings, _space(disk.f_bavail * disk.f_frsize), *_check_sessions(data_dir.sessions_dir)]


def _space(free: int) -> Finding:
    text = f"{free // (1024 * 1024)} MiB are free"
    if free < NO_SPACE:
        return Finding(Level.ERROR, "disk", text, "make room: nothing can be written", TryAgain.exit_status)
    if free < LITTLE_SPACE:
        return Finding(Level.WARNING, "disk", text, "sessions pause when the disk is full")
    return Finding(Level.OK, "disk", text)


def _check_sessions(path: Path) -> list[Finding]:
    sessions = [entry for entry in sorted(path.iterdir()) if entry.is_dir()] if path.is_dir() else []
    damaged = []
    for session in sessions:
        try:
            good = Info.decode((session / "session.json").read_bytes()).session_id == session.name
        except (OSError, WireError):
            good = False
        if not good:
            damaged.append(session.name)
    found = [Finding(Level.OK, "sessions", f"{len(sessions) - len(damaged)} of them can be read")]
    hint = "it cannot go on, but may be read; restore session.json from a backup, or remove the directory"
    return found + [Finding(Level.WARNING, "sessions", f"{name} is damaged", hint) for name in damaged[:5]]


def _check_root(options: DaemonOptions) -> Finding:
    try:
        directory = default_dir_of(options)
    except P2PClaudeError as error:
        return Finding.of("root directory", error)
    text = "none: sessions may start anywhere" if options.root_dir is None else str(directory)
    return Finding(Level.OK, "root directory", text)


async def _check_network(options: DaemonOptions, *, beside_daemon: bool) -> AsyncIterator[Finding]:
    """Bind, ask the bootstrap nodes, announce a key, look it up. Beside a daemon any port will do."""
    if beside_daemon and options.private:
        yield Finding(Level.OK, "network", "private, and the daemon that runs is its bootstrap node")
        return
    dht = new_dht(replace(options, port=0) if beside_daemon else options)
    try:
        await start_dht(dht, options)
        yield Finding(Level.OK, "network", f"UDP port {dht.port} can be used")
        if options.private:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(dht.bootstrapped.wait(), NETWORK_SECONDS)
        answered = await dht.ping_bootstrap_nodes()
        for finding in _bootstrap_findings(answered):
            yield finding
        if any(seconds is not None for seconds in answered.values()):
            yield _nat(dht, options)
            yield await _check_announcement(dht)
            if options.relay is not None:
                yield await _check_relay(dht, options.relay)
    except P2PClaudeError as error:
        yield Finding.of("network", error)
    finally:
        await dht.destroy(timeout=2.0)


def _bootstrap_findings(answered: Mapping[tuple[str, int], float | None]) -> list[Finding]:
    findings = []
    for (host, port), seconds in answered.items():
        if seconds is None:
            findings.append(Finding(Level.WARNING, "bootstrap", f"{host}:{port} does not answer"))
        else:
            text = f"{host}:{port} answered in {seconds * 1000:.0f} ms"
            findings.append(Finding(Level.OK, "bootstrap", text))
    if not any(finding.level is Level.OK for finding in findings):
        hint = "is UDP let through, and are the nodes of --bootstrap the right ones?"
        findings.append(Finding(Level.ERROR, "bootstrap", "no node answers", hint, Unavailable.exit_status))
    return findings


def _nat(dht: "HyperDHT", options: DaemonOptions) -> Finding:
    host, port = dht.seen_address
    if dht.remote_address is not None:
        return Finding(Level.OK, "NAT", f"none: everybody reaches {host}:{port}")
    if host is not None and port:
        return Finding(Level.OK, "NAT", f"it keeps its ports, seen at {host}:{port}: clients get through")
    if host is None:
        return Finding(Level.WARNING, "NAT", "other nodes do not agree on where this host is seen")
    relay = None if options.relay is not None else "clients behind another such NAT need --relay"
    level = Level.OK if relay is None else Level.WARNING
    return Finding(level, "NAT", f"it chooses ports at random, seen at {host}", relay)


async def _check_announcement(dht: "HyperDHT") -> Finding:
    from p2pclaude.hyperdht import HyperDHTError, KeyPair

    async def refuse(connection: "Connection") -> None:
        """Nobody knows this key."""

    key_pair = KeyPair.generate()
    server = dht.create_server(refuse)
    hint = "the daemon would not be found; it goes on trying"
    try:
        async with asyncio.timeout(NETWORK_SECONDS):
            await server.listen(key_pair)
            async for reply in dht.find_peer(key_pair.public_key):
                if reply.value is not None:
                    return Finding(Level.OK, "announcement", "a key announced from here was found again")
        return Finding(Level.ERROR, "announcement", "a key announced from here was not found", hint, 69)
    except (HyperDHTError, OSError) as error:
        return Finding(Level.ERROR, "announcement", f"it failed: {first_line(str(error)) or 'no answer'}", hint, 69)
    finally:
        await server.close()


async def _check_relay(dht: "HyperDHT", key: bytes) -> Finding:
    from p2pclaude.hyperdht import HyperDHTError

    try:
        connection = await dht.connect(key, timeout=NETWORK_SECONDS)
    except (HyperDHTError, OSError) as error:
        hint = "is p2pclaude-node --relay running in this network, with this key?"
        return Finding(Level.WARNING, "relay", f"not reached: {error}", hint)
    how = connection.how
    await connection.close()
    return Finding(Level.OK, "relay", f"reached ({how})")
