"""The releases of `hyperdht` before the pinned one, beside Python: connections both ways, echo, records, topics."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from interop.harness import Peer, Peers, Side, missing_node, peers_on

VERSIONS = ("6.32.0", "6.33.0")
PAIRS: list[tuple[Side, Side]] = [("python", "node"), ("node", "python")]
MEGABYTE = 1 << 20


def alias(version: str) -> str:
    """Return the name a version has in package.json."""
    return f"hyperdht-{version.rpartition('.')[0]}"


@dataclass(frozen=True)
class Network:
    """Peers on a network of one version's nodes, or of Python nodes; what is Node's is of that version."""

    peers: Peers
    version: str
    seed: str  # of keys and topics, another one for each test

    def start(self, side: Side, script: str) -> Peer:
        """Start a peer."""
        return self.peers.start(side, script, hyperdht=alias(self.version))


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Give each version, if it is installed."""
    missing = missing_node(alias(request.param))
    if missing:
        pytest.skip(missing)
    return str(request.param)


@pytest.fixture(scope="module", params=["node", "python"])
def bootstrap(request: pytest.FixtureRequest, version: str) -> Iterator[list[str]]:
    """Run a network of nodes of that version, or of Python nodes."""
    with peers_on([]) as group:
        ready = group.start(request.param, "testnet", size=6, hyperdht=alias(version)).ready
        assert ready.get("version") == (version if request.param == "node" else None)
        yield ready["bootstrap"]


@pytest.fixture
def network(request: pytest.FixtureRequest, version: str, bootstrap: list[str]) -> Iterator[Network]:
    """Give a starter of peers."""
    with peers_on(bootstrap) as group:
        yield Network(group, version, hashlib.sha256(request.node.name.encode()).hexdigest())


@pytest.mark.parametrize(("server_side", "client_side"), PAIRS)
def test_connections_and_echo(network: Network, server_side: Side, client_side: Side) -> None:
    server, client = network.start(server_side, "server"), network.start(client_side, "client")
    key = server.ready["publicKey"]
    client.tell("connect", key=key, job="echo", bytes=MEGABYTE + 7, timeout=25_000)
    result = client.expect("result")
    assert result["ok"] and result["bytes"] == MEGABYTE + 7, result
    assert server.expect("closed")["error"] is None
    client.tell("connect", key=key, count=20, parallel=5, timeout=25_000)
    results = [client.expect("result") for _ in range(20)]
    assert [result for result in results if not result["ok"]] == []


@pytest.mark.parametrize(("writer_side", "reader_side"), PAIRS)
def test_records_and_topics(network: Network, writer_side: Side, reader_side: Side) -> None:
    writer, reader = network.start(writer_side, "records"), network.start(reader_side, "records")
    seed, value = network.seed, ("v" * 900).encode().hex()
    key = writer.ask("mutable-put", seed=seed, value=value, seq=7)["publicKey"]
    found = reader.ask("mutable-get", publicKey=key)
    assert (found["seq"], found["value"]) == (7, value)
    target = writer.ask("immutable-put", value=value)["target"]
    assert reader.ask("immutable-get", target=target)["value"] == value
    writer.ask("announce", target=seed, seed=seed)
    assert reader.ask("lookup", target=seed)["peers"] == [key]
    writer.ask("unannounce", target=seed, seed=seed)
    assert reader.ask("lookup", target=seed)["peers"] == []
