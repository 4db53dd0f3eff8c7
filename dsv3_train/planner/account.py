"""Every parameter of a recipe, stage by stage, from the model itself built on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from dsv3_train.model.build import build_chunks
from dsv3_train.model.config import megatron_config
from dsv3_train.model.init import sharding_metadata
from dsv3_train.recipe.layout import stages
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import cpu, distributed


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline."""

    pipeline_rank: int
    """That holds it; dualpipe has a second copy on the rank opposite."""
    virtual_stage: int
    layers: str
    """As in `pipeline.layout`."""
    parameters: int
    """Distinct values of the whole model that lie here, routing biases included."""
    parameters_per_rank: int
    """Values of this stage that one process holds, copies included."""


@dataclass(frozen=True)
class Account:
    """Parameters of the whole model; routing biases count, as in the published index."""

    main: int
    mtp: int
    """Of the MTP modules, without their copies of embedding and output head."""
    active: int
    """Of the main model, per token, embedding included."""
    stages: list[Stage]


def account(recipe: Recipe) -> Account:
    """Build each stage as its first rank would, and count.

    Process groups are torch's `fake` ones, so nothing communicates and any number of processes fits one machine.
    """
    placed = stages(recipe)
    recipe = _without_copies(recipe)
    pipeline = recipe.parallel.pipeline
    ranks_per_stage = recipe.parallel.world_size // pipeline
    counted: dict[str, int] = {}
    rows = []
    for pipeline_rank in range(pipeline):
        distributed.pretend(recipe, pipeline_rank * ranks_per_stage)
        try:
            with cpu.on_meta():
                chunks = build_chunks(recipe, megatron_config(recipe, "meta"))
                sizes = [_global_sizes(chunk) for chunk in chunks]
        finally:
            distributed.stop()
        for chunk, found in zip(chunks, sizes, strict=True):
            if chunk.place.direction:
                continue
            held = [*chunk.parameters(), *(b for n, b in chunk.named_buffers() if n.endswith("expert_bias"))]
            rows.append(
                Stage(
                    pipeline_rank,
                    chunk.place.virtual or 0,
                    placed[chunk.place.stage],
                    # The embedding's copy on MTP's stage has the embedding's name.
                    sum(size for name, size in found.items() if name not in counted),
                    sum(tensor.numel() for tensor in held),
                )
            )
            counted |= found
    main = sum(size for name, size in counted.items() if not name.startswith("mtp."))
    model = recipe.model
    routed = sum(s for name, s in counted.items() if ".mlp.experts." in name and not name.startswith("mtp."))
    idle = routed * (model.n_routed_experts - model.num_experts_per_tok) // model.n_routed_experts
    return Account(main, sum(counted.values()) - main, main - idle, rows)


def _without_copies(recipe: Recipe) -> Recipe:
    """With as few data-parallel ranks as hold every part once: what a stage holds is the same, and groups of 10^5
    ranks, which take minutes to list, are not made."""
    p = recipe.parallel
    per_stage = math.lcm(p.tensor * p.context, p.expert * p.expert_tensor)
    fewer = p.model_copy(update={"world_size": p.pipeline * per_stage})
    return recipe.model_copy(update={"parallel": fewer})


def _global_sizes(chunk: GPTModel) -> dict[str, int]:
    """Values of each global tensor that this stage has a part of."""
    sizes = {}
    for entry in nested_values(chunk.sharded_state_dict(metadata=sharding_metadata())):
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for piece in pieces:
            if isinstance(piece, ShardedTensor):
                sizes[piece.key] = math.prod(piece.global_shape)
    return sizes
