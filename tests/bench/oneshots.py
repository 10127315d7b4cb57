"""Measure the tools beside the leanest Node scripts that do the same, as whole processes.

Every measurement yields samples by figure and by who was measured, "node" or "python", which take turns.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from bench.far import far_apart
from interop.daemons import Daemon, start_daemon
from interop.harness import HERE, ROOT, Peer, Peers, environment, peers_on, tool_command
from nat.lab import in_namespace

Samples = Generator[tuple[tuple[str, str], float], None, None]
"""What was measured, of whom, and the value, as they come."""

FAKE: Final = HERE / "fake_claude.py"
LONG_SESSION: Final = "00000000-0000-4000-8000-000000000100"
PINGS: Final = "import sys; from p2pclaude.cli import ping; ping.INTERVAL_SECONDS = 0.02; ping.main(sys.argv[1:])"
"""The tool itself, but 50 times a second."""
FAR: Final = {
    "daemon": (25.0, ("11.9.1.1",)),
    "tool": (25.0, ("11.9.1.2",)),
    "dht": (0.0, tuple(f"11.9.2.{number}" for number in range(1, 101))),
}
"""100 ms there and back between the two hosts, 50 ms to each node of the DHT.

The twenty nodes nearest to a key hold its record. In a DHT of fewer the bootstrap node holds every record, and nobody
has to search; in one of a hundred it does so for one daemon in five.
"""
FAR_ROUNDS: Final = 2  # in one DHT: how many steps a search takes is the luck of the keys, so there are several


@dataclass(frozen=True)
class Lab:
    """What a measurement needs: the tools, a daemon, and the command that runs things where the tools shall run."""

    bin: Path
    url: str
    env: Mapping[str, str]
    prefix: tuple[str, ...] = ()

    def tool(self, name: str, *arguments: str) -> list[str]:
        """Return the command line of an installed tool."""
        return [*self.prefix, str(self.bin / f"p2pclaude-{name}"), *arguments]

    def node(self, script: str) -> list[str]:
        """Return the command line of a Node script that is given the bootstrap node and the URL."""
        script_path = str(HERE / "node" / f"{script}.js")
        return [*self.prefix, "node", script_path, self.env["P2P_CLAUDE_BOOTSTRAP"], self.url]


@contextlib.contextmanager
def installed_tools() -> Iterator[Path]:
    """Make an environment with nothing but the tools in it, as pip would; yield the directory of their scripts.

    The one that tests run in is no measure: what else is installed there slows every start of its interpreter.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        venv.create(place, symlinks=True)
        site = next(place.glob("lib/python*/site-packages"))
        packages = {str(Path(str(distribution("PyNaCl").locate_file("")))), str(ROOT)}
        (site / "tree.pth").write_text("".join(f"{path}\n" for path in sorted(packages, reverse=True)))
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(ROOT / "p2pclaude")], check=True)
        for tool in ("ls", "ping", "tail"):
            script = place / "bin" / f"p2pclaude-{tool}"
            call = f"import re\nimport sys\nfrom p2pclaude.cli.{tool} import main\nif __name__ == '__main__':\n"
            script.write_text(f"#!{place / 'bin' / 'python'}\n{call}    sys.exit(main())\n")
            script.chmod(0o755)
        yield place / "bin"


def plain_environment(bootstrap: str, cache: str = "") -> dict[str, str]:
    """Return an environment as a user has it: none of the variables that tests set for Python."""
    env = environment({"P2P_CLAUDE_BOOTSTRAP": bootstrap, "P2P_CLAUDE_CACHE": cache})
    return {name: value for name, value in env.items() if not name.startswith("PYTHON")}


