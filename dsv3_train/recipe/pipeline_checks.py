"""Whether a recipe's pipeline schedule fits the rest of it."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_train.recipe.chunks import SCHEDULED
from dsv3_train.recipe.schema import Recipe

Faults = Iterator[tuple[str, str]]
"""Dotted key and what is wrong with its value."""


def pipeline(recipe: Recipe) -> Faults:
    """(key, message) for each setting that the schedule cannot be with."""
    yield from _order(recipe)
    yield from _pairs(recipe)
    yield from _reductions(recipe)


def _order(recipe: Recipe) -> Faults:
    """Stages and ranks that the schedule wants."""
    pipeline, stages = recipe.pipeline, recipe.parallel.pipeline
    if pipeline.virtual_stages > 1 and pipeline.schedule != "interleaved":
        yield (
            "pipeline.virtual_stages",
            f"{pipeline.virtual_stages} with schedule {pipeline.schedule}; set pipeline.schedule=interleaved, or "
            "pipeline.virtual_stages=1",
        )
    if pipeline.schedule == "interleaved" and pipeline.virtual_stages == 1:
        yield "pipeline.schedule", "interleaved needs several stages per rank; set pipeline.virtual_stages=2, or 1f1b"
    if pipeline.schedule != "1f1b" and stages == 1:
        yield (
            "parallel.pipeline",
            f"schedule {pipeline.schedule} needs several ranks; set parallel.pipeline=2, or pipeline.schedule=1f1b",
        )
    elif pipeline.schedule == "dualpipe" and stages % 2:
        # A rank holds stage i and, for the other direction, stage P-1-i (report, section 3.2.1).
        yield (
            "parallel.pipeline",
            f"dualpipe pairs stages, and {stages} is odd; set parallel.pipeline to {stages - 1} or {stages + 1}, or "
            "pipeline.schedule=1f1b",
        )


def _pairs(recipe: Recipe) -> Faults:
    """What Megatron-core's schedule plan, which runs overlapped pairs, cannot do."""
    parallel = recipe.parallel
    if not recipe.overlaps_pairs:
        return
    key = "pipeline.overlap_pairs"
    if parallel.expert == 1:
        yield key, "without expert parallelism there is nothing to hide; set it to false, or parallel.expert=2 or more"
    if recipe.precision.params != "bf16":
        yield key, "Megatron-core overlaps BF16 models only; set it to false, or precision.params=bf16"
    if parallel.dispatcher == "allgather":
        yield key, "needs parallel.dispatcher alltoall or deepep; set that, or this to false"
    if "full" in recipe.training.recompute:
        yield key, "cannot recompute whole layers; take full out of training.recompute, or set this to false"
    if "moe" in recipe.training.recompute:
        yield key, "does not recompute MoE layers; take moe out of training.recompute, or set this to false"
    if recipe.model.n_routed_experts == parallel.expert:
        # Its schedule plan frees what an only expert of a rank has as its input.
        yield key, "needs two experts a rank; set it to false, or a smaller parallel.expert"
    if recipe.model.num_nextn_predict_layers > 1:
        yield key, "Megatron-core overlaps one MTP module at most; set it to false, or fewer modules"


def _reductions(recipe: Recipe) -> Faults:
    """Where gradients cannot be reduced, or parameters gathered, under a schedule of ours."""
    pipeline, parallel = recipe.pipeline, recipe.parallel
    if pipeline.schedule not in SCHEDULED:
        return
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if not getattr(parallel, name):
            continue
        if pipeline.schedule == "dualpipe":
            yield (
                f"parallel.{name}",
                "the two ranks that hold a stage reach it at different times in dualpipe, and their collectives would "
                "cross; set it to false, or pipeline.schedule=dualpipev",
            )
        elif name == "overlap_grad_reduce" and pipeline.defer_weight_gradients:
            yield (
                f"parallel.{name}",
                f"the weight gradients that {pipeline.schedule} defers come after Megatron-core's hooks; set it to "
                "false, or pipeline.defer_weight_gradients=false",
            )
