"""Two reports side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv3_train.errors import UserError, on_one_line
from dsv3_train.profiling.classes import COMMUNICATION, COMPUTE
from dsv3_train.profiling.report import FORMAT
from dsv3_train.regular import text

_MOST_BYTES = 1 << 26
"""Of a report: of about 500 ranks."""
_PARTS = ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "idle_ms")


def load(path: Path) -> dict[str, Any]:
    """A report.json, with all that a comparison needs of it.

    Raises:
        UserError: it is none, or it is damaged.
    """
    if path.is_dir():
        path = path / "report.json"
    told = on_one_line(str(path))
    try:
        figures = json.loads(text(path, _MOST_BYTES, "a report.json of `dsv3 profile analyze --out DIR`"))
    except (ValueError, RecursionError):
        raise UserError(f"{told}: not JSON; a report.json of `dsv3 profile analyze --out DIR` is wanted") from None
    if not isinstance(figures, dict) or figures.get("format") != FORMAT:
        trace = isinstance(figures, dict) and "traceEvents" in figures
        hint = "analyze it first: dsv3 profile analyze TRACE --out DIR" if trace else "see --out"
        raise UserError(f"{told}: no report of `dsv3 profile analyze` ({hint})")
    ranks = figures.get("ranks", [figures])
    if not isinstance(ranks, list) or not ranks:
        raise UserError(f"{told}: damaged: `ranks` is no list of ranks; analyze the trace again")
    for number, rank in enumerate(ranks):
        fault = _fault(rank)
        if fault:
            at = f"ranks[{number}]: " if "ranks" in figures else ""
            raise UserError(f"{told}: damaged: {at}{fault}; analyze the trace again")
    return figures


def _fault(rank: Any) -> str:
    """What of a rank's figures cannot have been written by `analyze`; empty: nothing."""
    if not isinstance(rank, dict):
        return "a rank is no object"
    steps, classes, idle = rank.get("steps"), rank.get("classes"), rank.get("idle")
    if not isinstance(steps, list) or not isinstance(classes, list) or not isinstance(idle, dict):
        return "`steps` and `classes` are lists and `idle` is an object"
    for name, part in (("the rank", rank), *((f"steps[{i}]", step) for i, step in enumerate(steps))):
        if not isinstance(part, dict) or not all(_is_time(part.get(key)) for key in _PARTS):
            return f"{name} lacks one of {', '.join(_PARTS)}, or it is no time"
        rounding = 1e-6 + 1e-9 * part["span_ms"]
        if abs(part["compute_ms"] + part["exposed_comm_ms"] + part["idle_ms"] - part["span_ms"]) > rounding:
            return f"compute, exposed communication and idle of {name} do not add up to its span"
        if part["exposed_comm_ms"] > part["comm_ms"] + rounding:
            return f"more communication of {name} is exposed than there is"
    for i, row in enumerate(classes):
        if not isinstance(row, dict) or not isinstance(row.get("class"), str) or not _is_time(row.get("ms")):
            return f"classes[{i}] has no class or no ms"
        if row.get("kind") not in (COMPUTE, COMMUNICATION):
            return f"classes[{i}]: kind is {COMPUTE} or {COMMUNICATION}"
    host = idle.get("host_bound_ms", "")
    return "" if host is None or _is_time(host) else "idle.host_bound_ms is no time"


def _is_time(value: Any) -> bool:
    """Milliseconds that a trace can have."""
    return type(value) in (int, float) and 0 <= value <= 1e12  # False for NaN


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Parts and classes of both (milliseconds, means over ranks) and B - A.

    Where both have steps, all is per step, so that reports of different lengths compare; `per` says which.
    """
    sides = [side.get("ranks", [side]) for side in (a, b)]
    per_step = all(rank["steps"] for side in sides for rank in side)
    means = [_mean(side, per_step) for side in sides]
    kinds = {row["class"]: row["kind"] for side in sides for rank in side for row in rank["classes"]}
    classes = [
        {
            "class": on_one_line(name[:200]),
            "kind": kinds[name],
            **_both(means[0]["classes"].get(name, 0.0), means[1]["classes"].get(name, 0.0)),
        }
        for name in kinds
    ]
    return {
        "per": "step" if per_step else "trace",
        "ranks": [len(side) for side in sides],
        **{part: _both(means[0][part], means[1][part]) for part in _PARTS},
        "hidden_fraction": _both(means[0]["hidden_fraction"], means[1]["hidden_fraction"]),
        "host_bound_ms": _both(means[0]["host_bound_ms"], means[1]["host_bound_ms"]),
        "classes": sorted(classes, key=lambda row: -abs(row["difference"])),
    }


def _both(a: float | None, b: float | None) -> dict[str, Any]:
    return {"a": a, "b": b, "difference": b - a if a is not None and b is not None else None}


def _mean(ranks: list[dict[str, Any]], per_step: bool) -> dict[str, Any]:
    """Of a class, time of its kernels; of the parts, those of the steps where there are any."""
    parts: dict[str, Any] = dict.fromkeys(_PARTS, 0.0)
    classes: dict[str, float] = {}
    host = 0.0
    for rank in ranks:
        count = len(rank["steps"]) if per_step else 1
        whole = rank["steps"] if per_step else [rank]
        for part in _PARTS:
            parts[part] += sum(one[part] for one in whole) / count / len(ranks)
        for row in rank["classes"]:
            classes[row["class"]] = classes.get(row["class"], 0.0) + row["ms"] / count / len(ranks)
        host += (rank["idle"]["host_bound_ms"] or 0.0) / count / len(ranks)
    comm = parts["comm_ms"]
    hidden = 1 - parts["exposed_comm_ms"] / comm if comm else None
    return {**parts, "classes": classes, "hidden_fraction": hidden, "host_bound_ms": host}
