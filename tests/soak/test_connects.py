"""A short share of `tests/soak/connects`: visits leave nothing behind, and a flood of handshakes starves nobody."""

from collections.abc import Iterator

import pytest
from interop.harness import Peer, Peers, peers_on
from soak.connects import FLOOD_MEMORY, KEPT_RATE, measure_flood, measure_visits, start

VISITS = 600
LINGER_S = 3.0  # instead of 15 s, for the last closed stream is waited for twice
FLOOD_COST = 0.35  # of a processor
LINGERING_BYTES = 25_000  # what a closed stream holds until it is forgotten, at most


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Peers, Peer]]:
    """Run a server under test in a network of Python nodes."""
    with peers_on([]) as network:
        bootstrap = network.start("python", "testnet", size=4).ready["bootstrap"]
        with peers_on(bootstrap) as peers:
            yield peers, start(peers, "serving", linger=LINGER_S)


def test_connects_leave_nothing_behind(loaded: tuple[Peers, Peer]) -> None:
    peers, server = loaded
    visits = measure_visits(peers, server, clients=40, warm_up=VISITS, connects=VISITS)
    assert (visits.ok, visits.failed) == (VISITS, {})
    for name in ("fds", "tasks", "streams", "pending", "open"):
        assert visits.after[name] == visits.before[name], name
    # A heap keeps the size of its busiest moment, and how many streams wait together then depends on the machine.
    assert visits.after["rss"] - visits.before["rss"] < VISITS * LINGERING_BYTES


def test_a_flood_of_handshakes_starves_nobody(loaded: tuple[Peers, Peer]) -> None:
    peers, server = loaded
    flood = measure_flood(peers, server, rate=1000, seconds=4)
    calm, flooded, _ = flood.rates
    # By processor time: other tests run beside this one. If they leave little of it, even a cheap flood takes much of
    # that; without limits a thousand handshakes a second would take more than half a processor.
    assert flooded.efficiency > calm.efficiency * KEPT_RATE or flood.cost < FLOOD_COST, flood.rates
    assert flood.failed == {} and len(flood.legitimate_ms) > 0
    assert flood.memory < FLOOD_MEMORY
    assert 0 < flood.worst["pending"] <= 256
