"""Reading a checkpoint once for all ranks that hold the same, where these are on several nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_train.runtime import pipeline_groups


class ReadOnce(FullyParallelLoadStrategyWrapper):
    """Data-parallel ranks each read a share, and pass it on to the others that need it.

    Megatron-core's wrapper passes everything on within one group. Most of its ranks hold other experts, so that these
    are read for the groups that share them.
    """

    def __init__(self, path: Path) -> None:
        copies = pipeline_groups.replicas()
        groups = copies.groups if copies else ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(get_default_load_sharded_strategy(str(path)), groups.dp_cp)
        self._by_experts = FullyParallelLoadStrategyWrapper(self.base_strategy, groups.expt_dp)

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        """As `LoadShardedStrategy.load`. Collective over all ranks."""
        objects, tensors = extract_matching_values(sharded_state_dict, lambda x: isinstance(x, ShardedObject))
        experts, others = extract_matching_values(tensors, lambda x: ".experts." in x.key)
        loaded = self.base_strategy.load(objects, checkpoint_dir)  # each is one rank's alone
        merge(loaded, self._by_experts.load(experts, checkpoint_dir))
        merge(loaded, super().load(others, checkpoint_dir))
        return loaded
