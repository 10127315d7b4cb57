"""The routing table, against a plain list of nodes."""

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pclaude.hyperdht.node.routing import OLD_TICKS, RECENT_TICKS, RoutingTable, TableNode
from p2pclaude.hyperdht.rpc.messages import node_id

PROPERTY = settings(max_examples=100, derandomize=True, deadline=None)
ME = node_id(("127.0.0.1", 10001))


def node(number: int, tick: int = 0) -> TableNode:
    """Return a node at an address of its own."""
    return TableNode.at((f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 49737), tick)


def node_of(id: bytes) -> TableNode:
    """Return a node with a chosen id."""
    return TableNode(id, "10.0.0.1", 1)


def near(id: bytes, bit: int, rng: random.Random) -> bytes:
    """Return a random id that shares exactly the first `bit` bits with `id`."""
    number = int.from_bytes(id, "big") ^ 1 << (255 - bit)
    return (number ^ rng.getrandbits(255 - bit)).to_bytes(32, "big") if bit < 255 else number.to_bytes(32, "big")


def by_distance(nodes: Sequence[TableNode], target: bytes) -> list[TableNode]:
    """Sort nodes as the protocol defines closeness."""
    return sorted(nodes, key=lambda n: bytes(a ^ b for a, b in zip(n.id, target, strict=True)))


def filled(count: int, seed: int = 1, k: int = 20) -> RoutingTable:
    """Return a table that was offered so many random nodes."""
    rng = random.Random(seed)
    table = RoutingTable(ME, k)
    for _ in range(count):
        table.add(node(rng.getrandbits(24)))
    return table


def test_node_id_is_that_of_the_address() -> None:
    assert ME.hex() == "e96e0146a33e022987fe256c6343ac5d20dba47ea1b6341f932903b48469453e"
    assert node(1, tick=7).id == node_id(node(1).address)
    assert (node(1, tick=7).added, node(1, tick=7).pinged, node(1, tick=7).seen) == (7, 7, 7)


@pytest.mark.parametrize("seed", range(5))
def test_closest_are_truly_the_closest_and_sorted(seed: int) -> None:
    rng = random.Random(seed)
    table = filled(3000, seed)
    targets = [rng.randbytes(32) for _ in range(30)]
    targets += [near(ME, bit, rng) for bit in (0, 1, 5, 8, 60, 255)]
    targets += [ME, bytes(32), b"\xff" * 32, next(iter(table)).id]
    for target in targets:
        for k in (0, 1, 20, 33, 1000):
            assert table.closest(target, k) == by_distance(list(table), target)[:k]
        assert table.closest(target) == table.closest(target, 20)


@PROPERTY
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=40), st.binary(min_size=32, max_size=32))
def test_closest_of_any_ids(ids: list[bytes], target: bytes) -> None:
    table = RoutingTable(ME)
    for id in ids:
        table.add(node_of(id))
    assert table.closest(target) == by_distance(list(table), target)[:20]


def test_near_rows_are_kept_apart() -> None:
    rng = random.Random(3)
    table = RoutingTable(ME, k=2)
    for bit in range(240):  # from there on random ids meet again
        assert [table.add(node_of(near(ME, bit, rng))) for _ in range(3)] == [True, True, False]
    assert [table.add(node_of(near(ME, 255, rng))) for _ in range(2)] == [True, False]
    assert len(table) == 2 * 240 + 1


def test_a_node_is_added_once_and_we_never() -> None:
    table = RoutingTable(ME)
    first = node(1)
    assert table.add(first)
    assert not table.add(node(1))
    assert table.get(first.id) is first
    assert not table.add(node_of(ME))
    assert len(table) == 1
    assert first.id in table
    assert ME not in table


def test_a_removed_node_is_gone_from_every_view() -> None:
    table = filled(500)
    size, gone = len(table), table.closest(ME)[3]
    assert table.remove(gone.id)
    assert not table.remove(gone.id)
    assert len(table) == size - 1
    assert table.get(gone.id) is None
    assert gone not in table.closest(ME, 1000)
    assert gone not in table.oldest()
    assert table.add(gone)


