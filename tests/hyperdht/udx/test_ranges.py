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
