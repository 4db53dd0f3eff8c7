"""Whether `pipeline.layout` places every layer where Megatron-core can build it."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_train.recipe.layout import stages, suggestion
from dsv3_train.recipe.schema import Recipe

_KEY = "pipeline.layout"


def placement(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, message) for each thing that is wrong with the placement of layers on stages."""
    try:
        placed = stages(recipe)
    except ValueError as error:
        yield _KEY, str(error)
        return
    wrong = [*_count(recipe, placed), *_order(recipe, placed)]
    if wrong:
        yield _KEY, f"{'; '.join(wrong)}; {suggestion(recipe)!r} would work"


def _count(recipe: Recipe, placed: list[str]) -> Iterator[str]:
    model, needed = recipe.model, recipe.stage_count
    layers = "".join(placed)
    decoder, mtp = layers.count("t"), layers.count("m")
    if len(placed) != needed:
        pipeline, schedule = recipe.parallel.pipeline, recipe.pipeline.schedule
        yield f"{len(placed)} stages, but parallel.pipeline {pipeline} with schedule {schedule} has {needed}"
    if decoder != model.num_hidden_layers:
        yield f"{decoder} decoder layers (t), but model.num_hidden_layers is {model.num_hidden_layers}"
    if mtp != model.num_nextn_predict_layers:
        yield f"{mtp} MTP modules (m), but model.num_nextn_predict_layers is {model.num_nextn_predict_layers}"


def _order(recipe: Recipe, placed: list[str]) -> Iterator[str]:
    layers = "".join(placed)
    if layers.count("E") != 1 or not layers.startswith("E"):
        yield "the embedding (E) must stand once, first"
    if layers.count("L") != 1 or not layers.endswith("L"):
        yield "the head (L) must stand once, last"
    if "m" not in layers:
        return
    if "t" in layers[layers.index("m") :]:
        yield "MTP (m) must come after all decoder layers (t)"
    if sum("m" in stage for stage in placed) > 1:
        yield "all MTP modules (m) must be on one stage"
    if "m" not in placed[-1]:
        # Megatron-core sums the gradients of the embedding on the first stage and of what the last one has for it
        # (parallel_state.default_embedding_ranks): of an MTP on another stage it would be the head's.
        yield "MTP (m) must be on the last stage, with the head"
