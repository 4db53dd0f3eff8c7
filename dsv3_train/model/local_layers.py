"""Layers for machines without Transformer Engine, where Megatron-core's own cannot serve MLA.

Megatron-core's local layers train DeepSeek-V3 but for three: its attention does not take MLA's
head dimensions, its norm refuses sequence parallelism, and MLA's down-projections, column-parallel
there, get wrong gradients under tensor parallelism (the rotary key's is summed by nobody). The modules
here stand in a layer specification where those stood; nothing is patched but the list of linear classes
that MLA accepts (runtime/cpu.py).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from dsv3_train.model.grouped_experts import GroupedExperts
from dsv3_train.model.weight_gradients import linear
from dsv3_train.precision.emulated import EXACT, Exact
from dsv3_train.runtime.megatron_versions import local_experts, module_of


class Attention(MegatronModule):
    """Causal attention on torch's own kernel, with a value head dimension of its own."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float, **_unused: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self, query_sbnd: torch.Tensor, key_sbnd: torch.Tensor, value_sbnd: torch.Tensor, *_mask: Any, **_unused: Any
    ) -> torch.Tensor:
        """[s, b, n, d] queries over [t, b, n, d] keys, of which they are the last -> [s, b, n * d_v]."""
        query, key, value = (x_sbnd.permute(1, 2, 0, 3) for x_sbnd in (query_sbnd, key_sbnd, value_sbnd))
        queries, keys = query.size(2), key.size(2)
        mask = None
        if 1 < queries < keys:  # a further piece of a prompt, after keys from the cache
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=queries == keys, scale=self.softmax_scale
        )
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for Megatron's all-reduce of its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ReplicatedLinear(MegatronModule):
    """A linear layer that every tensor-parallel rank holds whole (TE: `parallel_mode="duplicated"`)."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **_unused: Any) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.arithmetic = EXACT

    def forward(self, x_sbh: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[s, b, input] -> [s, b, output], and no bias."""
        return linear(x_sbh, self.weight, self.arithmetic), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The whole weight, replicated over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


_INSTEAD = {DotProductAttention: Attention, WrappedTorchNorm: RMSNorm, local_experts(): GroupedExperts}


# TE keeps these norms inside the linear layer that follows; checkpoints bear TE's names, to serve either.
_TE_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def replace(spec: Any) -> Any:
    """A copy of a layer specification with the modules of this file where they are needed."""
    if isinstance(spec, type):
        return _INSTEAD.get(spec, spec)
    if isinstance(spec, list):
        return [replace(item) for item in spec]
    if isinstance(spec, partial):
        return partial(replace(spec.func), *spec.args, **{name: replace(part) for name, part in spec.keywords.items()})
    if isinstance(spec, MLASelfAttentionSubmodules):
        spec = dataclasses.replace(spec, linear_q_down_proj=ReplicatedLinear, linear_kv_down_proj=ReplicatedLinear)
    if isinstance(spec, TransformerLayerSubmodules):
        names = dict(_TE_NAMES)
        if module_of(spec.mlp) is not MoELayer:
            names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        spec = dataclasses.replace(spec, sharded_state_dict_keys_map=names)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changes = {field.name: replace(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
        return dataclasses.replace(spec, **changes)
    return spec


def set_arithmetic(chunk: torch.nn.Module, arithmetic: Exact) -> None:
    """Let the linear layers of a chunk compute in `arithmetic`; the output head, also where MTP uses it, stays exact.

    They are the ones that are Transformer Engine's on a GPU, all of which Megatron-core runs in an FP8 context: the
    decoder's and MTP's, with its projection. Head, embedding and router are no layers of TE's.
    """
    head = getattr(chunk, "output_layer", None)
    for module in chunk.modules():
        if isinstance(module, (ReplicatedLinear, GroupedExperts)):
            module.arithmetic = arithmetic
        elif isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and module is not head:
            module._forward_impl = partial(_parallel_linear, arithmetic)


def _parallel_linear(
    arithmetic: Exact,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_unused: Any,
) -> torch.Tensor:
    """Stands for the `_forward_impl` of Megatron-core's tensor-parallel linears, whose products are not apart."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = linear(input, weight, arithmetic)
    return output if bias is None else output + bias
