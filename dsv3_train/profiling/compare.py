"""Two reports side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv3_train.errors import UserError
from dsv3_train.profiling.report import FORMAT

_PARTS = ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "idle_ms")


def load(path: Path) -> dict[str, Any]:
    """A report.json.

    Raises:
        UserError: it is none.
    """
    if path.is_dir():
        path = path / "report.json"
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; a report.json of `dsv3 profile analyze --out DIR` is wanted") from None
    if not isinstance(figures, dict) or figures.get("format") != FORMAT:
        hint = "analyze it first: dsv3 profile analyze TRACE --out DIR" if "traceEvents" in figures else "see --out"
        raise UserError(f"{path}: no report of `dsv3 profile analyze` ({hint})")
    return figures


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
            "class": name,
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
