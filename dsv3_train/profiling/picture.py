"""The report as a PNG: timeline by stream, where the span goes, time by class."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_train.profiling.boxes import coverage, part_of
from dsv3_train.profiling.colours import EXPOSED, HIDDEN, HOST, IDLE, PLAIN_COMPUTE, colours
from dsv3_train.profiling.work import Work
from dsv3_train.whole import write

_COLUMNS = 1200
_STREAMS, _CLASSES, _RANKS = 10, 14, 32


def picture(works: list[Work], figures: dict[str, Any]) -> Figure:
    """Of one rank: its timeline. Of several: the bars of all, and the timeline of the first one."""
    ranks = figures.get("ranks", [figures])
    work, first = works[0], ranks[0]
    rows = min(_STREAMS, len(work.streams)) + 2
    classes = min(_CLASSES, len(first["classes"]))
    bars = min(_RANKS, len(ranks))
    heights = [0.42 * rows + 0.9, 0.42 * bars + 1.3, 0.27 * classes + 0.9]
    figure = Figure(figsize=(14, sum(heights) + 0.6), layout="constrained")
    timeline, parts, by_class = figure.subplots(3, 1, height_ratios=heights)
    hidden = first["hidden_fraction"]
    told = "no communication" if hidden is None else f"{hidden:.1%} of communication hidden"
    title = f"{Path(first['file']).name}: {told}"
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)  # names may have a $
    _timeline(timeline, work, first)
    _parts(parts, ranks[:_RANKS])
    _classes(by_class, work, first, classes)
    return figure


def _timeline(axes: Axes, work: Work, figures: dict[str, Any]) -> None:
    """Each stream's row filled by class, column by column; below them, what is exposed and what idle."""
    span = (work.last - work.first) / 1e6 or 1.0
    edges = np.linspace(0, span, _COLUMNS + 1)
    order = [row["class"] for row in figures["classes"]]
    colour = colours(work.classes, order)
    busiest = sorted(range(len(work.streams)), key=lambda s: -figures["streams"][s]["busy_ms"])[:_STREAMS]
    labels = []
    for row, stream in enumerate(sorted(busiest)):
        bottom = np.zeros(_COLUMNS)
        for name in order:
            number = [known for known, _ in work.classes].index(name)
            chosen = (work.stream == stream) & (work.cls == number)
            if chosen.any():
                height = np.minimum(coverage(work, chosen, _COLUMNS), 1 - bottom) * 0.86
                low = row + 0.86 - bottom  # rows are filled from below, and the axis points down
                axes.stairs(low - height, edges, baseline=low, fill=True, color=colour[number], lw=0)
                bottom = bottom + height
        labels.append(work.streams[stream])
    for times, name, shade in ((work.exposed, "exposed", EXPOSED), (work.idle, "idle", HOST)):
        row = len(labels)
        height = part_of(work, times, _COLUMNS) * 0.86
        axes.stairs(row + 0.86 - height, edges, baseline=row + 0.86, fill=True, color=shade, lw=0)
        labels.append(name)
    left_out = len(work.streams) - len(busiest)
    title = f"rank {work.rank}, by stream" + (f" ({left_out} less busy ones left out)" if left_out else "")
    axes.set(xlim=(0, span), ylim=(len(labels), -0.1), xlabel="ms", yticks=np.arange(len(labels)) + 0.45)
    axes.set_yticklabels([label[:40] for label in labels], parse_math=False)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _parts(axes: Axes, ranks: list[dict[str, Any]]) -> None:
    """One bar per rank: compute, exposed communication, idle; above it in thin, the hidden communication."""
    for row, figures in enumerate(ranks):
        hidden = figures["comm_ms"] - figures["exposed_comm_ms"]
        host = figures["idle"]["host_bound_ms"] or 0.0
        left = 0.0
        for number, (ms, shade, name) in enumerate(
            (
                (figures["compute_ms"], PLAIN_COMPUTE, "compute"),
                (figures["exposed_comm_ms"], EXPOSED, "exposed communication"),
                (host, HOST, "idle, host-bound"),
                (figures["idle_ms"] - host, IDLE, "idle, other"),
            )
        ):
            axes.barh(row, ms, 0.5, left=left, color=shade, label=name if row == 0 else None)
            if ms > 0.06 * figures["span_ms"]:
                ink = "black" if number == 3 else "white"
                axes.text(left + ms / 2, row, f"{ms / figures['span_ms']:.1%}", ha="center", va="center", color=ink)
            left += ms
        axes.barh(row - 0.34, hidden, 0.13, color=HIDDEN, label="hidden communication" if row == 0 else None)
    axes.set(ylim=(len(ranks) - 0.5, -0.6), xlabel="ms", yticks=range(len(ranks)))
    axes.set_yticklabels([f"rank {figures['rank']}" for figures in ranks])
    axes.set_title("where the span goes", loc="left", fontsize=10)
    axes.legend(ncols=5, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _classes(axes: Axes, work: Work, figures: dict[str, Any], count: int) -> None:
    order = [row["class"] for row in figures["classes"]]
    colour = dict(zip([name for name, _ in work.classes], colours(work.classes, order), strict=True))
    for row, of_class in enumerate(figures["classes"][:count]):
        axes.barh(row, of_class["union_ms"], 0.62, color=colour[of_class["class"]])
        exposed = of_class["exposed_ms"]
        text = f" {of_class['union_ms']:.2f} ms, {of_class['kernels']:,} kernels"
        if exposed is not None:
            axes.barh(row, exposed, 0.2, color=EXPOSED)
            text += f", {exposed:.2f} ms exposed"
        axes.text(of_class["union_ms"], row, text, va="center", fontsize=8)
    longest = max((row["union_ms"] for row in figures["classes"]), default=1.0)
    axes.set(ylim=(count - 0.5, -0.5), xlim=(0, longest * 1.25 or 1.0), xlabel="ms", yticks=range(count))
    axes.set_yticklabels([row["class"][:40] for row in figures["classes"][:count]], fontsize=8, parse_math=False)
    axes.set_title(f"rank {work.rank}, by class", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    png = BytesIO()
    figure.savefig(png, format="png", dpi=100)
    write(path, png.getvalue())
