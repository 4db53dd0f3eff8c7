"""The routed experts of one rank as two weight tensors, for machines without TE's grouped GEMM."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_train.model.weight_gradients import grouped_linear
from dsv3_train.precision.caches import hold
from dsv3_train.precision.emulated import EXACT
from dsv3_train.precision.formats import Format


def _swiglu(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs).to(gate_up.dtype)


class GroupedExperts(MegatronModule):
    """SwiGLU experts over tokens sorted by expert; equal to Megatron's SequentialMLP, checkpoints included.

    `linear_fc1` is [experts, 2 * ffn, hidden] (gate above up) and `linear_fc2` [experts, hidden, ffn], of this
    rank's experts and, under expert tensor parallelism, this rank's share of ffn. Megatron's own GroupedMLP wants
    the CUDA package grouped_gemm and BF16, and its transposed weights part its optimizer state from SequentialMLP's.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: Any = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size // self.tp_group.size()
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.linear_fc1 = torch.nn.Parameter(
            torch.empty(num_local_experts, 2 * ffn, hidden, device=device, dtype=dtype)
        )
        self.linear_fc2 = torch.nn.Parameter(torch.empty(num_local_experts, hidden, ffn, device=device, dtype=dtype))
        # Without this mark, ranks but the first of a tensor-parallel group leave a weight out of the gradient norm.
        set_tensor_model_parallel_attributes(self.linear_fc1, True, 1, 1)
        set_tensor_model_parallel_attributes(self.linear_fc2, True, 2, 1)
        self.arithmetic = EXACT
        self.input_format: Format | None = None
        """How SwiGLU's input waits for its recomputation; None: as it is."""
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )

    def forward(
        self, hidden_th: torch.Tensor, tokens_per_expert: torch.Tensor, probs_t: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[tokens, hidden] sorted by expert, [experts] counts, [tokens] gates -> [tokens, hidden], and no bias."""
        counts = tokens_per_expert.tolist()
        gate_up = grouped_linear(hidden_th, self.linear_fc1, counts, self.arithmetic)
        probs = probs_t.unsqueeze(-1)
        if not self.recompute_activation:
            return grouped_linear(_swiglu(gate_up, probs), self.linear_fc2, counts, self.arithmetic), None
        checkpoint = CheckpointWithoutOutput()
        out = grouped_linear(checkpoint.checkpoint(_swiglu, gate_up, probs), self.linear_fc2, counts, self.arithmetic)
        if self.input_format is not None:  # before the recomputation's hook: it needs what this one restores
            hold(gate_up, self.input_format, until=out)
        checkpoint.discard_output_and_register_recompute(out)
        return out, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Under SequentialMLP's keys and global shapes, so that checkpoints serve either."""
        axis = len(sharded_offsets)
        experts = (axis, self.ep_group.rank(), self.ep_group.size())
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        replica_id = (0, 0, self.dp_group.rank())

        @torch.no_grad()
        def halves(key: str, weight: torch.Tensor, replica_id: tuple, flattened_range: None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    # What has no storage yet tells by its strides what to copy (optim/gather.py).
                    half if half.is_meta else half.contiguous(),
                    *sharded_offsets,
                    experts,
                    (axis + 1, tp_rank + place * tp_size, 2 * tp_size),
                    replica_id=replica_id,
                    prepend_axis_num=axis,
                )
                for place, half in enumerate(weight.chunk(2, dim=1))
            ]

        return {
            f"{prefix}linear_fc1": ShardedTensorFactory(
                f"{prefix}experts.linear_fc1.weight", self.linear_fc1, halves, partial(torch.cat, dim=1), replica_id
            ),
            f"{prefix}linear_fc2": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.linear_fc2.weight",
                self.linear_fc2,
                *sharded_offsets,
                experts,
                (axis + 2, tp_rank, tp_size),
                replica_id=replica_id,
                prepend_axis_num=axis,
            ),
        }
