"""A short share of `tests/soak/strangers`: little is kept of what strangers push, and they are let go of."""

import asyncio
from collections.abc import Iterator

import pytest
from interop.daemons import start_daemon
from interop.harness import HERE, peers_on
from soak.strangers import KINDS, Siege, besiege, resident, start_strangers, status_with_a_wrong_key

SHARE = {"crumbs": 4_000_000, "frames": 60_000_000}


@pytest.fixture(scope="module")
def sieges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Siege, int]]]:
    """Besiege a daemon with each kind, all at once, for most of the time goes by until the strangers are let go of.

    Give what came of it, and the exit status of a tool with a wrong key afterwards.
    """
    with peers_on([]) as network:
        bootstrap = network.start("python", "testnet", size=4).ready["bootstrap"]
        with peers_on(bootstrap) as peers:
            daemons = {
                kind: start_daemon(peers, tmp_path_factory.mktemp(kind), HERE / "fake_claude.py") for kind in KINDS
            }

            async def besiege_all() -> list[Siege]:
                return await asyncio.gather(
                    *(
                        besiege(
                            daemon,
                            start_strangers(peers, daemon),
                            bootstrap,
                            resident(daemon.peer.process.pid),
                            {"kind": kind, "connections": 8, "bytes": SHARE.get(kind, 40_000_000)},
                        )
                        for kind, daemon in daemons.items()
                    )
                )

            outcomes = asyncio.run(besiege_all())
            statuses = [status_with_a_wrong_key(daemon, bootstrap) for daemon in daemons.values()]
            yield dict(zip(KINDS, zip(outcomes, statuses, strict=True), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_cost_little(kind: str, sieges: dict[str, tuple[Siege, int]]) -> None:
    siege, status = sieges[kind]
    assert siege.pushed["connects"] > 0
    assert siege.problems() == []
    assert status == 77
