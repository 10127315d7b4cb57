"""A short share of `tests/soak/strangers`: little is kept of what strangers push, and they are let go of."""

import asyncio
from pathlib import Path

import pytest
from interop.daemons import start_daemon
from interop.harness import HERE, peers_on
from soak.strangers import KINDS, besiege, resident, start_strangers, status_with_a_wrong_key

SHARE = {"crumbs": 4_000_000, "frames": 60_000_000}


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_cost_little(kind: str, tmp_path: Path) -> None:
    with peers_on([]) as network:
        bootstrap = network.start("python", "testnet", size=4).ready["bootstrap"]
        with peers_on(bootstrap) as peers:
            daemon = start_daemon(peers, tmp_path, HERE / "fake_claude.py")
            strangers = start_strangers(peers, daemon)
            before = resident(daemon.peer.process.pid)
            push = {"kind": kind, "connections": 8, "bytes": SHARE.get(kind, 40_000_000)}
            siege = asyncio.run(besiege(daemon, strangers, bootstrap, before, push))
            assert siege.problems() == []
            assert status_with_a_wrong_key(daemon, bootstrap) == 77
