"""`dsv3 train`: the main job."""

from __future__ import annotations

from typing import Annotated, Optional

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (dsv3 recipes list) or a YAML file.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Recipe overrides, as training.seed=7.", metavar="[a.b=c]...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build every stage without memory, print what would run, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Train a recipe, or go on where its run directory stopped.

    Joins the processes that torchrun, srun or mpirun started; without them, starts what the recipe asks for here.

    Example: dsv3 train smoke training.duration="20 steps" runtime.run_dir=runs/try
    """
    if dry_run:
        from dsv3_train.planner.dry_run import dry_run as work_out

        work_out(recipe, overrides or [], as_json)
        return
    if as_json:
        raise typer.BadParameter("goes with --dry-run; a run leaves its figures in metrics.jsonl", param_hint="--json")
    from dsv3_train.training.command import run

    run(recipe, overrides or [])
