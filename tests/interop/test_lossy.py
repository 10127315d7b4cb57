"""Streams through a UDP proxy that loses, doubles and reorders, Node and Python at its ends.

The server is a private network of its own (a bootstrap node that listens) and the client knows only the proxy's
address, as behind a forwarded port: every datagram of the DHT, the handshake and the stream takes the proxy's road.
"""

import socket
from typing import Any

import pytest
from interop.harness import Event, Peer, Peers, Side

BYTES = 1_000_003
TOGETHER: list[tuple[Side, Side]] = [("python", "node"), ("node", "python"), ("node", "node")]


def free_port() -> int:
    """Find a UDP port that nobody uses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def exchange(client: Peer, key: str, job: str) -> Event:
    """Run one job; a connect may fail where every packet counts, and is then tried again: streams are tested here."""
    for _ in range(4):
        client.tell("connect", key=key, job=job, bytes=BYTES, timeout=40_000)
        result = client.expect("result", timeout=45)
        if result["opened"]:
            break
    return result


@pytest.mark.parametrize("loss", [0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize(("server_side", "client_side"), TOGETHER)
def test_every_byte_survives(peers: Peers, server_side: Side, client_side: Side, loss: float) -> None:
    port = free_port()
    server = peers.start(server_side, "server", private=port, bootstrap=[])
    dice: dict[str, Any] = {"loss": loss, "duplicate": loss / 4, "reorder": loss, "seed": 20_000 + round(loss * 100)}
    proxy = peers.start("python", "proxy", target=f"127.0.0.1:{port}", **dice)
    client = peers.start(client_side, "client", bootstrap=[proxy.ready["address"]])
    for job in ("sink", "source"):
        result = exchange(client, server.ready["publicKey"], job)
        assert result["ok"], (result, proxy.ask("stats"))
    passed = proxy.ask("stats")
    assert passed["passed"] > BYTES / 1500 and (loss == 0 or passed["lost"] > 0)
