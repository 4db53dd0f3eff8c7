"""Where time is lost: stretches of exposed communication with their neighbours, and gaps in which a GPU waits."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv3_train.profiling.work import Work

SHOWN = 10


def exposures(work: Work) -> list[dict[str, Any]]:
    """The longest stretches of communication beside no compute, with what ran, and what before and after."""
    lengths = work.exposed.ends - work.exposed.starts
    compute = np.flatnonzero(~work.is_comm)
    by_end = compute[np.argsort(work.end[compute], kind="stable")]
    comm = np.flatnonzero(work.is_comm)
    found = []
    for index in np.argsort(-lengths, kind="stable")[:SHOWN].tolist():
        start, end = int(work.exposed.starts[index]), int(work.exposed.ends[index])
        running = comm[(work.start[comm] < end) & (work.end[comm] > start)]
        before = int(np.searchsorted(work.end[by_end], start, side="right")) - 1
        after = int(np.searchsorted(work.start[compute], end))
        found.append(
            {
                "start_ms": (start - work.first) / 1e6,
                "ms": (end - start) / 1e6,
                "kernels": [_told(work, kernel) for kernel in running[:4].tolist()],
                "more_kernels": max(0, len(running) - 4),
                "before": _told(work, int(by_end[before])) if before >= 0 else None,
                "after": _told(work, int(compute[after])) if after < len(compute) else None,
            }
        )
    return found


def _told(work: Work, kernel: int) -> dict[str, Any]:
    name = work.text(kernel)
    return {
        "name": name if len(name) <= 160 else name[:157] + "...",
        "class": work.class_name(kernel),
        "stream": work.streams[work.stream[kernel]],
        "ms": float(work.end[kernel] - work.start[kernel]) / 1e6,
    }


def idle(work: Work) -> dict[str, Any]:
    """Gaps with nothing on the GPU, by cause.

    Host-bound: from the gap's start until the call that launches the next kernel is over: the GPU waits for the host.
    Launched: the next kernel was launched already, and waits for an event, or starts late. Unknown: no launch of the
    next kernel is in the trace.
    """
    gaps = work.idle
    lengths = gaps.ends - gaps.starts
    if not work.on_gpu:
        return {"host_bound_ms": None, "launched_ms": None, "unknown_ms": gaps.total / 1e6, "gaps": []}
    following = np.minimum(np.searchsorted(work.start, gaps.ends), max(0, len(work.start) - 1))
    launch = work.launch[following]
    known = launch >= 0
    host = np.zeros(len(lengths), dtype=np.int64)
    launches = work.trace.launches
    if len(launches["start"]):
        begins, over = launches["start"][launch], launches["end"][launch]
        launching = np.array(["launch" in name.lower() for name in work.trace.names])[launches["name"][launch]]
        # A copy's call that began before may itself have waited for the stream.
        late = known & ((begins >= gaps.starts) | launching)
        host = np.where(late, np.clip(np.minimum(over, gaps.ends) - gaps.starts, 0, None), 0)
    found = []
    for index in np.argsort(-lengths, kind="stable")[:SHOWN].tolist():
        start, end = int(gaps.starts[index]), int(gaps.ends[index])
        found.append(
            {
                "start_ms": (start - work.first) / 1e6,
                "ms": (end - start) / 1e6,
                "host_bound_ms": float(host[index]) / 1e6 if known[index] else None,
                "host_did": _host_did(work, start, end) if host[index] > 0 else None,
                "next": _told(work, int(following[index])),
            }
        )
    return {
        "host_bound_ms": float(host.sum()) / 1e6,
        "launched_ms": float((lengths - host)[known].sum()) / 1e6,
        "unknown_ms": float(lengths[~known].sum()) / 1e6,
        "gaps": found,
    }


def _host_did(work: Work, start: int, end: int) -> str | None:
    """The shortest call or operator that fills half of a gap: what the host was at."""
    best: tuple[int, str] | None = None
    for columns in (work.trace.launches, work.trace.operators, work.trace.ranges):
        shared = np.minimum(columns["end"], end) - np.maximum(columns["start"], start)
        for row in np.flatnonzero(shared >= (end - start) / 2).tolist():
            took = int(columns["end"][row] - columns["start"][row])
            if best is None or took < best[0]:
                best = took, work.trace.names[columns["name"][row]]
    return best[1] if best else None
