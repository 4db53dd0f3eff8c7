"""Exact arithmetic with sets of intervals: integer nanoseconds in numpy arrays, in O(n log n)."""

from __future__ import annotations

import numpy as np


class Intervals:
    """A set of times as disjoint, ordered, non-touching intervals of positive length.

    Attributes:
        starts, ends: int64 [n], nanoseconds.
    """

    def __init__(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Of arrays that have this form already; see `union`."""
        self.starts, self.ends = starts, ends
        self._before = np.concatenate([[0], np.cumsum(ends - starts)])

    @property
    def total(self) -> int:
        """Nanoseconds in the set."""
        return int(self._before[-1])

    def __len__(self) -> int:
        return len(self.starts)

    def before(self, times: np.ndarray) -> np.ndarray:
        """Nanoseconds of the set that lie before each of `times` [n]."""
        index = np.searchsorted(self.starts, times, side="right")
        inside = np.minimum(times, self.ends[index - 1]) if len(self.starts) else times
        before = self._before[np.maximum(index - 1, 0)] + (inside - self.starts[index - 1] if len(self.starts) else 0)
        return np.where(index > 0, before, 0)

    def within(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Nanoseconds of the set within each interval [n]."""
        return self.before(np.asarray(ends)) - self.before(np.asarray(starts))

    def outside(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Nanoseconds of each interval [n] that are not in the set."""
        return ends - starts - self.within(starts, ends)

    def __and__(self, other: Intervals) -> Intervals:
        times = np.concatenate([self.starts, self.ends, other.starts, other.ends])
        change = np.repeat(np.array([1, -1, 1, -1]), [len(self), len(self), len(other), len(other)])
        order = np.argsort(times, kind="stable")
        times, both = times[order], np.cumsum(change[order]) == 2
        return union(times[:-1][both[:-1]], times[1:][both[:-1]])

    def __sub__(self, other: Intervals) -> Intervals:
        if not len(self) or not len(other):
            return self
        low, high = self.starts[:1], self.ends[-1:]
        return self & other.gaps(int(min(low[0], other.starts[0])), int(max(high[0], other.ends[-1])))

    def __or__(self, other: Intervals) -> Intervals:
        return union(np.concatenate([self.starts, other.starts]), np.concatenate([self.ends, other.ends]))

    def gaps(self, start: int, end: int) -> Intervals:
        """What of [start, end] is not in the set, which lies within."""
        starts, ends = np.concatenate([[start], self.ends]), np.concatenate([self.starts, [end]])
        kept = ends > starts
        return Intervals(starts[kept], ends[kept])


def union(starts: np.ndarray, ends: np.ndarray) -> Intervals:
    """All times that any of the intervals [n] covers; those of no length cover none."""
    starts, ends = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
    kept = ends > starts
    order = np.argsort(starts[kept], kind="stable")
    starts, ends = starts[kept][order], np.maximum.accumulate(ends[kept][order]) if kept.any() else ends[kept]
    if not len(starts):
        return Intervals(starts, ends)
    begins = np.concatenate([[True], starts[1:] > ends[:-1]])
    return Intervals(starts[begins], ends[np.concatenate([begins[1:], [True]])])
