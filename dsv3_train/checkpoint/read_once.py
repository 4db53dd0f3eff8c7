"""Reading a checkpoint once for all ranks that hold the same, where these are on several nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper


class ReadOnce(FullyParallelLoadStrategyWrapper):
    """Data-parallel ranks each read a share, and pass it on to the others that need it.

    Megatron-core's wrapper passes everything on within one group. Most of its ranks hold other experts, so that these
    are read for the groups that share them.
    """

    def __init__(self, path: Path) -> None:
        base: LoadShardedStrategy = get_default_load_sharded_strategy(str(path))
        super().__init__(base, parallel_state.get_data_parallel_group(with_context_parallel=True))

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        """As `LoadShardedStrategy.load`. Collective over all ranks."""
        objects, tensors = extract_matching_values(sharded_state_dict, lambda x: isinstance(x, ShardedObject))
        experts, others = extract_matching_values(tensors, lambda x: ".experts." in x.key)
        loaded = self.base_strategy.load(objects, checkpoint_dir)  # each is one rank's alone
        by_experts = FullyParallelLoadStrategyWrapper(
            self.base_strategy, parallel_state.get_expert_data_parallel_group()
        )
        merge(loaded, by_experts.load(experts, checkpoint_dir))
        merge(loaded, super().load(others, checkpoint_dir))
        return loaded
