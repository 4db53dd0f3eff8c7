"""Several ranks together: which one the others wait for, and how far their clocks are apart."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from dsv3_train.profiling.work import Work

_MEETING = ("all-", "reduce", "broadcast", "DeepEP", "other collective", "collective")
"""Classes of kernels that end on every rank at about the same time."""


def across(works: list[Work]) -> dict[str, Any] | None:
    """Collectives of the same name and group, one after the other, are matched between ranks.

    A collective cannot end before its last rank has come, so the rank on which it is shortest came last, and the
    longer it took elsewhere, the longer that rank was waited for. Durations alone count: clocks may differ.
    None: nothing matches.
    """
    calls = [_collectives(work) for work in works]
    caused, waited = np.zeros(len(works)), np.zeros(len(works))
    offsets: dict[int, list[float]] = defaultdict(list)
    matched = 0
    for key in {key for call in calls for key in call}:
        having = [index for index, call in enumerate(calls) if key in call]
        if len(having) < 2 or len({len(calls[index][key]) for index in having}) > 1:
            continue
        starts = np.array([works[index].start[calls[index][key]] for index in having])
        ends = np.array([works[index].end[calls[index][key]] for index in having])
        took = ends - starts
        waits = took - took.min(axis=0)
        last = took.argmin(axis=0)
        matched += took.shape[1]
        for position, index in enumerate(having):
            waited[index] += waits[position].sum()
            caused[index] += waits[:, last == position].sum()
            if position:
                offsets[index] += (ends[position] - ends[0]).tolist()
    if not matched:
        return None
    span = max(work.last - work.first for work in works)
    worst = int(caused.argmax())
    share = caused[worst] / caused.sum() if caused.sum() else 0.0
    # Every rank is last sometimes; named is one that is so mostly, and that costs.
    lost = caused[worst] / max(1, len(works) - 1)
    named = share > max(0.5, 1.5 / len(works)) and lost > 0.02 * span
    return {
        "collectives": matched,
        "waited_ms": {work.rank: waited[i] / 1e6 for i, work in enumerate(works)},
        "waited_for_ms": {work.rank: caused[i] / 1e6 for i, work in enumerate(works)},
        "straggler": works[worst].rank if named else None,
        "clock_offset_ms": {works[i].rank: float(np.median(values)) / 1e6 for i, values in sorted(offsets.items())},
    }


def _collectives(work: Work) -> dict[tuple[str, str], np.ndarray]:
    """Kernels in order of their start, per class and process group."""
    meeting = np.array([any(part in name for part in _MEETING) for name, _ in work.classes] or [False])
    chosen = np.flatnonzero(meeting[work.cls] & work.is_comm & (work.which <= 0))
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for kernel in chosen.tolist():
        found[work.class_name(kernel), work.trace.names[work.collective[kernel]]].append(kernel)
    return {key: np.array(kernels) for key, kernels in found.items()}
