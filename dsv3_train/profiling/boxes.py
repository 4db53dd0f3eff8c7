"""Kernels as boxes to draw, few enough for a page: small neighbours of a stream become one."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv3_train.profiling.columns import by_number
from dsv3_train.profiling.intervals import Intervals, union
from dsv3_train.profiling.work import Work

MOST = 60_000
"""Boxes of a page; of all ranks together."""
_BINS = 32
"""A box of several kernels is at most so many times as long as the longest kernel that may be in one."""
_MERGED_NAMES = -1


def boxes(work: Work, most: int = MOST) -> dict[str, Any]:
    """Per stream: starts, durations (ns from the rank's first kernel), class, name (-1: of several), kernels, and the
    time busy; `merged_below_ns` says which kernels may share a box (0: none)."""
    resolution, of_streams = 0, by_number(work.stream, len(work.streams))
    while True:
        streams = [_of_stream(work, mine, resolution) for mine in of_streams]
        if (
            sum(len(one["start"]) for one in streams) <= max(most, 4 * len(streams))
            or resolution > work.last - work.first
        ):
            break
        resolution = max(100, resolution * 2)
    used = sorted({int(name) for one in streams for name in one["name"] if name >= 0})
    place = {name: number for number, name in enumerate(used)}
    return {
        "merged_below_ns": resolution,
        "names": [_short(work.trace.names[name]) for name in used],
        "streams": [
            {
                "stream": work.streams[number],
                **{key: one[key].tolist() for key in ("start", "length", "cls", "count", "busy")},
                "name": [place.get(int(name), _MERGED_NAMES) for name in one["name"]],
            }
            for number, one in enumerate(streams)
        ],
    }


def marks(work: Work, times: Intervals, most: int = 4000) -> dict[str, list[int]]:
    """A set of times as boxes: starts and lengths (ns from the rank's first kernel), and how much of each is in it."""
    start, end, resolution = times.starts - work.first, times.ends - work.first, 0
    while True:
        first, ends, busy = _merged(start, end, np.zeros(len(start)), resolution)
        if len(first) <= most:
            return {"start": start[first].tolist(), "length": (ends - start[first]).tolist(), "busy": busy.tolist()}
        resolution = max(100, resolution * 2)


def _of_stream(work: Work, mine: np.ndarray, resolution: int) -> dict[str, np.ndarray]:
    start, end = work.start[mine] - work.first, work.end[mine] - work.first
    first, ends, busy = _merged(start, end, work.is_comm[mine], resolution)
    counts = np.diff(np.append(first, len(mine)))
    return {
        "start": start[first],
        "length": ends - start[first],
        "cls": work.cls[mine][first],
        "name": np.where(counts == 1, work.name[mine][first], _MERGED_NAMES),
        "count": counts,
        "busy": busy,
    }


def _merged(
    start: np.ndarray, end: np.ndarray, kind: np.ndarray, resolution: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ordered intervals [n], those below the resolution joined with neighbours of the same kind: the first of each
    group, where the group ends, and the sum of its lengths."""
    length = end - start
    first = np.arange(len(start))
    if resolution:
        bins = start // (resolution * _BINS)
        joins = (length[1:] <= resolution) & (length[:-1] <= resolution) & (kind[1:] == kind[:-1])
        joins &= (start[1:] - end[:-1] <= resolution) & (bins[1:] == bins[:-1])
        first = np.flatnonzero(np.concatenate([[True], ~joins]))
    if not len(first):
        return first, end, length
    return first, np.maximum.reduceat(end, first), np.add.reduceat(length, first)


def _short(name: str) -> str:
    name = name.removeprefix("void ")
    return name if len(name) <= 200 else name[:197] + "..."


def coverage(work: Work, chosen: np.ndarray, columns: int) -> np.ndarray:
    """Part of each of `columns` equal stretches of the span that the chosen kernels [n, bool] cover: [columns]."""
    return part_of(work, union(work.start[chosen], work.end[chosen]), columns)


def part_of(work: Work, times: Intervals, columns: int) -> np.ndarray:
    """Part of each of `columns` equal stretches of the span that lies in a set of times: [columns]."""
    edges = np.linspace(work.first, work.last, columns + 1).astype(np.int64)
    covered = np.diff(times.before(edges))
    return covered / np.maximum(1, np.diff(edges))
