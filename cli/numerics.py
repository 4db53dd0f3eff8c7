"""`dsv3 numerics`: whether FP8 trains as well as BF16, from runs, from scratch, and number by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from typer.core import TyperCommand

from dsv3_cli.reports import tell

if TYPE_CHECKING:
    from dsv3_train.numerics.plan import Planned

app = typer.Typer(no_args_is_help=True, help="Compare the losses of precisions, and the errors of number formats.")

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_Window = Annotated[
    Optional[int],
    typer.Option(
        help="Smooth by the mean of the last N steps; none: exponential moving average of coefficient 0.9, as the "
        "report's figure 10.",
        metavar="N",
        show_default=False,
    ),
]
_Bound = Annotated[
    str, typer.Option(help="Of the smoothed relative difference over the last half (report, section 3.3).")
]


def _several(option: str) -> type[TyperCommand]:
    """A command whose `option` takes words up to the next option, or override, rather than one."""

    class Command(TyperCommand):
        def parse_args(self, ctx, args: list[str]) -> list[str]:
            return super().parse_args(ctx, list(_repeated(option, args)))

    return Command


def _repeated(option: str, words: list[str]) -> Iterator[str]:
    """`--seeds a b` as `--seeds a --seeds b`."""
    from dsv3_train.numerics.plan import is_variant

    taking = taken = False
    for word in words:
        if word.startswith("-") or (taken and not is_variant(word)):
            taking, taken = word == option, False
        elif taking:
            if taken:
                yield option
            taken = True
        yield word


@app.command(cls=_several("--seeds"))
def compare(
    baseline: Annotated[Path, typer.Argument(help="Run directory of the baseline, as a rule in BF16.")],
    runs: Annotated[
        Optional[list[Path]],
        typer.Argument(help="Runs that differ from it in precision or layout.", metavar="[RUN]..."),
    ] = None,
    seeds: Annotated[
        Optional[list[Path]],
        typer.Option(help="Runs that differ from it in their seeds alone; after the others.", metavar="RUN..."),
    ] = None,
    window: _Window = None,
    bound: _Bound = "0.25%",
    out: Annotated[
        Optional[Path], typer.Option(help="Write report.json, report.html and report.png here.", metavar="DIR")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Losses of runs against a baseline: relative difference over the last half, verdict, spread of other seeds.

    Steps are matched by number; data, model, schedules and batches have to be the same. A run of another seed is
    compared with that one of --seeds which has it too. A miss of the bound is a finding, not a fault: exit code 0.

    Example: dsv3 numerics compare runs/bf16 runs/fp8 --seeds runs/bf16-2 runs/bf16-3 --out report
    """
    from dsv3_train.errors import UserError

    if not runs and not seeds:
        raise UserError(f"{baseline}: nothing to compare with; give another run directory")
    _report(baseline, runs or [], seeds or [], window, bound, out, as_json)


@app.command(cls=_several("--variants"))
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (dsv3 recipes list) or a YAML file.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Overrides of all runs, as training.seed=7.", metavar="[a.b=c]...")
    ] = None,
    variants: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Values of precision.fp8, `+` for what else differs, as blockwise+power_of_2_scales=false; none (the "
            "baseline) is there anyhow. Default: emulated on a CPU, else blockwise.",
            metavar="FP8...",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds (training.seed) of the baseline, its own among them.")] = 3,
    paired: Annotated[
        bool, typer.Option("--paired", help="Train the variants with all of the seeds too, each beside its baseline.")
    ] = False,
    jobs: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Runs at a time, GPUs in turn: two a GPU where its memory holds them. Default: one a GPU, or one.",
            show_default=False,
        ),
    ] = None,
    window: _Window = None,
    bound: _Bound = "0.25%",
    out: Annotated[
        Optional[Path],
        typer.Option(help="Runs and report; none: runs/numerics-NAME.", metavar="DIR", show_default=False),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Train a recipe once per precision and seed, and compare. Started again, it goes on where it stopped.

    With checkpoint.load=RUN all begin where that run is, and seeds are of the order of the data too (data.seed).

    Example: dsv3 numerics run smoke --variants none emulated training.duration="40 steps"
    """
    from rich.console import Console

    from dsv3_train.data.prepare import prepare
    from dsv3_train.numerics.plan import plan
    from dsv3_train.numerics.train import gpus, train
    from dsv3_train.recipe.load import load

    _bound(bound)
    loaded = load(recipe, overrides or [])
    where = out or Path("runs") / f"numerics-{loaded.name}"
    devices = gpus() if loaded.runtime.device != "cpu" else []
    chosen = variants or ["blockwise" if devices else "emulated"]
    planned = plan(recipe, overrides or [], chosen, seeds, where, paired)
    if loaded.data.prepare and not all(one.finished for one in planned):
        prepare(loaded.data.prepare)  # once, before several runs do
    at_a_time = jobs or max(1, len(devices) // loaded.parallel.world_size)
    train(planned, at_a_time, devices, Console(stderr=True))
    _report(*_sides(planned), window, bound, where, as_json)


def _sides(planned: list[Planned]) -> tuple[Path, list[Path], list[Path]]:
    """Baseline, runs, other seeds."""
    first, *others = planned
    runs, seeds = ([one.run_dir for one in others if one.seed is seed] for seed in (False, True))
    return first.run_dir, runs, seeds


def _report(
    baseline: Path,
    runs: list[Path],
    seeds: list[Path],
    window: int | None,
    bound: str,
    out: Path | None,
    as_json: bool,
) -> None:
    from dsv3_train.numerics.compare import compare as side_by_side

    figures, curves = side_by_side(baseline, runs, seeds, window=window, bound=_bound(bound))
    written: list[Path] = []
    if out:
        from dsv3_train.numerics.report import write_comparison

        written = write_comparison(out, figures, curves)
    from dsv3_train.numerics.table import show

    tell(figures, show, written, as_json)


def _bound(text: str) -> float:
    """`0.25%` or `0.0025`."""
    from dsv3_train.errors import UserError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"--bound: {text!r} is no bound; write it as 0.25% or 0.0025")
    return value


@app.command()
def formats(
    out: Annotated[
        Optional[Path], typer.Option(help="Write formats.json, formats.html and formats.png here.", metavar="DIR")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Errors of FP8 formats and tile shapes where tokens' gradients differ in size by 0 to 6 decades.

    Example: dsv3 numerics formats
    """
    from dsv3_train.numerics.imbalance import table

    figures = table()
    written: list[Path] = []
    if out:
        from dsv3_train.numerics.imbalance_report import write_study

        written = write_study(out, figures)
    from dsv3_train.numerics.imbalance_report import show

    tell(figures, show, written, as_json)
