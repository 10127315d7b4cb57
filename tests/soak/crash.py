"""The daemon is ended with SIGKILL again and again, under senders and readers: is a message lost, or run twice?

Usage: tests/soak/crash [--kills N] [--seed S] [--sessions N] [--claude fake|real] [--keep DIR]

Clients speak to the daemon over loopback, in a network of its own. Each session has a sender, which retries every
message with the id of its first attempt until it is acknowledged, beginning with the one that starts the session, and
two readers that go on from the last seq they have. What a message ran is written down by what ran it. At the end every
acknowledged message must have its result, or a word that its turn was cut off; none may have run twice; every reader
must have read the journal, gapless; and the pairing URL must have been the same at every start. Exit status 1 when
something did not hold. The seed decides after how much of its log the daemon is ended; the rest is up to the machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from interop import harness
from interop.harness import real_claude
from kit.free_ports import free_port
from kit.stub_api import environment, stub_api

from p2pclaude.client import remote_sessions
from p2pclaude.client.rpc_client import Client, DhtDialer
from p2pclaude.errors import P2PClaudeError
from p2pclaude.protocol.pairing import Pairing, parse_url

CALL_SECONDS: Final = 3.0
FAKE_LINES: Final = 30  # what a daemon may log before it is ended, at most
REAL_LINES: Final = 20
PATIENCE: Final = 4.0  # seconds until it is ended anyway
MOST_UNANSWERED: Final = 4
QUIET_SECONDS: Final = 60.0
READERS: Final = 2


@dataclass
class Place:
    """Where everything lies, and how to start it."""

    path: Path
    claude: Path
    env: dict[str, str]
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        """Make the directories."""
        for path in (self.work, Path(self.env["HOME"]) / ".claude"):
            path.mkdir(parents=True)

    @property
    def work(self) -> Path:
        """Where sessions run, and where what they run is written down."""
        return self.path / "work"

    @property
    def ran(self) -> Path:
        """The words of all messages that were run."""
        return self.path / "ran"

    def arguments(self) -> list[str]:
        """Return the daemon's arguments."""
        options = {"data-dir": self.path / "data", "host": "127.0.0.1", "port": self.port, "claude": self.claude}
        return ["--private", "--root-dir", str(self.work), *(f"--{name}={value}" for name, value in options.items())]


class Lives:
    """Starts the daemon and ends it."""

    def __init__(self, place: Place, process: asyncio.subprocess.Process) -> None:
        self._place = place
        self._process = process
        self.pid = 0
        self.over = asyncio.Event()  # set when the daemon was ended, and replaced
        self._seen = 0  # bytes of the log
        self.urls: set[str] = set()

    async def start(self) -> None:
        """Start a daemon."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self.pid = int(await self._process.stdout.readline())

    async def until_served(self) -> None:
        """Wait until the log says that the daemon serves, which may be the next one by then."""
        log = self._place.path / "log"
        while not log.exists() or f'"pid": {self.pid}, "public_key"'.encode() not in self._read_log(log):
            await asyncio.sleep(0.01)

    async def until_logged(self, lines: int, seconds: float) -> None:
        """Wait until the daemon has logged so many lines, or for so long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._read_log(self._place.path / "log").count(b"\n") < lines and loop.time() < end:
            await asyncio.sleep(0.005)

    def _read_log(self, log: Path) -> bytes:
        with log.open("rb") as file:
            file.seek(self._seen)
            return file.read()

    def read_url(self) -> str:
        """Read the pairing URL as it stands now."""
        url = (self._place.path / "data" / "pairing.url").read_text()
        self.urls.add(url)
        return url.strip()

    async def kill(self) -> None:
        """End the daemon as a crash does."""
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(self.pid, 0)
                await asyncio.sleep(0.002)
        self._seen = (self._place.path / "log").stat().st_size if (self._place.path / "log").exists() else 0
        self.read_url()
        self.over.set()
        self.over = asyncio.Event()


