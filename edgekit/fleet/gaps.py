"""Which sequence numbers of one boot have arrived: exact, compact, and the way to know a duplicate from a loss.

>>> seen = SeqRanges()
>>> [seen.add(seq) for seq in (1, 2, 4, 2)]
[True, True, True, False]
>>> seen.ranges, seen.count, seen.missing(5)
([(1, 2), (4, 4)], 3, 2)
>>> seen.add_range(2, 9), seen.ranges
(6, [(1, 9)])
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class SeqRanges:
    """A set of positive integers as sorted, disjoint, inclusive ranges."""

    __slots__ = ("_ends", "_starts", "count")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        pairs = list(ranges)
        self._starts = [start for start, _end in pairs]
        self._ends = [end for _start, end in pairs]
        self.count = sum(end - start + 1 for start, end in pairs)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges in order."""
        return list(zip(self._starts, self._ends, strict=True))

    @property
    def highest(self) -> int:
        """The highest number seen; 0 when none."""
        return self._ends[-1] if self._ends else 0

    def __contains__(self, seq: int) -> bool:
        index = bisect_right(self._starts, seq) - 1
        return index >= 0 and seq <= self._ends[index]

    def add(self, seq: int) -> bool:
        """Note a number.

        Returns:
            False when it was there already: a duplicate.
        """
        index = bisect_right(self._starts, seq) - 1
        if index >= 0 and seq <= self._ends[index]:
            return False
        joins_left = index >= 0 and self._ends[index] == seq - 1
        joins_right = index + 1 < len(self._starts) and self._starts[index + 1] == seq + 1
        if joins_left and joins_right:
            self._ends[index] = self._ends.pop(index + 1)
            del self._starts[index + 1]
        elif joins_left:
            self._ends[index] = seq
        elif joins_right:
            self._starts[index + 1] = seq
        else:
            self._starts.insert(index + 1, seq)
            self._ends.insert(index + 1, seq)
        self.count += 1
        return True

    def add_range(self, first: int, last: int) -> int:
        """Note all numbers from first to last; how many of them are new."""
        low, high = bisect_left(self._ends, first - 1), bisect_right(self._starts, last + 1)
        before = sum(self._ends[at] - self._starts[at] + 1 for at in range(low, high))
        if low < high:
            first, last = min(first, self._starts[low]), max(last, self._ends[high - 1])
        self._starts[low:high], self._ends[low:high] = [first], [last]
        added = last - first + 1 - before
        self.count += added
        return added

    def missing(self, highest: int) -> int:
        """How many of 1..highest have not arrived."""
        return max(0, max(highest, self.highest) - self.count)
