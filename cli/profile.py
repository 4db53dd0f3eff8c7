"""`dsv3 profile`: how much communication is hidden, as a number and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsv3_cli.reports import tell

if TYPE_CHECKING:
    from dsv3_train.profiling.work import Work
    from dsv3_train.training.profile import Plan

app = typer.Typer(no_args_is_help=True, help="Where the time of a step goes: communication hidden, exposed, idle.")

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def analyze(
    traces: Annotated[list[Path], typer.Argument(help="Chrome traces (.json, .json.gz), one per rank.")],
    as_json: _AsJson = False,
    html: Annotated[Optional[Path], typer.Option(help="Write a page with the timeline.", metavar="FILE")] = None,
    png: Annotated[Optional[Path], typer.Option(help="Write the picture.", metavar="FILE")] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="Write report.json, report.html and report.png here.", metavar="DIR")
    ] = None,
    classes: Annotated[
        Optional[Path],
        typer.Option(
            help="Rules before the built-in ones: a YAML list of {class: NAME, kind: compute or communication, match: "
            '"REGEX"}.',
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Hidden, exposed and idle time of any torch.profiler trace, by class, stream, step and named range.

    Communication: NCCL, RCCL, DeepEP, NVSHMEM, and copies between host and device or between devices. Copies within a
    device and memsets are compute, as are kernels and copies that no rule knows, which are listed. hidden_fraction is
    null where there is no communication.

    Each device of each process is one GPU and one rank, also where a file has several. A kernel that runs into the next
    kernel of its stream is cut there and counted. A trace whose GPUs cannot be told apart is refused.

    Example: dsv3 profile analyze trace.json.gz --html report.html
    """
    from dsv3_train.profiling.classes import table
    from dsv3_train.profiling.report import report
    from dsv3_train.profiling.table import show
    from dsv3_train.profiling.work import works

    chosen = table(classes)
    found = works(_read(traces, quiet=as_json), chosen)
    figures = report(found)
    written = write_report(found, figures, out=out, html=html, png=png)
    tell(figures, show, written, as_json)


def _read(paths: list[Path], quiet: bool) -> list:
    """The traces, with a bar where there is someone to look at it."""
    from rich.console import Console
    from rich.progress import track

    from dsv3_train.profiling.trace import read

    console = Console(stderr=True)
    shown = track(paths, "reading", console=console, transient=True, disable=quiet or not console.is_terminal)
    return [read(path) for path in shown]


