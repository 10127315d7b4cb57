"""Peers in the laboratory: DHT nodes in the public network, servers and clients in homes, one connection a pair."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from interop.harness import Event, Peer, Peers, Side, command, peers_on
from nat.lab import Home, Kind, Lab

PATIENCE = 45.0
"""Seconds for one exchange: Node sends its last random probe after 35."""


class Dwellers:
    """Starts peers in homes, on one network, and ends them all."""

    def __init__(self, group: Peers) -> None:
        self.group = group

    def start(self, home: Home, side: Side, script: str, **config: Any) -> Peer:
        """Start a peer script on a home's host and wait until it is ready."""
        config = {"bootstrap": self.group.bootstrap, "host": "0.0.0.0", **config}
        name = f"{side} {script} ({home.kind}, {home.public})"
        return self.group.run(name, home.command(command(side, script, config)))


@contextlib.contextmanager
def nodes_of(lab: Lab, side: Side, hosts: Sequence[str]) -> Iterator[Peers]:
    """Run persistent DHT nodes, one on each of these public addresses; the first one is where to begin."""
    with peers_on([]) as group:
        nodes = group.run(f"{side} nodes", lab.command(command(side, "testnet", {"hosts": list(hosts)})))
        group.bootstrap = nodes.ready["bootstrap"]
        yield group


@contextlib.contextmanager
def homes_of(lab: Lab, *kinds: Kind) -> Iterator[list[Home]]:
    """Give homes of these kinds, removed at exit."""
    made: list[Home] = []
    try:
        for kind in kinds:
            made.append(lab.home(kind))
        yield made
    finally:
        for home in made:
            lab.remove(home)


def exchange(client: Peer, server: Peer, **options: Any) -> Event:
    """Connect once and send 50,000 bytes there and back; returns the client's `result`, whatever it says."""
    options = {"bytes": 50_000, "timeout": PATIENCE * 1000, **options}
    client.tell("connect", key=server.ready["publicKey"], **options)
    return client.expect("result", PATIENCE + 5)
