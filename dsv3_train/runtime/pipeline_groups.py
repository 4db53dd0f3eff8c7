"""Process groups that our schedules need beside Megatron-core's.

In bidirectional DualPipe pipeline ranks r and P-1-r hold the same two stages. The pair is one more data-parallel
dimension: every data-parallel group is joined with that of the ranks opposite, and with that gradients are summed,
averaged and sharded (ZeRO-1) as Megatron-core does for any data-parallel group.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from megatron.core.parallel_state import RankGenerator
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_train.recipe.schema import Recipe

_ORDER = "tp-cp-ep-dp-pp"  # Megatron-core's default, by which runtime/distributed.py divides the world


@dataclass(frozen=True)
class Replicas:
    """What the two copies of a stage share."""

    pair: torch.distributed.ProcessGroup
    """This rank and the one opposite."""
    groups: ProcessGroupCollection
    """Megatron-core's groups, data-parallel ones joined with those of the ranks opposite."""


_replicas: Replicas | None = None
_downward: torch.distributed.ProcessGroup | None = None


def downward() -> torch.distributed.ProcessGroup:
    """The pipeline ranks once more: what goes down them has a communicator of its own, and waits for nothing else."""
    assert _downward is not None
    return _downward


def replicas() -> Replicas | None:
    """Of this run; None where every stage has one copy."""
    return _replicas


def create(recipe: Recipe) -> None:
    """Make the groups that `recipe.pipeline.schedule` needs. Collective; Megatron-core's own come first."""
    global _replicas, _downward
    p, me = recipe.parallel, torch.distributed.get_rank()
    dense = RankGenerator(tp=p.tensor, ep=1, dp=p.data, pp=p.pipeline, cp=p.context, order=_ORDER)
    pipelines = {tuple(ranks): torch.distributed.new_group(ranks) for ranks in dense.get_ranks("pp")}
    _downward = next(group for ranks, group in pipelines.items() if me in ranks)
    if recipe.pipeline.schedule != "dualpipe":
        return
    expert = RankGenerator(tp=p.expert_tensor, ep=p.expert, dp=p.expert_data, pp=p.pipeline, cp=1, order=_ORDER)
    groups = copy.copy(ProcessGroupCollection.use_mpu_process_groups())
    groups.dp = _joined(p.pipeline, dense.get_ranks("dp"))
    groups.dp_cp = groups.dp if p.context == 1 else _joined(p.pipeline, dense.get_ranks("dp-cp"))
    groups.expt_dp = _joined(p.pipeline, expert.get_ranks("dp"))
    _replicas = Replicas(_joined(p.pipeline, [[rank] for rank in range(p.world_size)]), groups)


def forget() -> None:
    """When the process groups go."""
    global _replicas, _downward
    _replicas = _downward = None


def _joined(stages: int, groups: list[list[int]]) -> torch.distributed.ProcessGroup:
    """This rank's group out of `groups`, each joined with its mirror image in the pipeline."""
    world, me = torch.distributed.get_world_size(), torch.distributed.get_rank()
    block = world // stages  # ranks of a stage are neighbours

    def opposite(rank: int) -> int:
        return (stages - 1 - rank // block) * block + rank % block

    unions = sorted({tuple(sorted({*group, *map(opposite, group)})) for group in groups})
    made = {ranks: torch.distributed.new_group(list(ranks)) for ranks in unions}
    return next(group for ranks, group in made.items() if me in ranks)