def write_report(
    works: list[Work],
    figures: dict[str, Any],
    *,
    out: Path | None,
    html: Path | None = None,
    png: Path | None = None,
    more: str = "",
) -> list[Path]:
    """Write what is wanted (`more`: HTML of a page); which files that were."""
    from dsv3_train.profiling.report import as_json
    from dsv3_train.whole import write

    pages = [path for path in (html, out / "report.html" if out else None) if path]
    pictures = [path for path in (png, out / "report.png" if out else None) if path]
    written = []
    if out:
        write(out / "report.json", as_json(figures) + "\n")
        written.append(out / "report.json")
    if pages:
        from dsv3_train.profiling.page import page

        text = page(works, figures, more)
        for path in pages:
            write(path, text)
    if pictures:
        from dsv3_train.profiling.picture import picture, save

        drawn = picture(works, figures)
        for path in pictures:
            save(drawn, path)
    return [*written, *pages, *pictures]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (dsv3 recipes list) or a YAML file.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Recipe overrides, as training.seed=7.", metavar="[a.b=c]...")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed without a profiler, and then as many traced.")] = 3,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 2,
    ranks: Annotated[str, typer.Option(help="Ranks that write a trace, as 0,1; or all.")] = "0",
    balanced: Annotated[
        bool,
        typer.Option(
            "--balanced",
            help="Send every expert about as many tokens (random ones), as in the profile that DeepSeek published: "
            "otherwise, what a rank waits for others with more tokens counts as communication.",
        ),
    ] = False,
    out: Annotated[
        Optional[Path], typer.Option(help="Directory of all files; none: RUN_DIR/profile.", metavar="DIR")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Train a few steps on random tokens, and report where their time went.

    Leaves traces for Perfetto and TensorBoard (rankN.pt.trace.json.gz), report.json, report.html, report.png, and of a
    pipeline its measured diagram beside the simulated ones: pipeline.svg, pipeline.html. The pipeline is measured in
    steps without a profiler.

    Example: dsv3 profile run smoke schedule.batch_size=8 --steps 2
    """
    from dsv3_train.training.profile import Plan, ready
    from dsv3_train.training.profile import run as train

    loaded = ready(recipe, overrides or [])
    where = out or loaded.run_dir / "profile"
    plan = Plan(where, steps, warmup, _ranks(ranks, loaded.parallel.world_size), balanced)
    train(loaded, plan, lambda: _report_run(plan, as_json))


def _ranks(text: str, world: int) -> tuple[int, ...]:
    from dsv3_train.errors import UserError

    if text == "all":
        return tuple(range(world))
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(f"--ranks: numbers with commas between them, or all; not {text!r}") from None


def _report_run(plan: Plan, as_json: bool) -> None:
    """From the files that a run left: reports and pictures, and what stands in them."""
    import json

    from dsv3_train.profiling.classes import table
    from dsv3_train.profiling.pipeline_page import write_pipelines
    from dsv3_train.profiling.report import report
    from dsv3_train.profiling.table import show, show_pipelines
    from dsv3_train.profiling.work import works
    from dsv3_train.training.profile import trace_of

    timed = json.loads((plan.out / "pipeline.json").read_text(encoding="utf-8"))
    traces = [trace_of(plan.out, rank) for rank in plan.ranks]
    found = works(_read(traces, quiet=as_json), table())
    figures = report(found)
    speed = ("step_seconds", "tokens_per_second", "tflops_per_process")
    figures["speed"] = {key: timed[key] for key in speed}
    for rank in figures.get("ranks", [figures]) if plan.balanced else ():
        rank["notes"].append("every expert was sent about as many tokens (--balanced)")
    figures["pipelines"], drawn, section = write_pipelines(plan.out, timed)
    written = [*traces, *drawn, *write_report(found, figures, out=plan.out, more=section)]

    def show_all(figures: dict[str, Any], console: Any) -> None:
        show(figures, console)
        show_pipelines(figures, console)

    tell(figures, show_all, written, as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="report.json of `dsv3 profile analyze --out`, or its directory.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: _AsJson = False,
) -> None:
    """Two reports side by side, per step where both have steps: what got faster, what slower.

    Example: dsv3 profile compare before/report.json after/report.json
    """
    from dsv3_train.profiling.compare import compare as side_by_side
    from dsv3_train.profiling.compare import load

    compared = side_by_side(load(a), load(b))
    if as_json:
        import json

        print(json.dumps(compared, indent=1))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(f"ms per {compared['per']}")
    for title in ("A", "B", "B - A", "change"):
        table.add_column(title, justify="right")

    def row(name: str, both: dict[str, Any], style: str = "") -> None:
        change = f"{both['difference'] / both['a']:+.1%}" if both["a"] and both["difference"] is not None else ""
        texts = ["none" if both[side] is None else f"{both[side]:,.3f}" for side in ("a", "b")]
        difference = "" if both["difference"] is None else f"{both['difference']:+,.3f}"
        # As Text: a class may have what rich takes for markup.
        table.add_row(Text(name), *texts, difference, change, style=style)

    for name in ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "idle_ms", "host_bound_ms"):
        row(name.removesuffix("_ms").replace("_", " "), compared[name], "bold")
    row("hidden fraction", compared["hidden_fraction"], "bold")
    table.add_section()
    for of_class in compared["classes"][:25]:
        row(of_class["class"], of_class)
    console = Console()
    console.print(table)
    if max(compared["ranks"]) > 1:
        print(f"Means over ranks ({compared['ranks'][0]} and {compared['ranks'][1]}).")
