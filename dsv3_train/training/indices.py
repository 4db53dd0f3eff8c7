"""The sample order of a run, built before it begins: while it is, every GPU of the run waits for one process."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.data import datasets
from dsv3_train.data.prepare import BeingPrepared, prepare
from dsv3_train.errors import UserError
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from dsv3_train.training import data_identity
from dsv3_train.training.rundir import hold, missing, undo

Datasets = tuple[torch.utils.data.Dataset, "torch.utils.data.Dataset | None"]


@dataclass(frozen=True)
class Indexed:
    """What `build` left for a run."""

    cache: str
    """RUN_DIR/cache."""
    samples: int
    """That the run can take, of training."""
    gibibytes: float
    seconds: float
    """0 if all was there."""


def ready_data(recipe: Recipe) -> None:
    """Prepare what the recipe says, unless it is there; runs that begin together (a sweep) do so once.

    Raises:
        UserError: see `prepare`, `datasets.check`, `tokenizer_home.find_checked` and `data_identity.refuse_other`.
    """
    waited = False
    while recipe.data.prepare:
        try:
            prepare(recipe.data.prepare)
            break
        except BeingPrepared as other:
            if not waited:
                print(f"waiting: {other}", file=sys.stderr, flush=True)
            waited = True
            time.sleep(1)
    datasets.check(recipe)
    tokenizer_home.find_checked(recipe.run_dir, recipe)
    data_identity.refuse_other(recipe, recipe.run_dir)


def eval_sequences(recipe: Recipe) -> int:
    """Validation sequences of a run: as many as it wants, in whole micro-batches of every rank."""
    whole = recipe.batch_multiple
    return -(-recipe.training.eval_sequences // whole) * whole


def of_run(recipe: Recipe, run_dir: Path, samples: int | None = None) -> Datasets:
    """Training and validation samples of a run; `samples` where it takes more than its schedule says. Collective."""
    enough = Schedules(recipe).enough_samples if samples is None else samples
    return datasets.build(recipe, run_dir / "cache", enough, eval_sequences(recipe))


def build(recipe: Recipe) -> Indexed:
    """Prepare data and build the sample order in the run directory, as the run's rank 0 would, in this process alone.

    Raises:
        UserError: see `datasets.check`; a run is in that directory, or it cannot be written.
    """
    run_dir = recipe.run_dir
    made = missing(run_dir)
    try:
        hold(run_dir)
    except OSError as error:
        raise UserError(f"runtime.run_dir: {run_dir} cannot be written ({error.strerror}); set another") from None
    cache = run_dir / "cache"
    try:
        ready_data(recipe)
        data_identity.keep(recipe, run_dir)
        distributed.prepare_import("cuda" if torch.cuda.is_available() else "cpu", recipe)
        before, start = _bytes(cache), time.monotonic()
        of_run(recipe, run_dir)
    except UserError:
        undo(made)
        raise
    seconds, after = time.monotonic() - start, _bytes(cache)
    return Indexed(str(cache), Schedules(recipe).enough_samples, after / 2**30, seconds if after != before else 0.0)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
