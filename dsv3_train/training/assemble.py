"""From a recipe to the parts that train, on one rank."""

from __future__ import annotations

from dsv3_train.model.build import build_chunks, in_training_precision
from dsv3_train.model.config import megatron_config
from dsv3_train.model.init import initialize
from dsv3_train.optim.build import build_optimizer, wrap_chunks
from dsv3_train.recipe.schema import Recipe
from dsv3_train.training.experts import ExpertLoad
from dsv3_train.training.step import Trainer, connect


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
