"""A set of integers as sorted, disjoint ranges: what arrived out of order, what the peer said it has (ring 1)."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """Disjoint half-open ranges in ascending order; adjacent ones are merged."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) in ascending order."""
        return zip(self._starts, self._ends, strict=True)

    def __contains__(self, value: int) -> bool:
        """Tell whether a number lies in one of the ranges."""
        i = bisect_right(self._starts, value) - 1
        return i >= 0 and value < self._ends[i]

    @property
    def highest(self) -> int | None:
        """The largest number in the set."""
        return self._ends[-1] - 1 if self._ends else None

    def end_behind(self, value: int) -> int:
        """Return the end of the range that contains `value`, or `value` itself if none does."""
        i = bisect_right(self._starts, value) - 1
        return self._ends[i] if i >= 0 and value < self._ends[i] else value

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Add [start, end) and return the parts of it that were missing until now."""
        starts, ends = self._starts, self._ends
        first = bisect_left(ends, start)  # the first range that touches or follows [start, end)
        if first < len(starts) and starts[first] <= start and end <= ends[first]:
            return []
        last = bisect_right(starts, end)  # behind the last range that touches it
        missing = []
        position = start
        for i in range(first, last):
            if position < starts[i]:
                missing.append((position, starts[i]))
            position = ends[i]
        if position < end:
            missing.append((position, end))
        if first < last:
            start, end = min(start, starts[first]), max(end, ends[last - 1])
        starts[first:last] = [start]
        ends[first:last] = [end]
        return missing

    def discard_below(self, value: int) -> None:
        """Forget all numbers below `value`."""
        starts, ends = self._starts, self._ends
        if not starts or starts[0] >= value:
            return
        i = bisect_right(ends, value)
        del starts[:i], ends[:i]
        if starts and starts[0] < value:
            starts[0] = value

    def edges(self, limit: int) -> list[tuple[int, int]]:
        """Return at most `limit` ranges: all, or as many of the lowest as of the highest."""
        if len(self._starts) <= limit:
            return list(self)
        half = limit // 2
        low = zip(self._starts[:half], self._ends[:half], strict=True)
        high = zip(self._starts[-half:], self._ends[-half:], strict=True)
        return [*low, *high]
