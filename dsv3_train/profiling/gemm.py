"""TFLOPS of matrix products, where a trace holds the shapes of their operators."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from dsv3_train.profiling.work import Work

_DEEPEST = 6
"""Operators with shapes that may lie within each other: linear, matmul, mm."""


def flops(operator: str, dims: Any) -> int | None:
    """2 m n k of an operator by its `Input Dims`; None if it does not multiply matrices or they do not fit."""
    name = operator.rsplit("::", 1)[-1].rstrip("_")
    skipped = 1 if name in ("addmm", "baddbmm") else 0
    try:
        a, b = (list(map(int, side)) for side in dims[skipped : skipped + 2])
        if name == "linear":
            return 2 * prod(a) * b[0] if a[-1] == b[1] else None
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            return None
        if name in ("mm", "addmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm", "_int_mm"):
            return 2 * prod(a) * b[-1]
        if name in ("bmm", "baddbmm", "matmul"):
            return 2 * prod(a) * b[-1] * (prod(b[:-2]) // max(1, prod(a[:-2])) if prod(a[:-2]) < prod(b[:-2]) else 1)
    except (TypeError, ValueError, IndexError):
        pass
    return None


def gemm(work: Work) -> dict[str, Any] | None:
    """TFLOPS per class over the kernels whose operator's shapes are known; None where there is no GEMM."""
    is_gemm = np.array([name.startswith("GEMM") for name, _ in work.classes] or [False])[work.cls]
    kernels = np.flatnonzero(is_gemm)
    if not len(kernels):
        return None
    durations = (work.end - work.start)[kernels]
    operators = _operators(work, kernels)
    per_class: dict[str, dict[str, Any]] = {}
    counted: set[int] = set()
    for kernel, operator, ns in zip(kernels.tolist(), operators.tolist(), durations.tolist(), strict=True):
        row = per_class.setdefault(work.class_name(kernel), {"ms": 0.0, "with_shapes_ms": 0.0, "flops": 0})
        row["ms"] += ns / 1e6
        done = _flops_of(work, operator)
        if done is not None:
            row["with_shapes_ms"] += ns / 1e6
            if operator not in counted:  # it may run several kernels
                counted.add(operator)
                row["flops"] += done
    for row in per_class.values():
        row["tflops"] = row["flops"] / row["with_shapes_ms"] / 1e9 if row["with_shapes_ms"] else None
    known = sum(row["with_shapes_ms"] for row in per_class.values())
    total = sum(row["flops"] for row in per_class.values())
    return {
        "ms": float(durations.sum()) / 1e6,
        "with_shapes_ms": known,
        "tflops": total / known / 1e9 if known else None,
        "classes": per_class,
    }


def _flops_of(work: Work, operator: int) -> int | None:
    if operator < 0:
        return None
    columns = work.trace.operators
    shape = int(columns["shape"][operator])
    if shape < 0:
        return None
    return flops(work.trace.names[columns["name"][operator]], work.trace.shapes[shape])


def _operators(work: Work, kernels: np.ndarray) -> np.ndarray:
    """The operator that multiplied: the innermost with shapes around the launch, else the one of the external id."""
    by_id = work.operator[kernels]
    columns, launches = work.trace.operators, work.trace.launches
    shaped = np.flatnonzero(columns["shape"] >= 0)
    launch = work.launch[kernels]
    if not len(shaped) or not (launch >= 0).any():
        return by_id
    order = shaped[np.lexsort((columns["start"][shaped], columns["thread"][shaped]))]
    # One key for thread and place in time, so that one search serves all threads.
    moments = np.unique(columns["start"][order])
    begins = columns["thread"][order] * (len(moments) + 1) + np.searchsorted(moments, columns["start"][order]) + 1
    times, threads = launches["start"][launch], launches["thread"][launch]
    wanted = threads * (len(moments) + 1) + np.searchsorted(moments, times, side="right")
    at = np.searchsorted(begins, wanted, side="right") - 1
    found = np.full(len(kernels), -1, dtype=np.int64)
    for back in range(_DEEPEST):
        row = order[np.maximum(at - back, 0)]
        fits = (at - back >= 0) & (columns["thread"][row] == threads) & (columns["end"][row] >= times)
        found = np.where((found < 0) & fits & (launch >= 0), row, found)
    return np.where(found >= 0, found, by_id)
