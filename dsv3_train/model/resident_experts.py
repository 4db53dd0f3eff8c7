"""Experts that are all on this rank: no messages, no second sort, and counts that stay on the GPU.

Megatron-core's all-to-all dispatcher brings the tokens per expert to the host in every layer, sorts chunks that are in
order already, and Transformer Engine launches kernels expert by expert. With one rank for all experts the number of
rows is fixed (tokens x experts per token), so nothing has to wait: a step has no shape that depends on routing, and can
be a CUDA graph (training/cuda_graph.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_train.kernels import grouped


class ResidentDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-core's all-to-all dispatcher for a group of one rank: its first permutation and the last."""

    tokens_per_expert: torch.Tensor | None

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Bool [tokens, experts] -> tokens per expert, int64 on the GPU."""
        self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk
        return routing_map.sum(dim=0)

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        return tokens_per_expert

    def token_dispatch(self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor) -> tuple:
        """Nothing has to go anywhere."""
        return permutated_local_input_tokens, permuted_probs

    def dispatch_postprocess(self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor) -> tuple:
        """Rows [t, h] and gates [t], sorted by expert already, and what the experts take for their counts."""
        counts_e, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, counts_e, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing to sort back."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor, *_options: Any, **_more: Any) -> torch.Tensor:
        """Nothing has to come back."""
        return hidden_states


class PlannedDispatcher(ResidentDispatcher):
    """The same for experts whose linear layers are `_grouped_linear`."""

    def dispatch_postprocess(self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor) -> tuple:
        """As above, with a plan for the kernels in place of counts."""
        rows_th, counts_e, probs_t = super().dispatch_postprocess(global_input_tokens, global_probs)
        return rows_th, _Planned.of(counts_e, rows_th.size(0)), probs_t


class _Planned(grouped.Plan):
    def tolist(self) -> _Planned:
        """Megatron-core's experts ask counts for a list on the host, which they only hand to their linear layers."""
        return self


def install(chunk: torch.nn.Module, config: TransformerConfig) -> None:
    """Let the MoE layers of a chunk work so, where their experts are all on this rank.

    Products of BF16 weights in whole blocks are ours. FP8's, and those whose weight gradients wait for the schedule,
    are Transformer Engine's, which takes counts from the host.
    """
    for layer in chunk.modules():
        if not isinstance(layer, BaseMoELayer) or type(layer.token_dispatcher) is not MoEAlltoAllTokenDispatcher:
            continue
        if layer.token_dispatcher.ep_size > 1 or layer.token_dispatcher.tp_size > 1:
            continue
        linears = layer.experts.linear_fc1, layer.experts.linear_fc2
        ours = not config.fp8 and not config.delay_wgrad_compute and all(map(_fits, linears))
        layer.token_dispatcher.__class__ = PlannedDispatcher if ours else ResidentDispatcher
        for linear in linears if ours else ():
            linear.forward = partial(_grouped_linear, linear, _Addresses(), _Addresses())


def counts_stay_on_gpu(chunk: torch.nn.Module) -> bool:
    """Whether no MoE layer of a chunk brings its counts to the host."""
    layers = (layer for layer in chunk.modules() if isinstance(layer, BaseMoELayer))
    return all(isinstance(layer.token_dispatcher, PlannedDispatcher) for layer in layers)


def _weights(linear: Any) -> list[torch.nn.Parameter]:
    return [getattr(linear, f"weight{expert}") for expert in range(linear.num_gemms)]


def _fits(linear: Any) -> bool:
    weight = linear.weight0
    return weight.dtype == torch.bfloat16 and grouped.fits(*weight.shape) and not linear.use_bias


class _Addresses:
    """The table of addresses for kernels, made again when a tensor has moved."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._table: torch.Tensor | None = None

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        now = [tensor.data_ptr() for tensor in tensors]
        if self._table is None or now != self._known:
            self._known, self._table = now, grouped.addresses(tensors)
        return self._table


def _grouped_linear(
    linear: Any, of_weights: _Addresses, of_gradients: _Addresses, x_ti: torch.Tensor, plan: grouped.Plan
) -> tuple[torch.Tensor, None]:
    """In place of the forward function of one of Transformer Engine's grouped linear layers: [t, in] -> [t, out]."""
    return _GroupedLinear.apply(x_ti, plan, of_weights, of_gradients, *_weights(linear)), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ti, plan, of_weights, of_gradients, *weights):
        ctx.save_for_backward(x_ti, *weights)
        ctx.plan, ctx.of_weights, ctx.of_gradients = plan, of_weights, of_gradients
        return grouped.product(x_ti.contiguous(), plan, of_weights.of(weights), weights[0].size(0), transposed=False)

    @staticmethod
    def backward(ctx, gradient_to):
        x_ti, *weights = ctx.saved_tensors
        gradient_to = gradient_to.contiguous()
        back = grouped.product(gradient_to, ctx.plan, ctx.of_weights.of(weights), x_ti.size(1), transposed=True)
        kept = all(getattr(weight, "main_grad", None) is not None for weight in weights)
        sums = [weight.main_grad if kept else torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        table = ctx.of_gradients.of(sums) if kept else grouped.addresses(sums)
        grouped.add_weight_gradients(gradient_to, x_ti.contiguous(), ctx.plan, table)
        if not kept:
            return (
                back,
                None,
                None,
                None,
                *(total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)),
            )
        for weight in weights:
            weight.grad_added_to_main_grad = True
        # Megatron-core's hooks wait for a gradient; they leave one alone that is in `main_grad` already.
        return back, None, None, None, *(_nothing_like(weight) for weight in weights)


_nothing: dict[tuple, torch.Tensor] = {}


def _nothing_like(weight: torch.Tensor) -> torch.Tensor:
    """A gradient of a weight's shape that nobody reads, always the same memory."""
    key = (weight.shape, weight.dtype, weight.device)
    if key not in _nothing:
        _nothing[key] = torch.empty_like(weight)
    return _nothing[key].detach()
