"""Ranks that hold the same tensors share the work of writing and of reading them: Megatron-core's wrappers, twice.

These divide what replicas there are within one group, and when reading pass it on within all of it. Dense layers are
alike on all data-parallel ranks, most of which hold other experts: so each has the group that shares it, with the ranks
of DualPipe's second copy in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_train.runtime import pipeline_groups


class ReadOnce(FullyParallelLoadStrategyWrapper):
    """Each rank reads a share, and passes it on to those that need it."""

    def __init__(self) -> None:
        groups = _groups()
        super().__init__(TorchDistLoadShardedStrategy(), groups.dp_cp)
        self._by_experts = FullyParallelLoadStrategyWrapper(self.base_strategy, groups.expt_dp)

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *_options: Any) -> dict[str, Any]:
        """As `TorchDistLoadShardedStrategy.load`. Collective over all ranks."""
        objects, experts, others = _divided(sharded_state_dict)
        loaded = self.base_strategy.load(objects, checkpoint_dir)  # each is one rank's alone
        merge(loaded, self._by_experts.load(experts, checkpoint_dir))
        merge(loaded, super().load(others, checkpoint_dir))
        return loaded


class WriteShares:
    """Decides who writes what; asks the other ranks only where a state is not built as the one before it."""

    def __init__(self, strategy: TorchDistSaveShardedStrategy) -> None:
        self._strategy = strategy
        self._built: list[tuple] | None = None

    def divide(self, sharded_state_dict: dict[str, Any]) -> list[ShardedTensor]:
        """Make this rank the main replica of its share; the tensors that it writes. Collective over all ranks.

        Raises:
            CheckpointingException: not every part of every tensor is some rank's.
        """
        built = [(x.key, x.global_offset, x.replica_id) for x in nested_values(sharded_state_dict)]
        changed = torch.tensor([built != self._built], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(changed)
        if changed.item():  # `_experts` and `_others` would leave what they do not know to nobody
            validate_sharding_integrity(determine_global_metadata(sharded_state_dict)[1])
            groups = _groups()
            self._experts, self._others = (
                FullyParallelSaveStrategyWrapper(self._strategy, group, do_cache_distribution=True)
                for group in (groups.expt_dp, groups.dp_cp)
            )
        self._built = built
        _, *kinds = _divided(sharded_state_dict)
        for wrapper, tensors in zip((self._experts, self._others), kinds, strict=True):
            if wrapper.parallelization_group.size() > 1:  # or it has nothing to cache, and asks all ranks every time
                wrapper.apply_saving_parallelization(tensors)
        return [x for some in kinds for x in nested_values(some) if is_main_replica(x.replica_id)]


def _groups() -> ProcessGroupCollection:
    copies = pipeline_groups.replicas()
    return copies.groups if copies else ProcessGroupCollection.use_mpu_process_groups()


def _divided(state: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Objects, and tensors of experts and of all else."""
    objects, tensors = extract_matching_values(state, lambda x: isinstance(x, ShardedObject))
    return objects, *extract_matching_values(tensors, lambda x: ".experts." in x.key)
