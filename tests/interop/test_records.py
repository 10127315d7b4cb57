"""DHT records between Node and Python, through Node nodes and through Python nodes."""

import hashlib
from collections.abc import Iterator

import pytest
from interop.harness import Peer, Peers, Side, peers_on

PAIRS: list[tuple[Side, Side]] = [("python", "node"), ("node", "python")]


@pytest.fixture(scope="module")
def python_net(testnet: Peer) -> Iterator[Peer]:
    """Run a network whose only persistent nodes are Python ones."""
    with peers_on([]) as group:
        yield group.start("python", "testnet", size=6)


@pytest.fixture(params=["node nodes", "python nodes"])
def group(request: pytest.FixtureRequest, testnet: Peer, python_net: Peer) -> Iterator[Peers]:
    """Give a starter of peers on either network."""
    net = testnet if request.param == "node nodes" else python_net
    with peers_on(net.ready["bootstrap"]) as peers:
        yield peers


def seed_of(*parts: object) -> str:
    """Make a key seed (or topic) of its own for each case, so that cases do not share records."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@pytest.mark.parametrize(("writer_side", "reader_side"), PAIRS)
def test_mutable_records(group: Peers, writer_side: Side, reader_side: Side) -> None:
    writer, reader = group.start(writer_side, "records"), group.start(reader_side, "records")
    seed = seed_of(writer_side, "mutable")
    key = writer.ask("mutable-put", seed=seed, value=b"first".hex(), seq=1)["publicKey"]
    assert reader.ask("mutable-get", publicKey=key)["value"] == b"first".hex()
    writer.ask("mutable-put", seed=seed, value=("v" * 900).encode().hex(), seq=7)
    found = reader.ask("mutable-get", publicKey=key)
    assert (found["seq"], found["value"]) == (7, ("v" * 900).encode().hex())
    assert reader.ask("mutable-get", publicKey=key, seq=8)["missing"]


@pytest.mark.parametrize(("writer_side", "reader_side"), PAIRS)
def test_immutable_records(group: Peers, writer_side: Side, reader_side: Side) -> None:
    writer, reader = group.start(writer_side, "records"), group.start(reader_side, "records")
    value = f"from {writer_side}".encode().hex()
    target = writer.ask("immutable-put", value=value)["target"]
    assert reader.ask("immutable-get", target=target)["value"] == value
    assert reader.ask("immutable-get", target="00" * 32)["missing"]


@pytest.mark.parametrize(("writer_side", "reader_side"), PAIRS)
def test_topics(group: Peers, writer_side: Side, reader_side: Side) -> None:
    writer, reader = group.start(writer_side, "records"), group.start(reader_side, "records")
    topic, seed = seed_of(writer_side, "topic"), seed_of(writer_side, "announcer")
    writer.ask("announce", target=topic, seed=seed)
    peers = reader.ask("lookup", target=topic)["peers"]
    assert len(peers) == 1
    writer.ask("unannounce", target=topic, seed=seed)
    assert reader.ask("lookup", target=topic)["peers"] == []


def test_a_stale_sequence_number_is_an_error_in_python(group: Peers) -> None:
    writer = group.start("python", "records")
    seed = seed_of("stale")
    writer.ask("mutable-put", seed=seed, value=b"a".hex(), seq=5)
    for seq, code in ((5, "SEQ_REUSED"), (4, "SEQ_TOO_LOW")):
        writer.tell("mutable-put", seed=seed, value=b"b".hex(), seq=seq)
        error = writer.expect("failed")["error"]
        assert error["code"] == "RemoteError" and code in error["message"]


def test_python_nodes_answer_a_stale_sequence_number(python_net: Peer) -> None:
    with peers_on(python_net.ready["bootstrap"]) as peers:
        writer = peers.start("node", "records")
        seed, node = seed_of("asked"), python_net.ready["nodes"][2]
        values = {"node": node, "seed": seed}
        assert writer.ask("ask-mutable-put", value=b"a".hex(), seq=5, **values)["error"] == 0
        assert writer.ask("ask-mutable-put", value=b"a".hex(), seq=5, **values)["error"] == 0
        assert writer.ask("ask-mutable-put", value=b"b".hex(), seq=5, **values)["error"] == 16
        assert writer.ask("ask-mutable-put", value=b"b".hex(), seq=4, **values)["error"] == 17
