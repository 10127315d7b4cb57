"""The Python daemon as a process, for the tests that put Node clients and our tools before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from interop.harness import Peer, Peers, tool_command


@dataclass(frozen=True)
class Daemon:
    """A running daemon, its data directory, its root directory and its pairing URL."""

    peer: Peer
    data: Path
    root: Path

    @property
    def url(self) -> str:
        """Return the pairing URL."""
        return (self.data / "pairing.url").read_text().strip()


def start_daemon(
    peers: Peers, directory: Path, claude: Path, *options: str, env: Mapping[str, str] | None = None
) -> Daemon:
    """Start a daemon whose home, data and root lie in `directory`; returns when it serves."""
    home, data, root = (directory / name for name in ("home", "data", "root"))
    for path in (home, root):
        path.mkdir(exist_ok=True)
    arguments = ["--data-dir", str(data), "--root-dir", str(root), "--host", "127.0.0.1", "--claude", str(claude)]
    if "--private" not in options:
        arguments += ["--bootstrap", ",".join(peers.bootstrap)]
    argv = tool_command("daemon", *arguments, *options)
    env = {"HOME": str(home), **(env or {})}
    peer = peers.run("python daemon", argv, env=env, ready="daemon-started", heeds_stdin=False)
    return Daemon(peer, data, root)
