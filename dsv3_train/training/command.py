"""What `dsv3 train` does before and around the ranks' work."""

from __future__ import annotations

from pathlib import Path

from dsv3_train.data import datasets
from dsv3_train.data.prepare import prepare
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import dump, load
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import joined_world, launch
from dsv3_train.training.startup import Startup


def run(ref: str, overrides: list[str]) -> None:
    """Train `ref` in its run directory, from the newest checkpoint there.

    Raises:
        UserError: recipe, data, checkpoint or machine are at fault.
    """
    startup = Startup()
    recipe = load(ref, overrides)
    refuse_unready(recipe)
    device = distributed.device_of(recipe)
    startup.mark("interpreter, torch and recipe")
    joined = joined_world() is not None
    if not joined:  # before any process starts; under a launcher, the ranks see to it
        _ready_data(recipe)
        startup.mark("data")
    distributed.prepare_import(device)
    from dsv3_train.training import run as _run  # noqa: F401  imported once, before ranks are forked

    startup.mark("imports")
    launch(lambda: _on_rank(recipe, device, startup, joined), recipe.parallel.world_size, device)


def refuse_unready(recipe: Recipe) -> None:
    """Refuse what a recipe may name but a run cannot do yet.

    Raises:
        UserError: naming the keys and what to set instead.
    """
    faults = []
    if recipe.pipeline.schedule not in ("1f1b", "interleaved"):
        faults.append(
            f"pipeline.schedule: {recipe.pipeline.schedule} cannot run yet; "
            "set pipeline.schedule=1f1b to train, or add --dry-run"
        )
    if recipe.parallel.context > 1:
        faults.append("parallel.context: context parallelism cannot run yet; set parallel.context=1")
    if faults:
        raise UserError("\n".join(faults))


def _ready_data(recipe: Recipe) -> None:
    if recipe.data.prepare:
        prepare(recipe.data.prepare)
    datasets.check(recipe)


def _on_rank(recipe: Recipe, device: str, startup: Startup, joined: bool) -> None:
    import torch

    from dsv3_train.checkpoint.state import topology
    from dsv3_train.training.run import Run
    from dsv3_train.training.rundir import open_run_dir

    distributed.start(recipe, device)
    startup.mark("process groups")
    run_dir = Path(recipe.runtime.run_dir.format(name=recipe.name))
    notes = []
    if torch.distributed.get_rank() == 0:
        if joined:
            _ready_data(recipe)
        notes = open_run_dir(run_dir, recipe, dump(recipe), topology(recipe))
    torch.distributed.barrier()
    Run(recipe, run_dir, device, startup, notes).train()
    distributed.stop()
