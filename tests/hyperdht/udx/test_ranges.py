"""The range set against a plain set of integers."""

from hypothesis import given
from hypothesis import strategies as st

from p2pclaude.hyperdht.udx.ranges import RangeSet

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=30)


def flat(ranges: list[tuple[int, int]]) -> list[int]:
    return [value for start, end in ranges for value in range(start, end)]


@given(RANGES, st.integers(0, 70))
def test_behaves_like_a_set(additions: list[tuple[int, int]], cut: int) -> None:
    ranges, model = RangeSet(), set[int]()
    for start, length in additions:
        wanted = set(range(start, start + length))
        assert flat(ranges.add(start, start + length)) == sorted(wanted - model)
        model |= wanted
    assert flat(list(ranges)) == sorted(model)
    assert ranges.highest == max(model, default=None)
    assert all((value in ranges) == (value in model) for value in range(80))
    starts_and_ends = [edge for pair in ranges for edge in pair]
    assert starts_and_ends == sorted(set(starts_and_ends)), "ranges that touch are one"
    ranges.discard_below(cut)
    assert flat(list(ranges)) == sorted(value for value in model if value >= cut)


def test_end_behind_a_value() -> None:
    ranges = RangeSet()
    ranges.add(5, 8)
    assert [ranges.end_behind(value) for value in (4, 5, 7, 8)] == [4, 8, 8, 8]


def test_edges_keeps_the_lowest_and_the_highest() -> None:
    ranges = RangeSet()
    for start in range(0, 40, 2):
        ranges.add(start, start + 1)
    assert ranges.edges(4) == [(0, 1), (2, 3), (36, 37), (38, 39)]
    assert len(ranges.edges(100)) == 20


def test_how_many_ranges_there_are() -> None:
    ranges = RangeSet()
    assert len(ranges) == 0 and not ranges
    ranges.add(1, 3)
    ranges.add(5, 6)
    assert len(ranges) == 2
    ranges.add(3, 5)
    assert len(ranges) == 1 and list(ranges) == [(1, 6)]


def test_what_is_discarded_ends_where_it_should() -> None:
    ranges = RangeSet()
    ranges.add(10, 20)
    for below, left in [(9, [(10, 20)]), (10, [(10, 20)]), (11, [(11, 20)]), (19, [(19, 20)]), (20, [])]:
        ranges.discard_below(below)
        assert list(ranges) == left
    ranges.discard_below(99)
    assert list(ranges) == []
