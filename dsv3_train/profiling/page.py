"""The report as one self-contained page: figures, and a timeline by stream to zoom into."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from dsv3_train.profiling.boxes import MOST, boxes, marks
from dsv3_train.profiling.colours import EXPOSED, HIDDEN, HOST, IDLE, PLAIN_COMPUTE, colours
from dsv3_train.profiling.page_script import SCRIPT
from dsv3_train.profiling.work import Work

_STYLE = """
body { margin: 24px; color: #1f2328; max-width: 1500px;
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 24px 0 6px; }
p, .note { color: #57606a; margin: 4px 0; }
.figures { display: flex; flex-wrap: wrap; gap: 28px; margin: 14px 0; }
.figures b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures span { color: #57606a; }
.findings li { margin: 2px 0; }
.bar { display: flex; height: 30px; border-radius: 4px; overflow: hidden; background: #eef0f2; }
.bar div { color: #fff; font-size: 12px; line-height: 30px; text-align: center; overflow: hidden; white-space: nowrap; }
.bar.thin { height: 8px; margin-bottom: 3px; border-radius: 2px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0; font-size: 12px; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px;
  vertical-align: -1px; }
.timeline { border: 1px solid #d0d7de; border-radius: 6px; position: relative; }
canvas { display: block; width: 100%; cursor: grab; }
#tip { position: absolute; display: none; pointer-events: none; background: #1f2328; color: #fff; font-size: 12px;
  line-height: 1.4; padding: 6px 9px; border-radius: 5px; max-width: 560px; overflow-wrap: anywhere; z-index: 2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 3px 16px 3px 0; text-align: right; border-bottom: 1px solid #eaeef2; vertical-align: top; }
th { font-weight: 500; color: #57606a; white-space: nowrap; }
td.text, th.text { text-align: left; overflow-wrap: anywhere; }
td button { all: unset; color: #0969da; cursor: pointer; } td button:hover { text-decoration: underline; }
"""


def page(works: list[Work], figures: dict[str, Any], more: str = "") -> str:
    """A page that loads nothing. `more` is HTML that stands before the tables."""
    ranks = figures.get("ranks", [figures])
    each = max(2000, MOST // len(works))
    data = [_data(work, rank, each) for work, rank in zip(works, ranks, strict=True)]
    # In a script element, `<` could end it.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    title = escape(Path(ranks[0]["file"]).name) + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
    chooser = ""
    if len(ranks) > 1:
        options = "".join(f'<option value="{i}">rank {rank["rank"]}</option>' for i, rank in enumerate(ranks))
        chooser = f'<p><label>Timeline and tables of <select id="rank">{options}</select></label></p>'
    sections = "".join(
        f'<section class="rank"{"" if i == 0 else " hidden"}>{_sections(rank)}</section>'
        for i, rank in enumerate(ranks)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
{_findings(figures)}
<h2>Where the span goes</h2>
{"".join(map(_bar, ranks))}
{_bar_key()}
{more}
{chooser}
<h2>Timeline</h2>
<p>Wheel: zoom. Drag: move. Double click: everything. Hover for names.</p>
<div class="timeline"><canvas id="canvas"></canvas><div id="tip"></div></div>
<div class="key" id="key"></div>
{sections}
<script id="data" type="application/json">{embedded}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _data(work: Work, figures: dict[str, Any], most: int) -> dict[str, Any]:
    order = [row["class"] for row in figures["classes"]]
    return {
        "span": work.last - work.first,
        "classes": [{"name": name, "kind": kind} for name, kind in work.classes],
        "colours": colours(work.classes, order),
        "marks": [
            {"name": "exposed", "colour": EXPOSED, **marks(work, work.exposed)},
            {"name": "idle", "colour": HOST, **marks(work, work.idle)},
        ],
        **boxes(work, most),
    }


def _findings(figures: dict[str, Any]) -> str:
    told = [
        (f"rank {one['rank']}: " if "rank" in one and one["kind"] != "straggler" else "") + one["text"]
        for one in figures["findings"][:12]
    ]
    if not told:
        return "<p>Nothing stands out.</p>"
    return f'<ul class="findings">{"".join(f"<li>{escape(text)}</li>" for text in told)}</ul>'


def _bar(rank: dict[str, Any]) -> str:
    span = rank["span_ms"] or 1.0
    host = rank["idle"]["host_bound_ms"] or 0.0
    parts = (
        (rank["compute_ms"], PLAIN_COMPUTE, "compute"),
        (rank["exposed_comm_ms"], EXPOSED, "exposed communication"),
        (host, HOST, "idle, host-bound"),
        (rank["idle_ms"] - host, IDLE, "idle, other"),
    )
    cells = "".join(
        f'<div style="width:{100 * ms / span:.3f}%;background:{colour};color:{"#000" if colour == IDLE else "#fff"}" '
        f'title="{name}: {ms:.3f} ms ({ms / span:.2%})">{f"{ms:.2f} ms" if ms > 0.06 * span else ""}</div>'
        for ms, colour, name in parts
    )
    hidden = rank["comm_ms"] - rank["exposed_comm_ms"]
    return (
        f'<div class="note">rank {rank["rank"]}: {_in_words(rank)}</div>'
        f'<div class="bar thin"><div style="width:{100 * hidden / span:.3f}%;background:{HIDDEN}" '
        f'title="hidden communication: {hidden:.3f} ms"></div></div><div class="bar">{cells}</div>'
    )


def _in_words(rank: dict[str, Any]) -> str:
    hidden = rank["hidden_fraction"]
    told = "no communication" if hidden is None else f"{hidden:.1%} of {rank['comm_ms']:.2f} ms communication hidden"
    return f"{rank['span_ms']:.2f} ms, {told}"


def _bar_key() -> str:
    items = (
        (PLAIN_COMPUTE, "compute"),
        (EXPOSED, "exposed communication"),
        (HOST, "idle, host-bound: the GPU waits for launches"),
        (IDLE, "idle, other"),
        (HIDDEN, "thin: hidden communication"),
    )
    return f'<div class="key">{"".join(f"<span><i style=background:{c}></i>{t}</span>" for c, t in items)}</div>'


def _sections(rank: dict[str, Any]) -> str:
    idle = rank["idle"]
    numbers = {
        "span": rank["span_ms"],
        "compute": rank["compute_ms"],
        "communication": rank["comm_ms"],
        "exposed": rank["exposed_comm_ms"],
        "idle": rank["idle_ms"],
        "host-bound": idle["host_bound_ms"],
    }
    cards = "".join(
        f"<div><b>{ms:,.3f}</b><span>{name}, ms</span></div>" for name, ms in numbers.items() if ms is not None
    )
    hidden = rank["hidden_fraction"]
    shown = "none" if hidden is None else f"{hidden:.2%}"
    cards += f"<div><b>{shown}</b><span>of communication hidden</span></div>"
    if rank["pairs"] and rank["pairs"]["hidden_fraction"] is not None:
        cards += f"<div><b>{rank['pairs']['hidden_fraction']:.2%}</b><span>of it hidden in F&amp;B pairs</span></div>"
    cards += f"<div><b>{rank['kernels']:,}</b><span>kernels</span></div>"
    parts = [f"<h2>Rank {rank['rank']}</h2>", f'<div class="figures">{cards}</div>']
    parts += [f'<p class="note">{escape(note)}</p>' for note in rank["notes"]]
    parts.append(
        _table(
            "Classes",
            ["class", "", "kernels", "ms", "union ms", "exposed ms"],
            [
                [row["class"], row["kind"], row["kernels"], row["ms"], row["union_ms"], row["exposed_ms"]]
                for row in rank["classes"]
            ],
        )
    )
    parts.append(
        _table(
            "Kernels that took longest",
            ["kernel", "class", "kernels", "ms"],
            [[row["name"], row["class"], row["kernels"], row["ms"]] for row in rank["largest"]],
        )
    )
    parts.append(
        _table(
            "Longest exposed stretches",
            ["at ms", "ms", "what ran", "before", "after"],
            [
                [
                    _at(row["start_ms"], row["ms"]),
                    row["ms"],
                    ", ".join(f"{k['class']} ({k['stream']}): {k['name']}" for k in row["kernels"][:2]),
                    row["before"] and row["before"]["name"],
                    row["after"] and row["after"]["name"],
                ]
                for row in rank["exposures"]
            ],
        )
    )
    parts.append(
        _table(
            "Longest gaps",
            ["at ms", "ms", "host-bound ms", "the host was at", "next"],
            [
                [_at(g["start_ms"], g["ms"]), g["ms"], g["host_bound_ms"], g["host_did"], g["next"]["name"]]
                for g in idle["gaps"]
            ],
        )
    )
    columns = ["compute ms", "comm ms", "exposed ms"]
    keys = ["compute_ms", "comm_ms", "exposed_comm_ms"]
    parts.append(
        _table(
            "Steps",
            ["step", "span ms", *columns, "idle ms"],
            [[row["step"], row["span_ms"], *(row[key] for key in keys), row["idle_ms"]] for row in rank["steps"]],
        )
    )
    parts.append(
        _table(
            "Named ranges",
            ["range", "count", "kernels", *columns, "host ms"],
            [
                [row["name"], row["count"], row["kernels"], *(row[key] for key in keys), row["host_ms"]]
                for row in rank["ranges"][:60]
            ],
        )
    )
    unknown = [[row["name"], row["ms"]] for row in rank["unclassified"]["names"]]
    parts.append(_table("Not classified (counted as compute)", ["kernel", "ms"], unknown))
    return "".join(parts)


class _Html(str):
    """Not to be escaped."""


def _at(start: float, length: float) -> _Html:
    """A place on the timeline to go to."""
    return _Html(f'<button data-start="{start * 1e6:.0f}" data-length="{length * 1e6:.0f}">{start:,.3f}</button>')


def _table(title: str, heads: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return ""

    def cell(value: Any) -> str:
        if isinstance(value, _Html):
            return f"<td>{value}</td>"
        if isinstance(value, float):
            return f"<td>{value:,.3f}</td>"
        if isinstance(value, int):
            return f"<td>{value:,}</td>"
        return f'<td class="text">{escape(str(value)) if value is not None else ""}</td>'

    head = "".join(f'<th class="{"text" if isinstance(rows[0][i], str) else ""}">{h}</th>' for i, h in enumerate(heads))
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f'<h2>{title}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
