"""Which activations wait for the backward pass in fewer bits (report, section 3.3.3).

SwiGLU's input waits in E4M3. In routed experts its output is computed again from that (`moe_act` of training.recompute,
which this builds on); elsewhere it waits as the input of the linear layer that it is, in FP8 too. The input of the
linear layer after attention waits in E5M6, for its weight gradient and, where attention keeps the same tensor, as
Transformer Engine's does, for attention's backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from dsv3_train.model.grouped_experts import GroupedExperts
from dsv3_train.precision.caches import hold
from dsv3_train.precision.formats import E4M3, E5M6
from dsv3_train.recipe.schema import Precision


def install(chunk: torch.nn.Module, precision: Precision) -> None:
    """Let the layers of a chunk keep what the recipe says so."""
    for module in chunk.modules():
        if precision.attention_output == "e5m6" and isinstance(module, MultiLatentAttention):
            _keep_original(module.linear_proj)
            module.linear_proj.register_forward_hook(_hold_input)
        if precision.swiglu_input == "fp8" and isinstance(module, GroupedExperts):
            module.input_format = E4M3
        elif precision.swiglu_input == "fp8" and isinstance(module, (MLP, TEGroupedMLP)):
            _hold_between(module)


def _keep_original(linear: Any) -> None:
    """Transformer Engine's linear keeps its input as it is, not quantised copies of its own, for the backward pass."""
    if hasattr(linear, "save_original_input"):
        linear.save_original_input = True


def _hold_input(_linear: torch.nn.Module, arguments: tuple, output: tuple) -> None:
    hold(arguments[0], E5M6, until=output[0])


def _hold_between(mlp: Any) -> None:
    """What `linear_fc1` gives to SwiGLU, from the end of `linear_fc2` on."""
    given: list[torch.Tensor] = []
    mlp.linear_fc1.register_forward_hook(lambda _linear, _arguments, output: given.append(output[0]))
    # Megatron-core registers its recomputation after this, so that it finds what it computes from.
    mlp.linear_fc2.register_forward_hook(lambda _linear, _arguments, output: hold(given.pop(), E4M3, until=output[0]))
