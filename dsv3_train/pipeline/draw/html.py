"""The picture as a page of its own: no scripts, nothing loaded."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dsv3_train.pipeline.draw.panel import Panel, time
from dsv3_train.pipeline.draw.svg import svg
from dsv3_train.pipeline.simulate import in_flight

_STYLE = """
body { margin: 24px; color: #1f2328;
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.picture { overflow-x: auto; border: 1px solid #d0d7de; border-radius: 6px; margin: 0 0 16px; }
.picture svg { display: block; }
.tables { display: flex; flex-wrap: wrap; gap: 40px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; font-weight: 600; padding-bottom: 4px; }
th, td { padding: 3px 14px 3px 0; text-align: right; border-bottom: 1px solid #eaeef2; }
th { font-weight: 500; color: #57606a; }
p { color: #57606a; max-width: 60em; }
"""


def html(panels: Sequence[Panel]) -> str:
    """A self-contained page with the picture of all panels and their figures per rank."""
    heading = escape(panels[0].title)
    tables = "".join(_table(panel) for panel in panels)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{_STYLE}</style>
</head>
<body>
<div class="picture">{svg(panels)}</div>
<div class="tables">{tables}</div>
<p>Bubble: the idle part of the time from the first computation of any rank to the last one's end. In flight: forwards
whose backward has not begun, in activations that one micro-batch leaves on 1/{panels[0].schedule.ranks} of the model.
Hover over a computation for its stage, micro-batch and times.</p>
</body>
</html>
"""


def _table(panel: Panel) -> str:
    held, busy = in_flight(panel.schedule), panel.run.busy
    rows = "".join(
        f"<tr><td>{rank}</td><td>{time(busy[rank], panel.unit)}</td><td>{panel.run.bubbles[rank]:.1%}</td>"
        f"<td>{held[rank]:.3g}</td></tr>"
        for rank in range(panel.schedule.ranks)
    )
    return (
        f"<table><caption>{escape(panel.title)}</caption><thead><tr><th>rank</th><th>computes</th><th>bubble</th>"
        f"<th>in flight</th></tr></thead><tbody>{rows}</tbody></table>"
    )
