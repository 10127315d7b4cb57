"""Fixtures of the interoperability tests: a Node network for the session, peers for a test."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from interop.harness import Peer, Peers, Tools, missing_node, peers_on, real_claude

_groups: list[Peers] = []


@pytest.fixture(scope="session")
def testnet() -> Iterator[Peer]:
    """Run six Node DHT nodes for the whole session; `.ready["bootstrap"]` is their address."""
    missing = missing_node()
    if missing:
        pytest.skip(missing)
    with peers_on([]) as group:
        _groups.append(group)
        yield group.start("node", "testnet", size=6)
        _groups.remove(group)


@pytest.fixture
def peers(testnet: Peer) -> Iterator[Peers]:
    """Give a starter of peers on the session's network; all of them end with the test."""
    with peers_on(testnet.ready["bootstrap"]) as group:
        _groups.append(group)
        yield group
        _groups.remove(group)


@pytest.fixture(scope="session")
def tools(testnet: Peer) -> Tools:
    """Give a runner of the command line tools on the session's network."""
    return Tools(testnet.ready["bootstrap"])


@pytest.fixture(scope="session")
def claude() -> Path:
    """Give the real claude of the pinned npm package."""
    path = real_claude()
    if path is None:
        pytest.skip("no claude in the Node packages, run `npm ci` in tests/interop: THE REAL claude IS NOT TESTED")
    return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add what every peer printed to the report of a failed test."""
    report = yield
    if report.failed:
        for group in _groups:
            report.sections.extend((peer.name, peer.transcript()) for peer in group.running)
    return report
