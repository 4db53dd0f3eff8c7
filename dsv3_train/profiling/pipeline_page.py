"""The measured pipelines of a run as files: SVG, HTML, and a section of the report's page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from dsv3_train.pipeline.draw.html import html
from dsv3_train.pipeline.draw.svg import svg
from dsv3_train.profiling.pipeline_view import figures, of_pipelines, panels
from dsv3_train.whole import write


def write_pipelines(out: Path, timed: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Path], str]:
    """The figures of every pipeline, the pictures written of the first one, and what the report's page says of it.

    Nothing where there is no pipeline.
    """
    found = of_pipelines(timed)
    told = [figures(one, ranks) for ranks, one in found]
    if not found:
        return told, [], ""
    ranks, first = found[0]
    drawn = panels(first, timed["recipe"], ranks)
    picture = svg(drawn)
    write(out / "pipeline.svg", picture)
    write(out / "pipeline.html", html(drawn))
    lines = [
        f"Measured bubble {one['bubble_fraction']:.1%}, simulated with the measured times "
        f"{one['simulated_bubble_fraction']:.1%}, ideal {one['ideal_bubble_fraction']:.1%} "
        f"(ranks {', '.join(str(rank['rank']) for rank in one['ranks'])})"
        for one in told
    ]
    lines += [finding["text"] for one in told for finding in one["findings"]]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    section = f'<h2>Pipeline</h2><ul class="findings">{items}</ul><div class="scroll">{picture}</div>'
    return told, [out / "pipeline.svg", out / "pipeline.html"], section