def wall_ms(argv: Sequence[str], env: Mapping[str, str]) -> float:
    """Run a command that must succeed and return how long its whole life took."""
    started = time.perf_counter()
    subprocess.run(argv, env=env, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1000


def one_shots(lab: Lab, rounds: int, where: str) -> Samples:
    """`ls` as a whole process, with and without what the cache remembers; Node remembers nothing."""
    with tempfile.TemporaryDirectory() as cache:
        warm = {**lab.env, "P2P_CLAUDE_CACHE": cache}
        wall_ms(lab.tool("ls", lab.url), warm)
        for _ in range(rounds):
            node = wall_ms(lab.node("ls"), lab.env)
            for figure, env in ((f"ls {where}, cold, ms", lab.env), (f"ls {where}, warm, ms", warm)):
                yield (figure, "node"), node
                yield (figure, "python"), wall_ms(lab.tool("ls", lab.url), env)


def connects(lab: Lab, rounds: int, where: str) -> Samples:
    """Without the time of the process: until the connection is open, and until the first answer.

    Node says `open` when it sends its first packet, we when the daemon's first one has arrived.
    """
    with tempfile.TemporaryDirectory() as cache:
        warm = {**lab.env, "P2P_CLAUDE_CACHE": cache}
        wall_ms(lab.tool("ls", lab.url), warm)
        for _ in range(rounds):
            node = _times_said([*lab.node("ls"), "say-when"], lab.env, ("open ", "answered "))
            for warmth, env in (("cold", lab.env), ("warm", warm)):
                ours = _times_said(lab.tool("ls", "-v", lab.url), env, (") in ", "answered in "))
                for number, what in enumerate(("connection", "first answer")):
                    yield (f"{what} {where}, {warmth}, ms", "node"), node[number]
                    yield (f"{what} {where}, {warmth}, ms", "python"), ours[number]


def _times_said(argv: Sequence[str], env: Mapping[str, str], words: Sequence[str]) -> list[float]:
    done = subprocess.run(argv, env=env, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return [float(done.stderr.partition(word)[2].split()[0]) for word in words]


def crowds(lab: Lab, rounds: int, sizes: Sequence[int] = (1, 10, 100)) -> Samples:
    """So many one-shots at once to one daemon, until the last has ended; none may fail."""
    with tempfile.TemporaryDirectory() as cache:
        warm = {**lab.env, "P2P_CLAUDE_CACHE": cache}
        wall_ms(lab.tool("ls", lab.url), warm)
        for _ in range(rounds):
            for size in sizes:
                figure = f"{size} at once, until the last has ended, ms"
                yield (figure, "node"), _crowd_ms(lab.node("ls"), lab.env, size)
                yield (figure, "python"), _crowd_ms(lab.tool("ls", lab.url), warm, size)


def _crowd_ms(argv: Sequence[str], env: Mapping[str, str], size: int) -> float:
    started = time.perf_counter()
    crowd = [subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL) for _ in range(size)]
    failed = sum(process.wait() != 0 for process in crowd)
    if failed:
        raise SystemExit(f"{failed} of {size} failed: {argv}")
    return (time.perf_counter() - started) * 1000


def write_long_session(data: Path, megabytes: int) -> None:
    """Put an ended session with so many megabytes of output into a data directory."""
    place = data / "sessions" / LONG_SESSION
    place.mkdir(mode=0o700, parents=True)
    info = {"session_id": LONG_SESSION, "claude_id": LONG_SESSION, "directory": "/", "created_at": 1}
    (place / "session.json").write_text(json.dumps({**info, "permission_mode": "plan", "state": "ended"}))
    size, seq = 0, 0
    with (place / "journal.jsonl").open("wb") as journal:
        while size < megabytes * 1_000_000:
            seq += 1
            text = f"line {seq} of what Claude said, with \\n and \u00fc in it. " * 20
            content = {"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}}
            head = f'{{"type":"session-output","seq":{seq},"timestamp":{seq},"data":'
            size += journal.write(f"{head}{json.dumps(content, ensure_ascii=False)}}}\n".encode())


def tails(lab: Lab, rounds: int, megabytes: int) -> Samples:
    """`tail` of a long journal, and the slowest reply to a second client's pings meanwhile."""
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(rounds):
            out = Path(directory, "out")
            with (
                subprocess.Popen(
                    [*lab.prefix, str(lab.bin / "python"), "-c", PINGS, "-c", "1000000", lab.url],
                    env=lab.env,
                    stdout=subprocess.PIPE,
                    text=True,
                ) as ping,
                out.open("wb") as file,
            ):
                started = time.perf_counter()
                subprocess.run(lab.tool("tail", lab.url, LONG_SESSION), env=lab.env, check=True, stdout=file)
                seconds = time.perf_counter() - started
                ping.terminate()
                assert ping.stdout is not None
                replies = [float(line.split()[0]) for line in ping.stdout]
            yield (f"tail of {megabytes} MB, MB/s", "python"), out.stat().st_size / 1e6 / seconds
            yield (f"slowest ping during tail of {megabytes} MB, ms", "python"), max(replies)
            yield (f"median ping during tail of {megabytes} MB, ms", "python"), statistics.median(replies)


def resident_megabytes(pid: int) -> float:
    """Return a process's resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def processor_seconds(pid: int) -> float:
    """Return the processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle(daemon: Peer, server: Peer, seconds: float) -> Samples:
    """A daemon that nobody asks, beside a bare Node server: memory, and processor time as a share of one core."""
    pids = {"node": server.process.pid, "python": daemon.process.pid}
    before = {who: processor_seconds(pid) for who, pid in pids.items()}
    time.sleep(seconds)
    for who, pid in pids.items():
        yield ("idle, MB resident", who), resident_megabytes(pid)
        yield ("idle, % of a core", who), 100 * (processor_seconds(pid) - before[who]) / seconds


@contextlib.contextmanager
def near_lab(tools: Path, megabytes: int) -> Iterator[tuple[Lab, Daemon, Peers]]:
    """A testnet, and a daemon with a long session, on loopback."""
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(peers_on([])).start("node", "testnet", size=6)
        peers = stack.enter_context(peers_on(net.ready["bootstrap"]))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        env = plain_environment(peers.bootstrap[0])
        data = str(place / "data")
        subprocess.run(tool_command("daemon", "--print-url", "--data-dir", data), check=True, stdout=subprocess.DEVNULL)
        write_long_session(place / "data", megabytes)
        daemon = start_daemon(peers, place, FAKE)
        yield Lab(tools, daemon.url, env), daemon, peers


@contextlib.contextmanager
def far_lab(tools: Path) -> Iterator[Lab]:
    """A testnet, a daemon and the tools, each on a host of its own, far apart. Needs root."""
    with contextlib.ExitStack() as stack:
        spaces = stack.enter_context(far_apart(FAR))
        peers = stack.enter_context(peers_on([]))
        dht = FAR["dht"][1]
        testnet = ["node", str(HERE / "node" / "testnet.js"), json.dumps({"hosts": dht, "bootstrap": []})]
        net = peers.run("testnet", in_namespace(spaces["dht"], testnet))
        (bootstrap,) = net.ready["bootstrap"]
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = ["--data-dir", str(place / "data"), "--claude", str(FAKE), "--bootstrap", bootstrap]
        argv = in_namespace(spaces["daemon"], tool_command("daemon", *options, "--host", FAR["daemon"][1][0]))
        peers.run("daemon", argv, ready="daemon-started", heeds_stdin=False)
        url = (place / "data" / "pairing.url").read_text().strip()
        yield Lab(tools, url, plain_environment(bootstrap), tuple(in_namespace(spaces["tool"], [])))


def near(rounds: int) -> Samples:
    """One-shots on loopback, and what a daemon takes that nobody asks."""
    with installed_tools() as tools, near_lab(tools, 0) as (lab, daemon, peers):
        server = peers.start("node", "server")
        time.sleep(2.0)
        yield from idle(daemon.peer, server, 20.0)
        yield from one_shots(lab, rounds, "on loopback")


def crowd(rounds: int) -> Samples:
    """Many one-shots at once."""
    with installed_tools() as tools, near_lab(tools, 0) as (lab, _, _):
        yield from crowds(lab, rounds)


def tail(rounds: int, megabytes: int) -> Samples:
    """A long journal."""
    with installed_tools() as tools, near_lab(tools, megabytes) as (lab, _, _):
        yield from tails(lab, rounds, megabytes)


def far(rounds: int) -> Samples:
    """Connecting and one-shots over 100 ms, in several networks."""
    with installed_tools() as tools:
        for done in range(0, rounds, FAR_ROUNDS):
            with far_lab(tools) as lab:
                yield from connects(lab, min(FAR_ROUNDS, rounds - done), "over 100 ms")
                yield from one_shots(lab, min(FAR_ROUNDS, rounds - done), "over 100 ms")
