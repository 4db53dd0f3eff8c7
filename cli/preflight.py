"""`dsv3 preflight`: check the machines before a run does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from dsv3_train.runtime.preflight_run import Report


def preflight(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Settings on top, as faults.join_seconds=60.", metavar="[a.b=c]...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check nodes, versions, computation and links as a recipe uses them; a run does so too, in its first seconds.

    Processes as for `dsv3 train`. Exit code 1: something is slow, or a GPU
    computes otherwise than the others; 2: a rank is missing, a node broken or different.

    Example: dsv3 preflight smoke_parallel
    """
    from dsv3_train.runtime.preflight_run import run

    run(recipe, overrides or [], _print_json if as_json else _print_table)


def _print_json(report: Report) -> None:
    import json
    from dataclasses import asdict

    ranks = [{**asdict(one), **asdict(two)} for one, two in zip(report.everyone, report.measured, strict=True)]
    for rank in ranks:
        del rank["settings"]  # the recipe's, on all of them
    print(json.dumps({"ranks": ranks, "findings": report.findings, "notes": report.notes}))


def _print_table(report: Report) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("rank", "host", "TFLOPS", "all-reduce", "all-to-all", "to next stage", box=box.SIMPLE)
    for one in report.measured:
        times = [
            f"{1e3 * seconds:.1f} ms" if seconds else "" for seconds in (one.all_reduce, one.all_to_all, one.pipeline)
        ]
        table.add_row(str(one.rank), one.host, f"{one.gemm_tflops:.3g}", *times)
    console.print(table)
    versions = report.everyone[0].versions
    console.print(
        "the same on all: " + ", ".join(f"{name} {version}" for name, version in versions.items()), soft_wrap=True
    )
    for line in report.notes:
        console.print(line, markup=False, soft_wrap=True)
    for line in report.findings:
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    if not report.findings:
        console.print("nothing is slow, and all compute the same bits", style="green")
