"""From a recipe to the parts that train, on one rank."""

from __future__ import annotations

import contextlib

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_train.model import weight_gradients
from dsv3_train.model.build import build_chunks, in_training_precision
from dsv3_train.model.config import megatron_config
from dsv3_train.model.init import initialize
from dsv3_train.model.stage import Stage
from dsv3_train.optim.build import build_optimizer, wrap_chunks
from dsv3_train.pipeline.executor import Executor
from dsv3_train.pipeline.messages import Messages
from dsv3_train.recipe.chunks import SCHEDULED
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import pipeline_groups
from dsv3_train.training import cuda_graph
from dsv3_train.training.experts import ExpertLoad
from dsv3_train.training.step import Trainer, connect


def assemble(recipe: Recipe, device: str, drawn_on: str = "cpu") -> Trainer:
    """Model with initial weights, optimizer and counters. Needs Megatron's process groups (runtime/distributed.py).

    Args:
        drawn_on: see model/init.py.
    """
    config = megatron_config(recipe, device)
    models = build_chunks(recipe, config)
    for model in models:
        model.to(device)
        initialize(model, recipe.training.seed, recipe.model.initializer_range, drawn_on)
    load = ExpertLoad(models, recipe.model)
    graph = None if cuda_graph.why_not(recipe, device, models) else cuda_graph.MicroBatchGraph()
    with graph.on_stream() if graph else contextlib.nullcontext():
        chunks = wrap_chunks(recipe, config, [in_training_precision(model, config) for model in models])
    executor = None
    if recipe.pipeline.schedule in SCHEDULED:
        weight_gradients.install()
        executor = _executor(recipe, config, models)
    trainer = Trainer(recipe, config, models, chunks, build_optimizer(recipe, chunks), load, executor, graph)
    connect(trainer)
    return trainer


def _executor(recipe: Recipe, config: MLATransformerConfig, models: list[Stage]) -> Executor:
    pipeline = recipe.pipeline
    messages = Messages(
        parallel_state.get_pipeline_model_parallel_group(),
        pipeline_groups.downward(),
        config.pipeline_dtype,
        headers=config.variable_seq_lengths,
        checked=pipeline.check_messages,
    )
    return Executor(
        pipeline.schedule,
        [model.place for model in models],
        messages,
        defer=pipeline.defer_weight_gradients,
        overlap=recipe.overlaps_pairs,
    )
