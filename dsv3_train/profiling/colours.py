"""Colours of classes: cool for compute, warm for communication, so that a glance tells what hides what."""

from __future__ import annotations

from collections.abc import Sequence

_COMPUTE = (
    "#2563eb", "#0e7490", "#6d28d9", "#0d9488", "#4f86c6", "#64748b", "#3b5b92", "#7c8fb5",
    "#15803d", "#94a3b8", "#5eead4", "#a5b4fc",
)  # fmt: skip
_COMMUNICATION = ("#ea580c", "#f59e0b", "#c2410c", "#fbbf24", "#db2777", "#b45309")
EXPOSED, IDLE, HOST, PLAIN_COMPUTE, HIDDEN = "#dc2626", "#d4d8dd", "#8b95a1", "#2563eb", "#f59e0b"


def colours(classes: Sequence[tuple[str, str]], order: Sequence[str]) -> list[str]:
    """One per class, the most distinct ones for the first of `order` (by time)."""
    seen = {"compute": 0, "communication": 0}
    chosen = {}
    kinds = dict(classes)
    for name in order:
        kind = kinds[name]
        palette = _COMMUNICATION if kind == "communication" else _COMPUTE
        chosen[name] = palette[seen[kind] % len(palette)]
        seen[kind] += 1
    return [chosen[name] for name, _ in classes]
