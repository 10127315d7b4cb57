"""Streams through a UDP proxy that loses, doubles and reorders, Node and Python at its ends.

The server is a private network of its own (a bootstrap node that listens) and the client knows only the proxy's
address, as behind a forwarded port: every datagram of the DHT, the handshake and the stream takes the proxy's road.
"""

import base64
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from interop.daemons import start_daemon
from interop.harness import HERE, Event, Peer, Peers, Side, Tools
from kit.free_ports import free_port

BYTES = 1_000_003
MUCH = 0.2
TOGETHER: list[tuple[Side, Side]] = [("python", "node"), ("node", "python"), ("node", "node")]


def exchange(client: Peer, key: str, job: str, loss: float) -> Event:
    """Run one job; a connect may fail where every packet counts, and is then tried again: streams are tested here.

    Where much is lost a stream has a second chance, not for wrong bytes but for time: a Node whose repeat is lost waits
    for one second, then for two, four and so on. Each is of a fresh node: one that was connected before remembers the
    server's own address and goes around the proxy.
    """
    for attempt in range(4):
        client.tell("connect", key=key, job=job, bytes=BYTES, timeout=40_000, fresh=True)
        result = client.expect("result", timeout=45)
        if result["opened"] and (attempt or loss < MUCH or "error" not in result):
            break
    return result


def datagrams(proxy: Peer) -> int:
    """Return how many datagrams the proxy has let through."""
    stats = proxy.ask("stats")
    return int(stats.get("passed", 0)) + int(stats.get("moved", 0))


@pytest.mark.parametrize("loss", [0, 0.01, 0.05, MUCH])
@pytest.mark.parametrize(("server_side", "client_side"), TOGETHER)
def test_every_byte_survives(peers: Peers, server_side: Side, client_side: Side, loss: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, 300)  # for both jobs and their second chances
    port = free_port()
    server = peers.start(server_side, "server", private=port, bootstrap=[])
    dice: dict[str, Any] = {"loss": loss, "duplicate": loss / 4, "reorder": loss, "seed": 20_000 + round(loss * 100)}
    proxy = peers.start("python", "proxy", target=f"127.0.0.1:{port}", **dice)
    client = peers.start(client_side, "client", bootstrap=[proxy.ready["address"]])
    for job in ("sink", "source"):
        before = datagrams(proxy)
        result = exchange(client, server.ready["publicKey"], job, loss)
        assert result["ok"], (result, proxy.ask("stats"))
        assert datagrams(proxy) - before > BYTES / 1500
    assert loss == 0 or proxy.ask("stats")["lost"] > 0


def test_the_tools_through_a_bad_road(peers: Peers, tmp_path: Path) -> None:
    """A daemon in a network of its own, five datagrams in a hundred lost: a question, its answer, and 3 MB of it."""
    daemon = start_daemon(peers, tmp_path, HERE / "fake_claude.py", "--private", "--port", str(free_port()))
    code = json.loads(base64.b64decode(daemon.url.partition("code=")[2]))
    [address] = code["metadata"]["bootstrap"]
    proxy = peers.start("python", "proxy", target=address, loss=0.05, duplicate=0.01, reorder=0.02, seed=20_500)
    tools = Tools([proxy.ready["address"]])
    assert tools.succeed("send", "-w", daemon.url, "hello") == "echo: hello"
    assert tools.succeed("send", "-w", daemon.url, f"BIG:{3 << 20}") == "z" * (3 << 20)
    passed = proxy.ask("stats")
    assert passed["lost"] > 0 and passed["passed"] > 2000, passed
