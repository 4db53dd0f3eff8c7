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
    for part in (_classes(first), _largest(first), _steps(first), _ranges(first), _exposures(first), _gaps(first)):
        if part is not None:
            console.print(part)
    for line in _closing(figures, ranks):
        console.print(line)


def _table(*columns: str, title: str = "") -> Table:
    table = Table(
        box=box.SIMPLE, title=title, title_justify="left", title_style="bold", pad_edge=False, collapse_padding=True
    )
    table.add_column(columns[0], overflow="fold", min_width=len(columns[0]))
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}" if value < 10_000 else f"{value:,.0f}"


def _ranks(ranks: list[dict[str, Any]]) -> Table:
    table = _table("rank", "span ms", "compute", "comm", "exposed", "hidden", "idle", "host", "kernels")
    several = len({rank["file"] for rank in ranks}) < len(ranks)  # which process and device a rank is
    for rank in ranks:
        told = f"{rank['rank']}: {rank['process'][:40]}, {rank['device']}" if several else str(rank["rank"])
        table.add_row(
            Text(told),
            *(_ms(rank[key]) for key in ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms")),
            Text(_share(rank["hidden_fraction"]), style="bold"),
            _ms(rank["idle_ms"]),
            _ms(rank["idle"]["host_bound_ms"]),
            f"{rank['kernels']:,}",
        )
    table.caption = "ms; host: idle because the GPU waits for launches; compute + exposed + idle = span"
    return table


def _classes(rank: dict[str, Any]) -> Table:
    table = _table("class", "kernels", "ms", "union", "exposed", "streams", title="by class")
    for row in rank["classes"][:_CLASSES]:
        streams = ", ".join(name.removeprefix("stream ").removeprefix("thread ") for name in row["streams"][:3])
        more = "..." if len(row["streams"]) > 3 else ""
        style = "yellow" if row["kind"] == "communication" else ""
        cells = (f"{row['kernels']:,}", _ms(row["ms"]), _ms(row["union_ms"]), _ms(row["exposed_ms"]), streams + more)
        table.add_row(*map(Text, (row["class"], *cells)), style=style)  # names may have what rich takes for markup
    gemm = rank["gemm"]
    if gemm and gemm["tflops"] is not None:
        table.caption = (
            f"GEMM: {gemm['tflops']:.3g} TFLOPS over the {gemm['with_shapes_ms']:,.2f} of {gemm['ms']:,.2f} ms "
            "whose shapes are in the trace"
        )
    elif gemm:
        table.caption = "GEMM TFLOPS: not known; the trace has no shapes (record_shapes=True)"
    return table


def _largest(rank: dict[str, Any]) -> Table:
    table = _table("longest", "kernels", "ms")
    for row in rank["largest"][:10]:
        table.add_row(Text(_name(row)), f"{row['kernels']:,}", _ms(row["ms"]))
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
    table = _table("range", "count", "kernels", "compute", "comm", "exposed", title="by named range")
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
        if pairs := rank["pairs"]:
            parts = f"{_ms(pairs['exposed_comm_ms'])} of {_ms(pairs['comm_ms'])} ms of communication exposed"
            lines.append(Text(f"{of}{pairs['count']:,} F&B pairs: {parts}, {_share(pairs['hidden_fraction'])} hidden"))
        lines += [Text(f"{of}{note}", style="dim") for note in rank["notes"]]
        unknown = rank["unclassified"]
        if unknown["ms"]:
            names = ", ".join(f"{row['name'][:60]} ({row['ms']:.2f} ms)" for row in unknown["names"][:3])
            lines.append(Text(f"{of}not classified, counted as compute: {unknown['ms']:.2f} ms: {names}", style="dim"))
    return lines


def show_pipelines(figures: dict[str, Any], console: Console) -> None:
    """Speed, and of every pipeline its bubbles: measured, simulated with the measured times, and the schedule's own."""
    speed = figures["speed"]
    console.print(
        Text(
            f"{speed['step_seconds']:.3f} s per step, {speed['tokens_per_second']:,.0f} tokens/s, "
            f"{speed['tflops_per_process']:.3g} TFLOPS per process (without the profiler)"
        )
    )
    if not figures["pipelines"]:
        return
    table = _table("pipeline of ranks", "span ms", "bubble", "simulated", "ideal", "mean", title="pipelines")
    for one in figures["pipelines"]:
        ranks = ", ".join(str(rank["rank"]) for rank in one["ranks"])
        keys = ("bubble_fraction", "simulated_bubble_fraction", "ideal_bubble_fraction", "mean_bubble_fraction")
        table.add_row(ranks, _ms(one["span_ms"]), *(_share(one[key]) for key in keys))
    table.caption = (
        "bubble: on the rank that idles most; simulated: with the measured mean times and messages that take none;\n"
        "ideal: every stage takes the same times; mean: over the ranks"
    )
    console.print(table)
    for one in figures["pipelines"]:
        for found in one["findings"]:
            console.print(Text(f"! {found['text']}", style="bold"))
