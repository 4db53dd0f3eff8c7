"""The figures of traces as one JSON-like object, the same for the table, the page and the file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dsv3_train.errors import on_one_line
from dsv3_train.profiling.across import across
from dsv3_train.profiling.columns import by_number
from dsv3_train.profiling.gemm import gemm
from dsv3_train.profiling.intervals import union
from dsv3_train.profiling.ranges import pairs, ranges, steps, window
from dsv3_train.profiling.waits import exposures, idle
from dsv3_train.profiling.work import Work, is_unclassified

FORMAT = 1
_UNKNOWN_SHOWN = 20
_LARGEST_SHOWN = 40


def report(works: list[Work]) -> dict[str, Any]:
    """Of one rank: its figures. Of several: `ranks`, the list of them, what they say of each other, and the hidden
    fraction of all their communication.

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
    comm, exposed = (sum(rank[key] for rank in each) for key in ("comm_ms", "exposed_comm_ms"))
    hidden = 1 - exposed / comm if comm else None
    return {"format": FORMAT, "hidden_fraction": hidden, "ranks": each, "across": together, "findings": found}


def of_rank(work: Work) -> dict[str, Any]:
    """All figures of a rank."""
    named, left_out = ranges(work)
    notes = list(work.trace.notes)
    if not work.on_gpu:
        notes.insert(0, "no GPU kernels in this trace: times are those of operators on the host's threads")
    if left_out:
        notes.append(f"{left_out:,} more names of ranges were left out")
    by_step, more = steps(work)
    if more:
        notes.append(f"{more:,} more steps were left out")
    whole = {
        "rank": work.rank,
        "process": work.process,
        "device": "cpu" if work.device is None else work.device,
        "file": on_one_line(str(work.trace.path)),
        **window(work, work.first, work.last),
        "kernels": int((work.which == 0).sum()),
        "copies": int((work.which == 1).sum()),
        "memsets": int((work.which == 2).sum()),
        **({} if work.on_gpu else {"operators": len(work.trace.operators["start"])}),
        "cut": {"kernels": work.cut[0], "ms": work.cut[1] / 1e6},
        "idle": idle(work),
        "classes": _classes(work),
        "largest": _largest(work),
        "streams": _streams(work),
        "steps": by_step,
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
                "ms": float(took[mine].sum(dtype=float)) / 1e6,
                "union_ms": covered.total / 1e6,
                "exposed_ms": (covered & work.exposed).total / 1e6 if work.is_comm[mine].any() else None,
                "streams": [work.streams[stream] for stream in np.unique(work.stream[mine])],
            }
        )
    return sorted(found, key=lambda row: -row["ms"])


def _largest(work: Work) -> list[dict[str, Any]]:
    """The names that took longest, with the sum of their times."""
    took, count = np.zeros((2, len(work.trace.names)))
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
    for name, mine in zip(work.streams, by_number(work.stream, len(work.streams)), strict=True):
        comm, other = mine[work.is_comm[mine]], mine[~work.is_comm[mine]]
        busy, talking = union(work.start[mine], work.end[mine]), union(work.start[comm], work.end[comm])
        computing = union(work.start[other], work.end[other])
        found.append(
            {
                "stream": name,
                "kernels": len(mine),
                "busy_ms": busy.total / 1e6,
                "compute_ms": computing.total / 1e6,
                "comm_ms": talking.total / 1e6,
                "exposed_comm_ms": (talking & work.exposed).total / 1e6,
            }
        )
    return found


def _unclassified(work: Work) -> dict[str, Any]:
    mine = np.flatnonzero(is_unclassified(work))
    took = np.zeros(len(work.trace.names))
    np.add.at(took, work.name[mine], (work.end - work.start)[mine])
    largest = [name for name in np.argsort(-took, kind="stable")[:_UNKNOWN_SHOWN].tolist() if took[name]]
    return {
        "ms": float(took.sum()) / 1e6,
        "names": [{"name": work.trace.names[name][:400], "ms": float(took[name]) / 1e6} for name in largest],
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
    copies = work.which == 1
    others = union(work.start[~copies], work.end[~copies])
    computing = np.unique(work.stream[(work.which == 0) & ~work.is_comm])
    chosen = np.flatnonzero(copies & np.isin(work.stream, computing))
    keys, group = np.unique(np.stack([work.stream[chosen], work.name[chosen]], axis=1), axis=0, return_inverse=True)
    alone = others.outside(work.start[chosen], work.end[chosen])  # copies of one stream do not overlap
    ms = np.bincount(group.reshape(-1), alone, len(keys)) / 1e6
    count = np.bincount(group.reshape(-1), minlength=len(keys))
    return [(stream, work.trace.names[name], ms[i], int(count[i])) for i, (stream, name) in enumerate(keys.tolist())]


def as_json(figures: dict[str, Any]) -> str:
    return json.dumps(figures, indent=1, allow_nan=False)
