"""`dsv3 pipeline`: pipeline schedules as pictures, figures and lists of operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from dsv3_train.pipeline.compare import Compared
    from dsv3_train.pipeline.operations import Schedule

app = typer.Typer(no_args_is_help=True, help="Draw, compare and list pipeline schedules, without running a model.")

_Kind = Annotated[str, typer.Argument(help="1f1b, interleaved, zb1p, zbv, dualpipe or dualpipev.", show_default=False)]
_Ranks = Annotated[int, typer.Option("--ranks", "--stages", help="Ranks of the pipeline.", metavar="P")]
_MicroBatches = Annotated[int, typer.Option("--micro-batches", help="Micro-batches of a global batch.", metavar="M")]
_Virtual = Annotated[int, typer.Option(help="Chunks per rank of the interleaved schedule.")]
_Pairs = Annotated[bool, typer.Option("--pairs", help="Interleaved with F&B pairs, as Megatron-core has it.")]
_Durations = Annotated[
    str,
    typer.Option(
        help="Times of a rank's forward, backward (gradients of inputs and of weights) and F&B pair, or a JSON file "
        'of measured ones: {"F": 2.1, "I": ..., "W": ..., "FB": ..., "per": "stage", "stages": {"7": {"F": 2.6}}}.',
        metavar="F=..,I=..,W=..,FB=..|FILE",
    ),
]
_Latency = Annotated[float, typer.Option(help="Time of a message between ranks, in the unit of the durations.")]
_Blocking = Annotated[bool, typer.Option("--blocking", help="Ranks wait in their exchanges instead of computing.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def show(
    kind: _Kind,
    ranks: _Ranks = 8,
    micro_batches: _MicroBatches = 20,
    virtual: _Virtual = 2,
    pairs: _Pairs = False,
    durations: _Durations = "F=1,I=1,W=1",
    latency: _Latency = 0.0,
    blocking: _Blocking = False,
    svg: Annotated[Optional[str], typer.Option(help="Write the picture here instead.", metavar="FILE")] = None,
    html: Annotated[Optional[str], typer.Option(help="Write a page with the picture here.", metavar="FILE")] = None,
) -> None:
    """Draw a schedule: a row per rank, time to the right.

    Example: dsv3 pipeline show dualpipe --stages 8 --micro-batches 20
    """
    from dsv3_train.pipeline.draw.panel import Panel
    from dsv3_train.pipeline.durations_input import durations_from
    from dsv3_train.pipeline.simulate import simulate

    _check_latency(latency)
    times = durations_from(durations)
    schedule = _build(kind, ranks, micro_batches, virtual, pairs)
    _check_stages(times.stages, schedule)
    title = f"{kind}: {ranks} ranks, {micro_batches} micro-batches"
    panel = Panel(title, schedule, simulate(schedule, times.of(schedule), latency, blocking))
    if svg:
        from dsv3_train.pipeline.draw.svg import svg as draw_svg

        _write(svg, draw_svg([panel]))
    if html:
        from dsv3_train.pipeline.draw.html import html as draw_html

        _write(html, draw_html([panel]))
    if not svg and not html:
        from rich.console import Console

        from dsv3_train.pipeline.draw.terminal import terminal

        console = Console()
        console.print(terminal(panel, console), soft_wrap=False)


@app.command()
def compare(
    ranks: _Ranks = 8,
    micro_batches: _MicroBatches = 20,
    durations: _Durations = "F=1,I=1,W=1",
    virtual: _Virtual = 2,
    pairs: _Pairs = False,
    latency: _Latency = 0.0,
    blocking: _Blocking = False,
    head: Annotated[float, typer.Option(help="Work of the head and the loss, as a part of a rank's layers.")] = 0.0,
    as_json: _AsJson = False,
) -> None:
    """Bubble, activations in flight and copies of the parameters of every schedule, beside the closed formulas.

    Example: dsv3 pipeline compare --ranks 8 --durations F=2,I=2,W=1,FB=3
    """
    from dsv3_train.errors import UserError
    from dsv3_train.pipeline.compare import Conditions
    from dsv3_train.pipeline.compare import compare as side_by_side
    from dsv3_train.pipeline.durations_input import durations_from

    _check_latency(latency)
    if not 0 <= head < float("inf"):
        raise UserError(f"--head must be 0 or more, not {head}")
    _check_counts(ranks, micro_batches, virtual)
    times = durations_from(durations)
    if times.stages or times.per_stage:
        raise UserError(
            f"{durations}: times of single stages (stages, per) fit one schedule alone; leave them out, or use "
            "`dsv3 pipeline show`"
        )
    conditions = Conditions(times, latency, blocking, head, virtual, pairs)
    compared, notes = side_by_side(ranks, micro_batches, conditions)
    if as_json:
        _print_json({"schedules": [_figures(one) for one in compared], "notes": notes})
    else:
        _print_table(compared, notes)


@app.command()
def ops(
    kind: _Kind,
    ranks: _Ranks = 8,
    micro_batches: _MicroBatches = 20,
    virtual: _Virtual = 2,
    pairs: _Pairs = False,
    as_json: _AsJson = False,
) -> None:
    """The computations of each rank in order, as F0.3: kind, chunk (of dualpipe: direction), micro-batch.

    Kinds: F forward, B backward, I gradients of inputs, W gradients of weights; F0.3&B1.1 is an overlapped pair.

    Example: dsv3 pipeline ops dualpipe --ranks 4 --micro-batches 8 --json
    """
    from dsv3_train.pipeline.draw.panel import label
    from dsv3_train.pipeline.operations import Compute

    schedule = _build(kind, ranks, micro_batches, virtual, pairs)
    lists = [[label(event.ops, ranks) for event in events if isinstance(event, Compute)] for events in schedule.events]
    if as_json:
        _print_json({"ranks": lists})
    else:
        for rank, names in enumerate(lists):
            print(f"rank {rank}: {' '.join(names)}")


def _build(kind: str, ranks: int, micro_batches: int, virtual: int, pairs: bool) -> Schedule:
    from dsv3_train.errors import UserError
    from dsv3_train.pipeline.generate import build
    from dsv3_train.pipeline.operations import KINDS

    if kind not in KINDS:
        from dsv3_train.recipe.keys import nearest

        near = nearest(kind, KINDS)
        raise UserError(
            f"no schedule {kind!r}; " + (f"did you mean {near!r}?" if near else f"there are {', '.join(KINDS)}")
        )
    _check_counts(ranks, micro_batches, virtual)
    try:
        return build(kind, ranks, micro_batches, virtual, pairs)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_counts(ranks: int, micro_batches: int, virtual: int) -> None:
    from dsv3_train.errors import UserError

    for name, value, least in (("ranks", ranks, 1), ("micro-batches", micro_batches, 1), ("virtual", virtual, 2)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")


def _check_latency(latency: float) -> None:
    from dsv3_train.errors import UserError

    if not 0 <= latency < float("inf"):
        raise UserError(f"--latency must be 0 or more, not {latency}")


def _check_stages(stages, schedule: Schedule) -> None:
    from dsv3_train.errors import UserError

    beyond = [stage for stage in stages if stage >= schedule.stages]
    if beyond:
        raise UserError(
            f"--durations: stage {beyond[0]} is none of {schedule.kind}'s {schedule.stages} stages on "
            f"{schedule.ranks} ranks (0 to {schedule.stages - 1})"
        )


def _write(path: str, text: str) -> None:
    from pathlib import Path

    from dsv3_train.whole import write

    write(Path(path), text)
    print(f"wrote {path}")


def _figures(one: Compared) -> dict:
    formula = one.closed
    return {
        "name": one.schedule.kind,
        "bubble_fraction": one.run.bubble_fraction,
        "peak_in_flight": max(one.in_flight),
        "parameter_copies": one.parameter_copies,
        "time": one.run.span,
        "peak_in_flight_until_weights": max(one.in_flight_until_weights),
        "in_flight": one.in_flight,
        "closed": formula
        and {
            "bubble_fraction": formula.bubble_fraction,
            "peak_in_flight": formula.peak_in_flight,
            "domain": formula.domain,
        },
    }


def _print_table(compared: list[Compared], notes: dict[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("schedule", no_wrap=True)
    for title in ("time", "bubble", "closed", "held", "closed", "least", "params"):
        table.add_column(title, justify="right")
    for one in compared:
        name = one.schedule.kind + (f" x{one.schedule.virtual}" if one.schedule.kind == "interleaved" else "")
        formula = one.closed
        table.add_row(
            name,
            f"{one.run.span:.4g}",
            f"{one.run.bubble_fraction:.1%}",
            f"{formula.bubble_fraction:.1%}" if formula else "",
            f"{max(one.in_flight):.3g}",
            f"{formula.peak_in_flight:.3g}" if formula else "",
            f"{min(one.in_flight):.3g}",
            f"{one.parameter_copies}x",
        )
    console = Console()
    console.print(table)
    for kind, note in notes.items():
        console.print(f"no {kind}: {note}", markup=False)
    print(
        "bubble: idle part of the time, on the rank that idles most; closed: by formula, where one holds.\n"
        "held: activations on the rank that holds most, in those of one micro-batch on 1/P of the model;\n"
        "least: on the rank that holds least."
    )


def _print_json(report: dict) -> None:
    import json

    print(json.dumps(report, indent=2))
