"""From a recipe to the parts that train, on one rank."""

from __future__ import annotations

from dsv3_train.errors import UserError
from dsv3_train.model.build import build_chunks, in_training_precision
from dsv3_train.model.config import megatron_config
from dsv3_train.model.init import initialize
from dsv3_train.optim.build import build_optimizer, wrap_chunks
from dsv3_train.recipe.schema import Recipe
from dsv3_train.training.experts import ExpertLoad
from dsv3_train.training.step import Trainer, connect


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


def assemble(recipe: Recipe, device: str) -> Trainer:
    """Model with initial weights, optimizer and counters. Needs Megatron's process groups (runtime/distributed.py)."""
    config = megatron_config(recipe, device)
    models = build_chunks(recipe, config)
    for model in models:
        model.to(device)
        initialize(model, recipe.training.seed, recipe.model.initializer_range)
    load = ExpertLoad(models, recipe.model)
    chunks = wrap_chunks(recipe, config, [in_training_precision(model, config) for model in models])
    trainer = Trainer(recipe, config, models, chunks, build_optimizer(recipe, chunks), load)
    connect(trainer)
    return trainer
