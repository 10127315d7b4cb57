"""Fixtures of the NAT tests: one public network with DHT nodes for the session, homes and peers for a test.

The tests need root, `ip` and `nft`, and say loudly when they are skipped. What they do once, `python -m nat.measure`
does many times (see measure.py).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pytest
from interop.harness import Peers, Side, missing_node, peers_on
from nat.lab import PUBLIC_HOSTS, Home, Kind, Lab, missing_tools, remove_stale
from nat.peers import Dwellers, nodes_of

MakeHome = Callable[[Kind], Home]

_groups: list[Peers] = []


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Give the session's laboratory; what killed runs left is removed first."""
    missing = missing_tools()
    if missing:
        pytest.skip(missing)
    remove_stale()
    with Lab() as lab:
        yield lab


@pytest.fixture
def home(lab: Lab) -> Iterator[MakeHome]:
    """Give a maker of homes; all of them go with the test."""
    made: list[Home] = []

    def make(kind: Kind) -> Home:
        made.append(lab.home(kind))
        return made[-1]

    yield make
    for one in made:
        lab.remove(one)


def _nodes(lab: Lab, side: Side, hosts: Sequence[str]) -> Iterator[list[str]]:
    with nodes_of(lab, side, hosts) as group:
        _groups.append(group)
        yield group.bootstrap
        _groups.remove(group)


@pytest.fixture(scope="session")
def node_network(lab: Lab) -> Iterator[list[str]]:
    """Run six Node DHT nodes, each on an address of its own, for the session; give where to begin."""
    missing = missing_node()
    if missing:
        pytest.skip(missing)
    yield from _nodes(lab, "node", PUBLIC_HOSTS[:6])


@pytest.fixture(scope="session")
def python_network(lab: Lab) -> Iterator[list[str]]:
    """Run six Python DHT nodes, each on an address of its own, for the session; give where to begin."""
    yield from _nodes(lab, "python", PUBLIC_HOSTS[10:16])


@pytest.fixture
def dwellers(node_network: list[str]) -> Iterator[Dwellers]:
    """Give a starter of peers on the network of Node nodes; all of them end with the test."""
    yield from _dwellers(node_network)


@pytest.fixture
def python_dwellers(python_network: list[str]) -> Iterator[Dwellers]:
    """Give a starter of peers on the network of Python nodes; all of them end with the test."""
    yield from _dwellers(python_network)


def _dwellers(bootstrap: list[str]) -> Iterator[Dwellers]:
    with peers_on(bootstrap) as group:
        _groups.append(group)
        yield Dwellers(group)
        _groups.remove(group)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add what every peer printed to the report of a failed test."""
    report = yield
    if report.failed:
        for group in _groups:
            report.sections.extend((peer.name, peer.transcript()) for peer in group.running)
    return report
