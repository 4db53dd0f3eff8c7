"""Steps and named ranges of a rank: what of its compute and communication falls into each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv3_train.pipeline.operations import PAIR_IN_TRACE
from dsv3_train.profiling.intervals import union
from dsv3_train.profiling.work import Work

_BACKENDS = ("gloo:", "nccl:", "mpi:", "ucc:")
MOST_STEPS = 1000
"""Steps in a report, the first ones."""
MOST_RANGES = 200
"""Names in a report; beyond, the ones that took longest on the host."""


def window(work: Work, start: int, end: int) -> dict[str, float | None]:
    """The parts of a stretch of time; compute, exposed communication and idle sum to the span."""
    edges = np.array([start]), np.array([end])
    compute, comm, exposed, idle = (
        int(part.within(*edges)[0]) for part in (work.compute, work.comm, work.exposed, work.idle)
    )
    outside = (end - start) - compute - exposed - idle  # before the rank's first kernel or after its last
    return {
        "span_ms": (end - start) / 1e6,
        "compute_ms": compute / 1e6,
        "comm_ms": comm / 1e6,
        "exposed_comm_ms": exposed / 1e6,
        "hidden_fraction": 1 - exposed / comm if comm else None,
        "idle_ms": (idle + outside) / 1e6,
    }


def steps(work: Work) -> tuple[list[dict[str, Any]], int]:
    """Each ProfilerStep#N from the start of its first kernel to that of the next one's, by when they were launched;
    and how many were left out."""
    columns, launched = work.trace.steps, work.start if work.trace.of_gpu[1] else work.launched()
    order = np.argsort(launched, kind="stable")
    times = launched[order]
    begins: list[tuple[int, int, int]] = []
    shown = np.argsort(columns["start"], kind="stable")[:MOST_STEPS]
    for start, end, number in zip(*(columns[key][shown].tolist() for key in ("start", "end", "number")), strict=True):
        low, high = np.searchsorted(times, [start, end])
        if high > low:
            rows = order[low:high]
            begins.append((int(work.start[rows].min()), int(work.end[rows].max()), number))
    begins.sort()
    found = []
    for index, (start, end, number) in enumerate(begins):
        if index + 1 < len(begins):
            end = begins[index + 1][0] if begins[index + 1][0] > start else end
        found.append({"step": number, "start_ms": (start - work.first) / 1e6, **window(work, start, end)})
    return found, max(0, len(columns["start"]) - MOST_STEPS)


def ranges(work: Work) -> tuple[list[dict[str, Any]], int]:
    """Kernels launched within each named range, by name, whatever thread launched them; and how many names were left
    out. Ranges may lie within each other, so that they do not sum to anything. `exposed_comm_ms` is their part of the
    rank's exposed communication."""
    columns, within = work.trace.ranges, _launched_within(work)
    took = np.zeros(len(work.trace.names))
    np.add.at(took, columns["name"], columns["end"] - columns["start"])
    names = [name for name in np.argsort(-took, kind="stable").tolist() if took[name] > 0]
    if not work.on_gpu:  # there, what c10d calls by such a name ends when the transfer does, whatever runs meanwhile
        names = [name for name in names if not work.trace.names[name].startswith(_BACKENDS)]
    found = []
    for name in names[:MOST_RANGES]:
        mine = np.flatnonzero(columns["name"] == name)
        figures = _parts(work, within(mine))
        host = float(took[name]) / 1e6
        found.append({"name": work.trace.names[name][:400], "count": len(mine), "host_ms": host, **figures})
    return found, max(0, len(names) - MOST_RANGES)


def pairs(work: Work) -> dict[str, Any] | None:
    """What a schedule's F&B pairs launched; None if there are none.

    Beside them stand forward and backward passes that have nothing to hide behind, so that this is what overlap can
    do, and the rank's own `hidden_fraction` what it did for the step.
    """
    names = work.trace.ranges["name"]
    of_pairs = [name for name in np.unique(names).tolist() if PAIR_IN_TRACE.fullmatch(work.trace.names[name])]
    mine = np.flatnonzero(np.isin(names, of_pairs))
    if not len(mine):
        return None
    kernels = _launched_within(work)(mine)
    figures = _parts(work, kernels)
    comm, exposed = figures["comm_ms"], figures["exposed_comm_ms"]
    communication = []
    for number in np.unique(work.cls[kernels][work.is_comm[kernels]]).tolist():
        own = kernels[work.cls[kernels] == number]
        covered = union(work.start[own], work.end[own])
        parts = {"union_ms": covered.total / 1e6, "exposed_ms": (covered & work.exposed).total / 1e6}
        communication.append({"class": work.classes[number][0], "kernels": len(own), **parts})
    hidden = 1 - exposed / comm if comm else None
    return {"count": len(mine), **figures, "hidden_fraction": hidden, "communication": communication}


def _launched_within(work: Work) -> Callable[[np.ndarray], np.ndarray]:
    """A function from rows of ranges to the kernels that were launched within any of them."""
    columns, launched = work.trace.ranges, work.start if work.trace.of_gpu[0] else work.launched()
    order = np.argsort(launched, kind="stable")
    times = launched[order]
    low, high = np.searchsorted(times, columns["start"]), np.searchsorted(times, columns["end"])

    def within(mine: np.ndarray) -> np.ndarray:
        covered = union(low[mine], high[mine])  # ranges may lie within each other
        rows = [order[first:last] for first, last in zip(covered.starts, covered.ends, strict=True)]
        return np.sort(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)

    return within


def _parts(work: Work, kernels: np.ndarray) -> dict[str, Any]:
    comm = work.is_comm[kernels]
    computing, talking = (union(work.start[kernels[which]], work.end[kernels[which]]) for which in (~comm, comm))
    return {
        "kernels": len(kernels),
        "compute_ms": computing.total / 1e6,
        "comm_ms": talking.total / 1e6,
        "exposed_comm_ms": (talking & work.exposed).total / 1e6,
    }
