"""The figures of traces as one JSON-like object, the same for the table, the page and the file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dsv3_train.profiling.across import across
from dsv3_train.profiling.gemm import gemm
from dsv3_train.profiling.intervals import union
from dsv3_train.profiling.ranges import pairs, ranges, steps, window
from dsv3_train.profiling.waits import exposures, idle
from dsv3_train.profiling.work import Work, is_unclassified

FORMAT = 1
_UNKNOWN_SHOWN = 20
_LARGEST_SHOWN = 40


def report(works: list[Work]) -> dict[str, Any]:
    """Of one rank: its figures. Of several: `ranks`, the list of them, and what they say of each other.

    Times are milliseconds. compute + exposed communication + idle = span. `hidden_fraction` is null where there is no
    communication; what no rule classifies counts as compute and is listed under `unclassified`.
    """
    if len(works) == 1:
        return {"format": FORMAT, **of_rank(works[0])}
    each = [of_rank(work) for work in works]
    together = across(works)
    found = [{**one, "rank": rank["rank"]} for rank in each for one in rank["findings"]]
    if together and together["straggler"] is not None:
        rank = together["straggler"]
        lost = together["waited_for_ms"][rank] / (len(works) - 1)
        text = f"rank {rank} comes last to the collectives: each other rank waits {lost:.2f} ms for it"
        found.insert(0, {"kind": "straggler", "ms": lost, "text": text, "rank": rank})
    return {"format": FORMAT, "ranks": each, "across": together, "findings": found}


def of_rank(work: Work) -> dict[str, Any]:
    """All figures of a rank."""
    named, left_out = ranges(work)
    notes = list(work.trace.notes)
    if not work.on_gpu:
        notes.insert(0, "no GPU kernels in this trace: times are those of operators on the host's threads")
    if left_out:
        notes.append(f"{left_out:,} more names of ranges were left out")
    whole = {
        "rank": work.rank,
        "device": "cpu" if work.device is None else work.device,
        "file": str(work.trace.path),
        **window(work, work.first, work.last),
        "kernels": int((work.which == 0).sum()),
        "copies": int((work.which == 1).sum()),
        "memsets": int((work.which == 2).sum()),
        **({} if work.on_gpu else {"operators": len(work.trace.operators["start"])}),
        "idle": idle(work),
        "classes": _classes(work),
        "largest": _largest(work),
        "streams": _streams(work),
        "steps": steps(work),
        "pairs": pairs(work),
        "ranges": named,
        "gemm": gemm(work),
        "exposures": exposures(work),
        "unclassified": _unclassified(work),
        "notes": notes,
    }
    whole["findings"] = _findings(work, whole)
    return whole


def _classes(work: Work) -> list[dict[str, Any]]:
    found = []
    took = work.end - work.start
    for number, (name, kind) in enumerate(work.classes):
        mine = work.cls == number
        covered = union(work.start[mine], work.end[mine])
        found.append(
            {
                "class": name,
                "kind": kind,
                "kernels": int(mine.sum()),
                "ms": float(took[mine].sum()) / 1e6,
                "union_ms": covered.total / 1e6,
                "exposed_ms": (covered & work.exposed).total / 1e6 if work.is_comm[mine].any() else None,
                "streams": [work.streams[stream] for stream in np.unique(work.stream[mine])],
            }
        )
    return sorted(found, key=lambda row: -row["ms"])


def _largest(work: Work) -> list[dict[str, Any]]:
    """The names that took longest, with the sum of their times."""
    took, count = np.zeros((2, len(work.trace.names)), dtype=np.int64)
    np.add.at(took, work.name, work.end - work.start)
    np.add.at(count, work.name, 1)
    first = dict(zip(work.name[::-1].tolist(), work.cls[::-1].tolist(), strict=True))
    return [
        {
            "name": work.trace.names[name][:400],
            "class": work.classes[first[name]][0],
            "kernels": int(count[name]),
            "ms": float(took[name]) / 1e6,
        }
        for name in np.argsort(-took, kind="stable")[:_LARGEST_SHOWN].tolist()
        if took[name]
    ]


def _streams(work: Work) -> list[dict[str, Any]]:
    found = []
    for number, name in enumerate(work.streams):
        mine = work.stream == number
        comm = mine & work.is_comm
        busy, talking = union(work.start[mine], work.end[mine]), union(work.start[comm], work.end[comm])
        computing = union(work.start[mine & ~comm], work.end[mine & ~comm])
        found.append(
            {
                "stream": name,
                "kernels": int(mine.sum()),
                "busy_ms": busy.total / 1e6,
                "compute_ms": computing.total / 1e6,
                "comm_ms": talking.total / 1e6,
                "exposed_comm_ms": (talking & work.exposed).total / 1e6,
            }
        )
    return found


def _unclassified(work: Work) -> dict[str, Any]:
    mine = np.flatnonzero(is_unclassified(work))
    took = np.zeros(len(work.trace.names), dtype=np.int64)
    np.add.at(took, work.name[mine], (work.end - work.start)[mine])
    largest = [name for name in np.argsort(-took, kind="stable")[:_UNKNOWN_SHOWN].tolist() if took[name]]
    return {
        "ms": float(took.sum()) / 1e6,
        "names": [{"name": work.trace.names[name], "ms": float(took[name]) / 1e6} for name in largest],
    }


def _findings(work: Work, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands out, in words."""
    found = []
    span = whole["span_ms"] or 1.0
    for index, name, ms, count in _copies_in_the_way(work):
        if ms > 0.01 * span:
            stream = work.streams[index]
            found.append(
                {
                    "kind": "exposed copy",
                    "ms": ms,
                    "text": f"{count:,} x {name} on {stream}, which also computes: nothing else runs for {ms:.2f} ms "
                    f"({ms / span:.1%} of the span); use another stream, or copy less",
                }
            )
    for row in whole["classes"]:
        if row["exposed_ms"] and row["exposed_ms"] > 0.02 * span and not row["class"].startswith("copy"):
            share = row["exposed_ms"] / span
            text = f"{row['class']} is exposed for {row['exposed_ms']:.2f} ms of its {row['union_ms']:.2f} ms"
            found.append(
                {"kind": "exposed communication", "ms": row["exposed_ms"], "text": f"{text} ({share:.1%} of the span)"}
            )
    waits = whole["idle"]
    if waits["host_bound_ms"] and waits["host_bound_ms"] > 0.05 * span:
        at = next((f", as in {gap['host_did']}" for gap in waits["gaps"] if gap["host_did"]), "")
        text = f"host-bound: the GPU waits {waits['host_bound_ms']:.2f} ms for launches"
        found.append(
            {
                "kind": "host-bound",
                "ms": waits["host_bound_ms"],
                "text": f"{text} ({waits['host_bound_ms'] / span:.1%} of the span{at})",
            }
        )
    if whole["unclassified"]["ms"] > 0.05 * span:
        ms = whole["unclassified"]["ms"]
        what = "kernels" if work.on_gpu else "operators"
        text = f"{ms:.2f} ms of {what} have no class, and count as compute: see `unclassified`, and --classes"
        found.append({"kind": "unclassified", "ms": ms, "text": text})
    return sorted(found, key=lambda one: -one["ms"])


def _copies_in_the_way(work: Work) -> list[tuple[int, str, float, int]]:
    """(stream, name, ms alone, number) of copies on streams that compute, while nothing else runs on the GPU."""
    found = []
    copies = work.which == 1
    others = union(work.start[~copies], work.end[~copies])
    computing = set(np.unique(work.stream[(work.which == 0) & ~work.is_comm]).tolist())
    for stream in np.unique(work.stream[copies]).tolist():
        if stream not in computing:
            continue
        for name in np.unique(work.name[copies & (work.stream == stream)]).tolist():
            mine = copies & (work.stream == stream) & (work.name == name)
            alone = union(work.start[mine], work.end[mine]) - others
            found.append((stream, work.trace.names[name], alone.total / 1e6, int(mine.sum())))
    return found


def as_json(figures: dict[str, Any]) -> str:
    return json.dumps(figures, indent=1, allow_nan=False)
