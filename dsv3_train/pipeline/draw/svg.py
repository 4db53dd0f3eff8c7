"""The usual picture of a pipeline as SVG: a row per rank, time to the right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dsv3_train.pipeline.draw.panel import (
    COLOURS,
    NAMES,
    Panel,
    chunk,
    chunk_names,
    colour,
    hex_colour,
    ink,
    label,
    time,
)
from dsv3_train.pipeline.operations import Op
from dsv3_train.pipeline.simulate import Span, in_flight

ROW, GAP = 26, 4
LEFT, RIGHT, HEADER, LEGEND, AXIS = 64, 150, 64, 36, 30
NARROWEST = 15.0
"""Pixels of a short computation: room for a micro-batch of two digits."""
LEAST, WIDEST = 900.0, 16000.0
"""Pixels of the whole time."""

_STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1f2328}"
    ".title{font-size:15px;font-weight:600}.summary{font-size:12px;fill:#57606a}.side{font-size:12px}"
    ".small{font-size:11px;fill:#57606a}.cell{font-size:10px;text-anchor:middle}.cell text{font-size:10px}"
    "g.op:hover rect{stroke:#000;stroke-width:1.5}"
)


def svg(panels: Sequence[Panel]) -> str:
    """One picture of all panels below each other, on one scale of time. Hovering tells each computation."""
    spans = [span for panel in panels for spans in panel.run.timeline for span in spans]
    longest = max(panel.run.span for panel in panels)
    # Not the very shortest one: measured times vary, and a few outliers must not stretch the picture.
    short = sorted(span.end - span.start for span in spans)[len(spans) // 20]
    scale = max(LEAST, min(WIDEST, longest * NARROWEST / short if short else WIDEST)) / longest
    width = LEFT + longest * scale + RIGHT
    parts: list[str] = []
    top = 0.0
    for panel in panels:
        parts += _panel(panel, top, scale)
        top += HEADER + panel.schedule.ranks * (ROW + GAP) + AXIS
    parts += _legend(panels[0], top)
    height = top + LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _panel(panel: Panel, top: float, scale: float) -> list[str]:
    ranks, right = panel.schedule.ranks, LEFT + panel.run.span * scale
    origin = min(spans[0].start for spans in panel.run.timeline)
    held = in_flight(panel.schedule)
    parts = [
        f'<text class="title" x="12" y="{top + 22}">{escape(panel.title)}</text>',
        f'<text class="summary" x="12" y="{top + 40}">{escape(panel.summary)}</text>',
        f'<text class="small" x="{right + 12:.1f}" y="{top + HEADER - 8}">bubble</text>',
        f'<text class="small" x="{right + 72:.1f}" y="{top + HEADER - 8}">in flight</text>',
    ]
    for rank, spans in enumerate(panel.run.timeline):
        y = top + HEADER + rank * (ROW + GAP)
        parts += [
            f'<text class="side" x="12" y="{y + 17}">rank {rank}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{panel.run.span * scale:.1f}" height="{ROW}" fill="#eef0f2"/>',
            *(_span(span, rank, panel, y, LEFT + (span.start - origin) * scale, scale) for span in spans),
            f'<text class="side" x="{right + 12:.1f}" y="{y + 17}">{panel.run.bubbles[rank]:.1%}</text>',
            f'<text class="side" x="{right + 72:.1f}" y="{y + 17}">{held[rank]:.3g}</text>',
        ]
    return parts + _axis(panel, top + HEADER + ranks * (ROW + GAP), scale)


def _span(span: Span, rank: int, panel: Panel, y: float, x: float, scale: float) -> str:
    width, height = (span.end - span.start) * scale, ROW / len(span.ops)
    lines = [
        f"rank {rank}: {label(span.ops, panel.schedule.ranks)}",
        *(_told(op, panel) for op in span.ops),
        f"{time(span.start, panel.unit)} to {time(span.end, panel.unit)}",
    ]
    parts = [f'<g class="op"><title>{escape(chr(10).join(lines))}</title>']
    for number, op in enumerate(span.ops):
        rgb, at = colour(op, panel.schedule.ranks), y + number * height
        parts.append(
            f'<rect x="{x:.2f}" y="{at}" width="{width:.2f}" height="{height}" '
            f'fill="{hex_colour(rgb)}" stroke="#ffffff" stroke-width="0.8"/>'
        )
        if width >= 6.2 * len(str(op.micro_batch)) + 1:
            parts.append(
                f'<text class="cell" x="{x + width / 2:.2f}" y="{at + height / 2 + 3.6}" '
                f'style="fill:{ink(rgb)}">{op.micro_batch}</text>'
            )
    return "".join(parts) + "</g>"


def _told(op: Op, panel: Panel) -> str:
    names = chunk_names(panel.schedule)
    where = f", {names[chunk(op, panel.schedule.ranks)]}" if len(names) > 1 else ""
    return f"{NAMES[op.kind]} of micro-batch {op.micro_batch}, stage {op.stage}{where}"


def _axis(panel: Panel, y: float, scale: float) -> list[str]:
    """Ticks at 1, 2 or 5 times a power of ten, some 80 pixels apart."""
    least = 80 / scale
    power = 10.0 ** len(str(int(least))) if least >= 1 else 1.0
    while power > least:
        power /= 10
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    parts = []
    for number in range(int(panel.run.span / step) + 1):
        x, told = LEFT + number * step * scale, time(number * step, panel.unit)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2}" y2="{y + 3}" stroke="#8c959f"/>')
        parts.append(f'<text class="small" text-anchor="middle" x="{x:.1f}" y="{y + 15}">{told}</text>')
    return parts


def _legend(panel: Panel, y: float) -> list[str]:
    """Kinds in the shades of their chunks, then what the shades mean."""
    kinds = {op.kind for spans in panel.run.timeline for span in spans for op in span.ops}
    names, ranks = chunk_names(panel.schedule), panel.schedule.ranks
    parts, x = [], float(LEFT)
    for kind in (kind for kind in COLOURS if kind in kinds):
        for number in range(len(names)):
            rgb = colour(Op(kind, 0, number * ranks, 0), ranks)  # type: ignore[arg-type]
            parts.append(f'<rect x="{x}" y="{y + 4}" width="16" height="14" fill="{hex_colour(rgb)}"/>')
            x += 17
        parts.append(f'<text class="side" x="{x + 5}" y="{y + 15}">{NAMES[kind]}</text>')
        x += 30 + 6.6 * len(NAMES[kind])
    told = []
    if len(names) > 1:
        told.append(f"shades: {', '.join(names)}")
    if any(len(span.ops) > 1 for spans in panel.run.timeline for span in spans):
        told.append("split cells: a forward and a backward that overlap")
    return [*parts, f'<text class="small" x="{x:.0f}" y="{y + 15}">{escape("; ".join(told))}</text>']
