"""`dsv3 doctor`: what this machine has, and what a recipe lacks here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from dsv3_train.runtime.environment import Probe
    from dsv3_train.runtime.lacks import Lack


def doctor(
    recipe: Annotated[Optional[str], typer.Argument(help="A recipe's name or file: what it lacks here.")] = None,
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Settings on top, as precision.fp8=none.", metavar="[a.b=c]...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """What this machine has; with a recipe, what that lacks here (exit code 1 if it cannot run).

    Example: dsv3 doctor smoke
    """
    import contextlib
    import sys

    with contextlib.redirect_stdout(sys.stderr):  # some packages print when they are imported
        from dsv3_train.runtime.environment import probe

        lacking = None
        found = probe()
        if recipe is not None:
            lacking = _lacks(recipe, overrides or [], found)
    can_run = None if lacking is None else all(severity != "error" for severity, _ in lacking)
    if as_json:
        _print_json(found, recipe, lacking, can_run)
    else:
        _print_tables(found, recipe, lacking, can_run)
    if can_run is False:
        raise typer.Exit(1)


def _lacks(ref: str, overrides: list[str], found: Probe) -> list[Lack]:
    from dsv3_train.errors import UserError
    from dsv3_train.planner.states import state_bytes
    from dsv3_train.recipe.load import load
    from dsv3_train.recipe.ready import refuse_unready
    from dsv3_train.runtime.lacks import lacks

    loaded = load(ref, overrides)
    unready: list[Lack] = []
    try:
        refuse_unready(loaded)
    except UserError as error:
        unready = [("error", line) for line in str(error).splitlines()]
    return [*unready, *lacks(loaded, found, state_bytes(loaded))]


def _print_json(found: Probe, recipe: str | None, lacking: list[Lack] | None, can_run: bool | None) -> None:
    import json
    from dataclasses import asdict

    report: dict = {"machine": asdict(found)}
    if lacking is not None:
        lines = [{"severity": severity, "text": text} for severity, text in lacking]
        report |= {"recipe": recipe, "can_run": can_run, "lacks": lines}
    print(json.dumps(report, indent=2))


def _print_tables(found: Probe, recipe: str | None, lacking: list[Lack] | None, can_run: bool | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(found):
        table.add_row(Text(name), Text(text))  # as Text: brackets are no markup
    console.print(table)
    if lacking is None:
        return
    for severity, text in lacking:
        style = "red" if severity == "error" else "yellow"
        console.print(Text.assemble((f"{severity}: ", style), text), soft_wrap=True)
    console.print(Text(f"{recipe} {'can' if can_run else 'cannot'} run here.", "green" if can_run else "red"))


def _rows(found: Probe) -> list[tuple[str, str]]:
    rows = [(name, version or "no") for name, version in found.versions.items() if name != "transformer-engine"]
    rows += [(name, part.note or "yes") for name, part in found.parts.items()]
    rows += [
        (f"GPU {i}", f"{g.name}, {g.free_gib:.1f} of {g.memory_gib:.1f} GiB free, compute capability {g.capability}")
        for i, g in enumerate(found.gpus)
    ]
    if not found.gpus:
        rows.append(("GPU", "none that torch can use"))
    rows.append(("memory", f"{found.free_memory_gib:.1f} of {found.memory_gib:.1f} GiB free"))
    rows.append(("cores", str(found.cores)))
    rows.append(("launcher", ", ".join(f"{k}={v}" for k, v in found.launcher.items()) or "none: started by hand"))
    return rows
