"""The comparison as rows, in a terminal and (page.py) in a page."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv3_train.numerics.compare import percent

COLUMNS = (
    "run", "precision", "seed", "loss", "largest", "at step", "mean", "last", "one step", "MTP", "norm", "valid.",
)  # fmt: skip
_NARROW = ("run", "loss", "largest", "mean", "last", "MTP", "norm", "valid.")
"""What fits in 80 characters."""
TEXTS = 2
"""So many of the columns are words."""


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The baseline, the runs, the other seeds; texts under `COLUMNS`."""
    baseline = figures["baseline"]
    first = (baseline["label"], baseline["precision"], str(baseline["seed"]), f"{baseline['mean_loss']:.4f}")
    return [
        first + ("",) * (len(COLUMNS) - len(first)),
        *(_row(run) for run in (*figures["runs"], *figures["seeds"])),
    ]


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    loss, mtp, validation = run["loss"], run["mtp_loss"], run["validation"]
    return (
        run["label"],
        run["precision"],
        str(run["seed"]),
        f"{run['mean_loss']:.4f}",
        percent(loss["max_abs"]),
        str(loss["max_abs_at_step"]),
        f"{loss['mean']:+.3%}",
        f"{loss['last']:+.3%}",
        percent(loss["unsmoothed_max_abs"]),
        percent(mtp["max_abs"]) if mtp else "",
        f"x{run['grad_norm_ratio']:.3f}" if run["grad_norm_ratio"] is not None else "",
        f"{validation['difference']:+.3%}" if validation else "",
    )


def lines(figures: dict[str, Any]) -> list[str]:
    """What the columns mean, and what to know of the runs."""
    steps, baseline = figures["steps"], figures["baseline"]["label"]
    told = [
        f"Steps {steps['first']} to {steps['last']} that all have: {steps['compared']}; all figures are of the last "
        f"half, from step {steps['last_half_from']}. Smoothing: {figures['smoothing']}.",
        f"loss: mean, nats per token. Of (run - {baseline}) / {baseline}, smoothed: largest in absolute value, mean, "
        "last; MTP: the largest of the MTP loss; valid.: at the last validation that both have. norm: mean gradient "
        "norm over the baseline's.",
    ]
    for run in figures["runs"]:
        differs = ", ".join(f"{key} {_short(left)} -> {_short(right)}" for key, (left, right) in run["differs"].items())
        told.append(f"{run['label']} differs from {run['against']} in: {differs or 'nothing'}")
    return told + list(dict.fromkeys(note for run in (*figures["runs"], *figures["seeds"]) for note in run["notes"]))


def verdicts(figures: dict[str, Any]) -> list[str]:
    """Of each run, and how far seeds are apart."""
    told = [f"{run['label']}: {run['verdict']}" for run in figures["runs"]]
    if spread := figures["spread"]:
        told.append(
            f"{spread['seeds']} seeds of {figures['baseline']['label']}: at most {percent(spread['max_abs'])} from it; "
            f"standard deviation of their mean losses {percent(spread['mean_loss_std'])}"
        )
    for group in figures["over_seeds"]:
        each = ", ".join(f"{mean:+.3%}" for mean in group["means"])
        told.append(
            f"{', '.join(group['runs'])}: {group['mean']:+.3%} on the mean of the last half, standard error over "
            f"{len(group['means'])} seeds {percent(group['error'])} ({each})"
        )
    return told


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def grid(columns: tuple[str, ...], texts: int, body: list[tuple[str, ...]]) -> Table:
    """A table whose first `texts` columns are words, the others numbers."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        if number < texts:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in body:
        table.add_row(*map(Text, row))
    return table


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the table and what belongs to it."""
    shown = [COLUMNS.index(name) for name in _NARROW]
    console.print(grid(_NARROW, 1, [tuple(row[number] for number in shown) for row in rows(figures)]))
    for line in [*verdicts(figures), *lines(figures)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