@asynccontextmanager
async def lives_at(place: Place) -> AsyncIterator[Lives]:
    """Run the process that forks daemons; the last of them is ended in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "soak.lives",
        *place.arguments(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=harness.environment(place.env) | {"LIVES_LOG": str(place.path / "log")},
    )
    lives = Lives(place, process)
    try:
        yield lives
    finally:
        if lives.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(lives.pid, signal.SIGTERM)
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


class Line:
    """A client that is made anew whenever the daemon was ended, so that no call waits for a dead one."""

    def __init__(self, pairing: Pairing, bootstrap: Sequence[str], lives: Lives) -> None:
        self._pairing = pairing
        self._bootstrap = bootstrap
        self._lives = lives
        self._client: Client | None = None
        self._of: asyncio.Event | None = None
        self._dialing = asyncio.Lock()
        self._leaving: list[asyncio.Task[None]] = []

    async def call(self, ask: Callable[[Client], Awaitable[Any]], patience: float = CALL_SECONDS) -> Any:
        """Ask the daemon until it answers."""
        while True:
            over = self._lives.over
            asking = asyncio.create_task(self._ask(ask, patience, over))
            asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to see it
            dying = asyncio.create_task(over.wait())
            await asyncio.wait([asking, dying], return_when=asyncio.FIRST_COMPLETED)
            dying.cancel()
            if not asking.done():
                asking.cancel()
            with contextlib.suppress(P2PClaudeError, TimeoutError, asyncio.CancelledError):
                return await asking
            await asyncio.sleep(0.02)

    async def _ask(self, ask: Callable[[Client], Awaitable[Any]], patience: float, over: asyncio.Event) -> Any:
        async with self._dialing:
            if self._of is not over:
                self._leave()
                await self._lives.until_served()
                dialer = DhtDialer(self._pairing, self._bootstrap)
                self._client, self._of = Client(dialer, self._pairing.data_key, timeout=CALL_SECONDS), over
        assert self._client is not None
        async with asyncio.timeout(patience):
            return await ask(self._client)

    def _leave(self) -> None:
        if self._client is not None:
            self._leaving.append(asyncio.create_task(self._client.close()))
        self._client = self._of = None

    async def close(self) -> None:
        """Leave."""
        self._leave()
        await asyncio.gather(*self._leaving, return_exceptions=True)


@dataclass
class Conversation:
    """One session: what was sent and acknowledged, and what its readers have read."""

    session: str = field(default_factory=lambda: str(uuid.uuid4()))
    acknowledged: dict[int, str] = field(default_factory=dict)  # seq -> the word that it writes down
    read: list[list[dict[str, Any]]] = field(default_factory=lambda: [[] for _ in range(READERS)])
    done: set[int] = field(default_factory=set)
    sending: bool = True

    async def send(self, line: Line, place: Place) -> None:
        """Send messages as long as that is wanted, each until it is acknowledged."""
        while self.sending:
            word = uuid.uuid4().hex
            params = {"sessionId": self.session, "text": f"TOOL:echo {word} >> {place.ran}", "messageId": word}
            method = "send-message" if self.acknowledged else "spawn-session"

            async def ask(client: Client, method: str = method, params: dict[str, str] = params) -> int:
                result = await client.call(method, params)
                if not isinstance(result, dict) or "seq" not in result:
                    raise P2PClaudeError(f"{method}: {result}")
                return int(result["seq"])

            seq = await line.call(ask)
            if seq in self.acknowledged:
                raise SystemExit(f"seq {seq} stands for two messages")
            self.acknowledged[seq] = word
            while self.sending and len(self.acknowledged) - len(self.done) >= MOST_UNANSWERED:
                await asyncio.sleep(0.02)

    async def follow(self, number: int, line: Line) -> None:
        """Read on and on from the last seq."""
        found = self.read[number]
        while True:

            async def ask(client: Client) -> remote_sessions.Page:
                return await remote_sessions.read_output(client, self.session, after=len(found), wait=1.0)

            page = await line.call(ask)
            for envelope in page.messages:
                if envelope.get("seq") != len(found) + 1:
                    raise SystemExit(f"after seq {len(found)} a reader got {envelope.get('seq')}")
                found.append(envelope)
            if not number:
                self._note_done(page.messages)
            if page.next == 0:
                await asyncio.sleep(0.05)

    def _note_done(self, envelopes: Sequence[remote_sessions.Envelope]) -> None:
        for envelope in envelopes:
            if envelope["type"] == "turn":
                self._turn = int(envelope["message"])
            elif envelope["type"] == "turn-cut" and not envelope["again"]:
                self.done.add(envelope["message"])
            elif envelope["type"] == "session-output" and envelope["data"].get("type") == "result":
                self.done.add(self._turn)

    def problems(self, place: Place) -> list[str]:
        """Name what did not hold in this session."""
        lines = (place.path / "data" / "sessions" / self.session / "journal.jsonl").read_bytes().splitlines()
        journal = [json.loads(line) for line in lines]
        found = [f"{self.session}: seq {seq} is lost" for seq in sorted(set(self.acknowledged) - self.done)]
        if [envelope["seq"] for envelope in journal] != list(range(1, len(journal) + 1)):
            found.append(f"{self.session}: the journal has gaps")
        for number, read in enumerate(self.read):
            if read != journal[: len(read)] or len(read) < len(journal):
                found.append(f"{self.session}: reader {number} read {len(read)} of {len(journal)}, or others")
        return found


@dataclass(frozen=True)
class Report:
    """What came of it all."""

    kills: int
    acknowledged: int
    cut: int
    handed_again: int
    envelopes: int
    seconds: float
    problems: list[str]

    def show(self) -> None:
        """Print it."""
        print(
            f"{self.kills} kills in {self.seconds:.0f} s: {self.acknowledged} messages acknowledged, {self.cut} turns "
            f"cut off, {self.handed_again} handed again, {self.envelopes} envelopes read by each reader"
        )
        for problem in self.problems:
            print(f"PROBLEM {problem}")


def judge(place: Place, lives: Lives, talks: Sequence[Conversation], kills: int, began: float) -> Report:
    """Compare what was sent, what was run, what was read and what stands in the journals."""
    problems = [problem for talk in talks for problem in talk.problems(place)]
    ran = Counter(place.ran.read_text().split()) if place.ran.exists() else Counter[str]()
    problems += [f"a message ran {count} times" for count in ran.values() if count > 1]
    cuts = [envelope for talk in talks for envelope in talk.read[0] if envelope["type"] == "turn-cut"]
    cut = {(talk.session, e["message"]) for talk in talks for e in talk.read[0] if e["type"] == "turn-cut"}
    for talk in talks:
        unrun = [seq for seq, word in talk.acknowledged.items() if not ran[word] and (talk.session, seq) not in cut]
        problems += [f"{talk.session}: seq {seq} has a result and never ran" for seq in unrun]
    if len(lives.urls) != 1:
        problems.append(f"{len(lives.urls)} pairing URLs")
    again = sum(envelope["again"] is True for envelope in cuts)
    envelopes = sum(len(talk.read[0]) for talk in talks)
    acknowledged = sum(len(talk.acknowledged) for talk in talks)
    return Report(kills, acknowledged, len(cuts) - again, again, envelopes, time.monotonic() - began, problems)


async def torment(place: Place, kills: int, sessions: int, rng: random.Random, lines: int) -> Report:
    """Kill the daemon so many times while it is used, then let it come to rest and judge."""
    began = time.monotonic()
    talks = [Conversation() for _ in range(sessions)]
    async with lives_at(place) as lives:
        await lives.start()
        await lives.until_served()
        pairing = parse_url(lives.read_url())
        wires = [Line(pairing, [f"127.0.0.1:{place.port}"], lives) for _ in range(1 + READERS)]
        senders = [asyncio.create_task(talk.send(wires[0], place)) for talk in talks]
        readers = [
            asyncio.create_task(talk.follow(number, wires[1 + number])) for talk in talks for number in range(READERS)
        ]
        failed = asyncio.wait([*senders, *readers], return_when=asyncio.FIRST_COMPLETED)
        killing = asyncio.create_task(kill_often(lives, kills, rng, lines))
        await asyncio.wait([killing, watching := asyncio.create_task(failed)], return_when=asyncio.FIRST_COMPLETED)
        for task in (killing, *senders, *readers):
            if task.done():
                task.result()
        watching.cancel()
        for talk in talks:
            talk.sending = False
        await asyncio.wait_for(asyncio.gather(*senders), QUIET_SECONDS)
        await come_to_rest(place, talks)
        report = judge(place, lives, talks, kills, began)
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await asyncio.gather(*(wire.close() for wire in wires))
    return report


async def kill_often(lives: Lives, kills: int, rng: random.Random, lines: int) -> None:
    """End the daemon and start it again: after some progress rather than some time, however busy the machine is."""
    for done in range(kills):
        await lives.until_logged(rng.randrange(lines), PATIENCE)
        await asyncio.sleep(rng.uniform(0, 0.03))
        await lives.kill()
        await lives.start()
        if sys.stdout.isatty():
            print(f"\r{done + 1} kills", end="", flush=True)


async def come_to_rest(place: Place, talks: Sequence[Conversation]) -> None:
    """Wait until every acknowledged message is done, and every reader has read all there is."""
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        files = [place.path / "data" / "sessions" / talk.session / "journal.jsonl" for talk in talks]
        lengths = [file.read_bytes().count(b"\n") for file in files]
        is_done = all(set(talk.acknowledged) <= talk.done for talk in talks)
        if is_done and all(len(read) == n for talk, n in zip(talks, lengths, strict=True) for read in talk.read):
            return
        await asyncio.sleep(0.1)


def fake_place(path: Path) -> Place:
    """Prepare a run with the stand-in."""
    claude = path / "claude"
    script = Path(__file__).with_name("claude_like.py")
    claude.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -E {shlex.quote(str(script))} "$@"\n')
    claude.chmod(0o755)
    return Place(path, claude, {"HOME": str(path / "home"), "LIVES_SETTLE_SECONDS": "0.05"})


def crash(kills: int, seed: int, sessions: int, path: Path) -> Report:
    """Run it with the stand-in."""
    return asyncio.run(torment(fake_place(path), kills, sessions, random.Random(seed), FAKE_LINES))


def crash_real(kills: int, seed: int, sessions: int, path: Path) -> Report:
    """Run it with the real `claude` before a stub of its API; its tools are allowed to run."""
    claude = real_claude()
    if claude is None:
        raise SystemExit("the real claude is not installed, run `npm ci` in tests/interop")
    with stub_api() as api:
        place = Place(path, claude, environment(api.url, str(path / "home"), os.environ["PATH"]))
        (path / "home" / ".claude" / "settings.json").write_text('{"permissions": {"allow": ["Bash"]}}')
        return asyncio.run(torment(place, kills, sessions, random.Random(seed), REAL_LINES))


def main(argv: Sequence[str] | None = None) -> int:
    """Run it as a command."""
    parser = argparse.ArgumentParser(prog="tests/soak/crash", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--claude", choices=("fake", "real"), default="fake")
    parser.add_argument("--keep", type=Path, help="keep data, journals and the log in this new directory")
    options = parser.parse_args(argv)
    path = options.keep or Path(tempfile.mkdtemp())
    path.mkdir(exist_ok=True)
    try:
        run = crash if options.claude == "fake" else crash_real
        report = run(options.kills, options.seed, options.sessions, path.resolve())
    finally:
        if options.keep is None:
            shutil.rmtree(path, ignore_errors=True)
    print(f"seed {options.seed}, claude {options.claude}")
    report.show()
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