def test_nodes_are_ordered_by_last_contact() -> None:
    table = RoutingTable(ME)
    a, b, c = node(1), node(2), node(3)
    for each in (a, b, c):
        table.add(each)
    table.touch(a)
    assert table.oldest() == [b, c, a]
    assert table.latest() == [a, c, b]
    assert table.oldest(2) == [b, c]
    assert table.latest(1) == [a]
    table.touch(node(2))  # an equal node that is not the table's
    table.touch(node(9))
    assert table.oldest() == [b, c, a]


def test_views_do_not_change_while_they_are_used() -> None:
    table = filled(100)
    for each in table.oldest():
        table.touch(each)
        table.remove(each.id)
    assert len(table) == 0
    assert table.closest(ME) == []
    assert table.random(random.Random(1)) is None


def test_random_reaches_every_node() -> None:
    table, rng = RoutingTable(ME), random.Random(1)
    for i in range(5):
        table.add(node(i))
    assert {table.random(rng) for _ in range(200)} == set(table)


def row_of(count: int) -> tuple[RoutingTable, list[TableNode], bytes]:
    """Return a table with one full row of `count` nodes, the nodes, and an id that the row keeps out."""
    rng = random.Random(2)
    table = RoutingTable(ME, k=count)
    nodes = [node_of(near(ME, 0, rng)) for _ in range(count)]
    assert all(map(table.add, nodes))
    return table, nodes, near(ME, 0, rng)


def test_a_full_row_names_its_nodes_longest_without_ping_first() -> None:
    table, [a, b, c], newcomer = row_of(3)
    a.pinged, b.pinged, c.pinged = 30, 20, 20
    b.added, c.added = 5, 4
    assert not table.add(node_of(newcomer))
    assert table.full_row(newcomer) == [c, b, a]
    assert table.full_row(near(ME, 1, random.Random(1))) == []
    table.remove(a.id)
    assert table.full_row(newcomer) == []
    assert table.replaceable(newcomer, 100) is None


def test_the_node_to_replace_is_the_one_longest_without_ping() -> None:
    table, [a, b], newcomer = row_of(2)
    a.pinged, b.pinged = 100, 50
    assert table.replaceable(newcomer, 100) is b
    b.pinged = 100
    assert table.replaceable(newcomer, 100) is None  # all pinged in this tick
    assert table.replaceable(newcomer, 101) is a


def test_a_fresh_node_that_proved_itself_stays() -> None:
    table, [only], newcomer = row_of(1)
    tick = OLD_TICKS + 10
    only.added, only.pinged = 0, tick - RECENT_TICKS + 1
    assert table.replaceable(newcomer, tick) is None
    only.pinged = tick - RECENT_TICKS
    assert table.replaceable(newcomer, tick) is only
    only.pinged, only.added = tick - 1, tick - OLD_TICKS
    assert table.replaceable(newcomer, tick) is only


def test_rebuilding_keeps_nodes_and_their_order() -> None:
    table = filled(60, k=100)
    before = table.oldest()
    id = node_id(("127.0.0.1", 10002))
    table.rebuild(id)
    assert table.id == id
    assert table.oldest() == before
    target = random.Random(4).randbytes(32)
    assert table.closest(target, 100) == by_distance(before, target)


def test_rebuilding_drops_the_oldest_of_a_row_that_overflows() -> None:
    rng = random.Random(5)
    table = RoutingTable(bytes(32), k=3)
    nodes = [node_of(near(bytes(32), bit, rng)) for bit in range(10)]
    assert all(map(table.add, nodes))
    table.rebuild(b"\xff" * 32)  # all but the first share no bit with it
    assert table.oldest() == [nodes[0], *nodes[-3:]]


def test_rebuilding_with_the_id_of_a_node_drops_that_node() -> None:
    table = filled(20)
    twin = table.latest()[0]
    table.rebuild(twin.id)
    assert twin.id not in table


def test_thousands_of_lookups_are_cheap() -> None:
    table, rng = filled(20000), random.Random(6)
    targets = [rng.randbytes(32) for _ in range(5000)]
    began = time.process_time()
    for target in targets:
        table.closest(target)
    assert time.process_time() - began < 2  # about 0.2


@pytest.mark.parametrize("size", [0, 31, 33])
def test_an_id_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        RoutingTable(bytes(size))
