"""Two hundred sessions in the table and two hundred followers at once: latency, memory, processor time.

Usage: tests/soak/followers [--sessions N] [--followers N] [--megabytes N] [--at-once N] [--seconds N]

The daemon holds so many sessions, a few of which speak, and serves so many followers, on connections of their own over
loopback, from a few client processes in this one. One more follower never reads what it is sent. New clients come
while they connect and catch up. Each message's way, from the sender's call to the moment when every follower of its
session holds the answer, is measured. Exit status 1 if a follower misses anything, one waits for another, or a new
client does not get in.
"""

import argparse
import asyncio
import json
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from interop.harness import environment, tool_command
from kit.free_ports import free_port

from p2pclaude.client import remote_sessions
from p2pclaude.client.rpc_client import Client, DhtDialer
from p2pclaude.host.datadir import DataDir
from p2pclaude.protocol.pairing import Pairing, parse_url
from p2pclaude.sessions.directory import Info
from p2pclaude.sessions.life import State

FAKE: Final = Path(__file__).resolve().parent.parent / "kit" / "fake_claude.py"
SPEAKING: Final = 4
MOST_MS: Final = 5000.0
CATCH_UP_SECONDS: Final = 120.0
TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What the daemon has used so far."""

    rss: int
    cpu_seconds: float

    @classmethod
    def of(cls, pid: int) -> "Usage":
        """Read it from /proc."""
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return cls(int(words[21]) * resource.getpagesize(), (int(words[11]) + int(words[12])) / TICKS)


def fill(data: Path, work: Path, count: int) -> None:
    """Write what an earlier daemon left: its keys, and the directories of dormant sessions."""
    DataDir(data).load_or_create_identity()
    for number in range(count):
        path = data / "sessions" / f"dormant-{number:03}"
        path.mkdir(parents=True)
        info = Info(path.name, "", str(work), 1_700_000_000_000 + number, "default", state=State.DORMANT, last_seq=50)
        info.save(path)
        lines = (
            f'{{"type":"session-output","seq":{seq},"timestamp":1,"data":{{"type":"assistant","n":{seq}}}}}\n'
            for seq in range(1, 51)
        )
        (path / "journal.jsonl").write_text("".join(lines))


class Follower:
    """Follows one session; tells when each answer arrived."""

    def __init__(self, pairing: Pairing, bootstrap: Sequence[str], session: str) -> None:
        self.session = session
        self.last = 0
        self.arrived: dict[str, float] = {}
        self.problems: list[str] = []
        self.client = Client(DhtDialer(pairing, bootstrap), pairing.data_key)

    async def run(self) -> None:
        """Follow until cancelled."""
        async for page in remote_sessions.follow(self.client, self.session):
            now = time.monotonic()
            for envelope in page.messages:
                if envelope["seq"] != self.last + 1:
                    self.problems.append(f"{self.session}: {envelope['seq']} came after {self.last}")
                self.last = envelope["seq"]
                data = envelope.get("data")
                if isinstance(data, dict) and data.get("type") == "result":
                    self.arrived[str(data.get("result"))] = now


@dataclass(frozen=True)
class Figures:
    """What came of it."""

    connect_seconds: float
    megabytes: int
    caught_up_seconds: float
    messages: int
    ms: list[float]  # from the sender's call to each follower
    spread_ms: list[float]  # from the first follower to the last, a message
    before: Usage
    connected: Usage
    after: Usage
    seconds: float
    listed: int
    list_ms: float
    newcomers: list[float]  # ms until each had its answer
    problems: list[str]

    def show(self) -> None:
        """Print it."""
        for problem in self.problems[:20]:
            print(f"PROBLEM {problem}")
        ms, spread, new = (sorted(each) or [0.0] for each in (self.ms, self.spread_ms, self.newcomers))
        print(
            f"{self.listed} sessions listed in {self.list_ms:.0f} ms; connected in {self.connect_seconds:.1f} s, ",
            end="",
        )
        print(f"caught up with {self.megabytes} MB each after {self.caught_up_seconds:.1f} s")
        print(f"{len(new)} new clients: {statistics.median(new):.0f} ms median, {new[-1]:.0f} ms at most")
        print(
            f"{self.messages} messages, {len(ms)} arrivals: {statistics.median(ms):.0f} ms median, "
            f"{ms[len(ms) * 99 // 100]:.0f} ms at 99 %, {ms[-1]:.0f} ms at most; from the first follower to the last "
            f"{statistics.median(spread):.0f} ms median, {spread[-1]:.0f} ms at most"
        )
        share = (self.after.cpu_seconds - self.connected.cpu_seconds) / self.seconds
        print(
            f"daemon: {self.before.rss / 1e6:.0f} MB before, {self.connected.rss / 1e6:.0f} MB connected, "
            f"{self.after.rss / 1e6:.0f} MB after; {share:.0%} of a processor"
        )


@asynccontextmanager
async def newcomers(url: str, bootstrap: str) -> AsyncIterator[dict[str, Any]]:
    """Let new clients come in the meantime; yields what is filled in at the end: `ms` and `failed`."""
    argv = sys.executable, "-m", "soak.newcomers", url, bootstrap
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    told: dict[str, Any] = {}
    yield told
    out, _ = await process.communicate(b"")
    told.update(json.loads(out))


async def start_followers(followers: Sequence[Follower], at_once: int) -> list["asyncio.Task[None]"]:
    """Connect them all, a few at a time, and let them follow."""
    gate = asyncio.Semaphore(at_once)

    async def connect(follower: Follower) -> None:
        async with gate:
            await follower.client.call("ping")  # who has not proved the key by then is broken off as a stranger

    await asyncio.gather(*map(connect, followers))
    return [asyncio.create_task(follower.run()) for follower in followers]


async def caught_up(client: Client, crowd: Sequence[Follower]) -> None:
    """Wait until every follower holds all there is."""
    for session in {follower.session for follower in crowd}:
        last = await remote_sessions.last_seq(client, session)
        async with asyncio.timeout(CATCH_UP_SECONDS):
            while any(follower.session == session and follower.last < last for follower in crowd):
                await asyncio.sleep(0.05)


async def lazy_reader(pairing: Pairing, bootstrap: Sequence[str], session: str) -> Client:
    """Ask for the whole of a session again and again without ever reading an answer."""
    client = Client(DhtDialer(pairing, bootstrap), pairing.data_key)
    await client.call("ping")
    client._channel._reading.cancel()  # type: ignore[union-attr]
    for _ in range(20):
        asking = asyncio.create_task(client.call("get-output", {"sessionId": session, "after": 0}, patience=600))
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.sleep(0.1)
    return client


async def measure(pid: int, url: str, bootstrap: Sequence[str], options: argparse.Namespace) -> Figures:
    """Measure it against a daemon that runs."""
    pairing = parse_url(url)
    sender = Client(DhtDialer(pairing, bootstrap), pairing.data_key)
    talking = [(await remote_sessions.spawn(sender, text="hello", message_id=f"s{n}")).session for n in range(SPEAKING)]
    began = time.monotonic()
    listed = len(await remote_sessions.list_sessions(sender, every=True))
    list_ms = (time.monotonic() - began) * 1000
    for number, session in product(range(options.megabytes), talking):
        big = await remote_sessions.send(sender, session, text="BIG:1000000", message_id=f"big {number} {session}")
        await remote_sessions.wait_for_answer(sender, big)
    lazy = await lazy_reader(pairing, bootstrap, talking[0])
    before, began = Usage.of(pid), time.monotonic()
    crowd = [Follower(pairing, bootstrap, talking[n % SPEAKING]) for n in range(options.followers)]
    async with newcomers(url, bootstrap[0]) as new:
        tasks = await start_followers(crowd, options.at_once)
        connect_seconds = time.monotonic() - began
        await caught_up(sender, crowd)
    caught_up_seconds = time.monotonic() - began
    connected, began = Usage.of(pid), time.monotonic()
    sent: dict[str, tuple[str, float]] = {}
    while time.monotonic() < began + options.seconds:
        session = talking[len(sent) % SPEAKING]
        text = f"message {len(sent)}"
        sent[f"echo: {text}"] = (session, time.monotonic())
        await remote_sessions.send(sender, session, text=text, message_id=text)
        await asyncio.sleep(0.2)
    await asyncio.sleep(3)
    after, spent = Usage.of(pid), time.monotonic() - began
    ms, spread_ms, problems = judge(crowd, sent)
    problems += [f"a follower ended: {task.exception()!r}" for task in tasks if task.done()]
    problems += [f"a new client did not get in: {failure}" for failure in new["failed"]]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    lazy_channel: Any = lazy._channel
    lazy_channel.stream.abort()
    await asyncio.gather(*(one.client.close() for one in crowd), sender.close(), lazy.close(), return_exceptions=True)
    return Figures(
        connect_seconds,
        options.megabytes,
        caught_up_seconds,
        len(sent),
        ms,
        spread_ms,
        before,
        connected,
        after,
        spent,
        listed,
        list_ms,
        new["ms"],
        problems,
    )


def judge(crowd: Sequence[Follower], sent: dict[str, tuple[str, float]]) -> tuple[list[float], list[float], list[str]]:
    """Give all latencies, the spread of each message, and what did not hold."""
    problems = [problem for follower in crowd for problem in follower.problems]
    latencies: list[float] = []
    spreads: list[float] = []
    for text, (session, began) in sent.items():
        readers = [follower for follower in crowd if follower.session == session]
        times = [follower.arrived[text] for follower in readers if text in follower.arrived]
        if len(times) < len(readers):
            problems.append(f"{text!r} reached {len(times)} of {len(readers)} followers")
            continue
        latencies += [(moment - began) * 1000 for moment in times]
        spreads.append((max(times) - min(times)) * 1000)
    problems += [f"an answer took {ms:.0f} ms" for ms in latencies if ms > MOST_MS]
    return latencies, spreads, problems


async def run(path: Path, options: argparse.Namespace) -> Figures:
    """Start a daemon with so many sessions and measure it."""
    data, work, claude, port = path / "data", path / "work", path / "claude", free_port()
    work.mkdir()
    fill(data, work, options.sessions - SPEAKING)
    claude.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -E {shlex.quote(str(FAKE))} "$@"\n')
    claude.chmod(0o755)
    arguments = ["--private", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(data)]
    arguments += ["--claude", str(claude), "--root-dir", str(work)]
    log = path / "log"
    with log.open("wb") as out:
        argv = tool_command("daemon", *arguments)
        daemon = await asyncio.create_subprocess_exec(
            *argv, stdout=out, stderr=out, env=environment({"HOME": str(path / "home")})
        )
    try:
        while b"daemon-started" not in log.read_bytes():
            if daemon.returncode is not None:
                raise SystemExit(log.read_text())
            await asyncio.sleep(0.05)
        url = (data / "pairing.url").read_text().strip()
        return await measure(daemon.pid, url, [f"127.0.0.1:{port}"], options)
    finally:
        if daemon.returncode is None:
            daemon.terminate()
        await daemon.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it as a command."""
    parser = argparse.ArgumentParser(prog="tests/soak/followers", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--followers", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=1, help="of each session, to catch up with (1)")
    parser.add_argument("--at-once", type=int, default=8, help="connections that are made at a time (8)")
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as path:
        figures = asyncio.run(run(Path(path).resolve(), options))
    figures.show()
    return 1 if figures.problems else 0


if __name__ == "__main__":
    sys.exit(main())
