"""The report in a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

_CLASSES, _LINES, _RANGES = 24, 5, 20


def show(figures: dict[str, Any], console: Console) -> None:
    """Figures of every rank; of the first one, what they are made of."""
    ranks = figures.get("ranks", [figures])
    console.print(_ranks(ranks))
    first = ranks[0]
    if len(ranks) > 1:
        console.print(f"Of rank {first['rank']} (all ranks: --json, --html, --out):", style="dim")
    for part in (_classes(first), _steps(first), _ranges(first), _exposures(first), _gaps(first)):
        if part is not None:
            console.print(part)
    for line in _closing(figures, ranks):
        console.print(line)


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _ranks(ranks: list[dict[str, Any]]) -> Table:
    table = _table("rank", "span ms", "compute", "comm", "exposed", "hidden", "idle", "host-bound", "kernels")
    for rank in ranks:
        table.add_row(
            str(rank["rank"]),
            *(_ms(rank[key]) for key in ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms")),
            Text(_share(rank["hidden_fraction"]), style="bold"),
            _ms(rank["idle_ms"]),
            _ms(rank["idle"]["host_bound_ms"]),
            f"{rank['kernels']:,}",
        )
    return table


def _classes(rank: dict[str, Any]) -> Table:
    table = _table("class", "kernels", "ms", "union ms", "exposed ms", "streams", title="by class")
    for row in rank["classes"][:_CLASSES]:
        streams = ", ".join(name.removeprefix("stream ") for name in row["streams"][:4])
        more = "..." if len(row["streams"]) > 4 else ""
        style = "yellow" if row["kind"] == "communication" else ""
        cells = (f"{row['kernels']:,}", _ms(row["ms"]), _ms(row["union_ms"]), _ms(row["exposed_ms"]), streams + more)
        table.add_row(row["class"], *cells, style=style)
    gemm = rank["gemm"]
    if gemm and gemm["tflops"] is not None:
        table.caption = (
            f"GEMM: {gemm['tflops']:,.1f} TFLOPS over the {gemm['with_shapes_ms']:,.2f} of {gemm['ms']:,.2f} ms "
            "whose shapes are in the trace"
        )
    elif gemm:
        table.caption = "GEMM TFLOPS: not known; the trace has no shapes (record_shapes=True)"
    return table


def _steps(rank: dict[str, Any]) -> Table | None:
    if not rank["steps"]:
        return None
    table = _table("step", "span ms", "compute", "comm", "exposed", "hidden", "idle", title="by step")
    for row in rank["steps"][:20]:
        parts = (_ms(row[key]) for key in ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms"))
        table.add_row(str(row["step"]), *parts, _share(row["hidden_fraction"]), _ms(row["idle_ms"]))
    return table


def _ranges(rank: dict[str, Any]) -> Table | None:
    rows = [row for row in rank["ranges"] if row["kernels"]][:_RANGES]
    if not rows:
        return None
    table = _table("range", "count", "kernels", "compute", "comm", "exposed ms", title="by named range")
    for row in rows:
        parts = (_ms(row[key]) for key in ("compute_ms", "comm_ms", "exposed_comm_ms"))
        table.add_row(Text(row["name"]), f"{row['count']:,}", f"{row['kernels']:,}", *parts)
    return table


def _name(kernel: dict[str, Any] | None) -> str:
    if kernel is None:
        return "nothing"
    name = kernel["name"].removeprefix("void ")
    return name if len(name) <= 48 else name[:45] + "..."


def _exposures(rank: dict[str, Any]) -> Group | None:
    if not rank["exposures"]:
        return None
    lines = [Text("longest exposed communication", style="bold")]
    for row in rank["exposures"][:_LINES]:
        running = " & ".join(f"{_name(kernel)} ({kernel['stream']})" for kernel in row["kernels"][:2])
        lines.append(
            Text(f"{row['ms']:9.3f} ms at {row['start_ms']:.3f}: {running}\n")
            + Text(f"{'':13}after  {_name(row['before'])}\n{'':13}before {_name(row['after'])}", style="dim")
        )
    return Group(*lines, Text(""))


def _gaps(rank: dict[str, Any]) -> Group | None:
    gaps = [gap for gap in rank["idle"]["gaps"][:_LINES] if gap["ms"] > 0.001 * rank["span_ms"]]
    if not gaps:
        return None
    lines = [Text("longest gaps", style="bold")]
    for gap in gaps:
        cause = "launch not in the trace"
        if gap["host_bound_ms"] is not None:
            cause = "the next kernel was launched already"
            if gap["host_bound_ms"] > 0:
                cause = f"host-bound for {gap['host_bound_ms']:.3f} ms"
                cause += f", the host was at {gap['host_did']}" if gap["host_did"] else ""
        lines.append(Text(f"{gap['ms']:9.3f} ms at {gap['start_ms']:.3f}: {cause}; then {_name(gap['next'])}"))
    return Group(*lines, Text(""))


def _closing(figures: dict[str, Any], ranks: list[dict[str, Any]]) -> list[Text]:
    lines = []
    for one in figures["findings"]:
        of = f"rank {one['rank']}: " if "rank" in one and one["kind"] != "straggler" else ""
        lines.append(Text(f"! {of}{one['text']}", style="bold"))
    for rank in ranks:
        of = f"rank {rank['rank']}: " if len(ranks) > 1 else ""
        lines += [Text(f"{of}{note}", style="dim") for note in rank["notes"]]
        unknown = rank["unclassified"]
        if unknown["ms"]:
            names = ", ".join(f"{row['name'][:60]} ({row['ms']:.2f} ms)" for row in unknown["names"][:3])
            lines.append(Text(f"{of}not classified, counted as compute: {unknown['ms']:.2f} ms: {names}", style="dim"))
    return lines
