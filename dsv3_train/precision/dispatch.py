"""Dispatch in FP8: tokens on their way to experts, and in the backward pass the gradients of what experts gave back.

Both are quantised in tiles of 1 x 128 with power-of-2 scales before the all-to-all, and their scales travel in the same
message; what experts send back, outputs and gradients of inputs, stays in BF16 (report, section 3.3.3). A message has
0.504 of BF16's bytes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from dsv3_train.precision.tiles import of_message, to_message

Splits = list[int]


class Fp8Dispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-core's all-to-all dispatcher, with other messages."""

    tokens_per_expert: torch.Tensor

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [t, h], sorted by expert, and their gates [t], to the ranks of their experts."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        to, of = self.output_splits, self.input_splits
        tokens = _Quantised.apply(permutated_local_input_tokens, self.ep_group, to, of, True)
        return tokens, all_to_all(self.ep_group, permuted_probs, to, of)

    def token_combine(
        self, hidden_states: torch.Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> torch.Tensor:
        """What experts made of tokens, [t, h], back to the ranks whose tokens they are."""
        return _Quantised.apply(hidden_states, self.ep_group, self.input_splits, self.output_splits, False)


def install(chunk: torch.nn.Module) -> None:
    """Let the MoE layers of a chunk dispatch so. (Megatron-core chooses among its own dispatchers by name.)"""
    for layer in chunk.modules():
        if isinstance(layer, BaseMoELayer):
            assert type(layer.token_dispatcher) is MoEAlltoAllTokenDispatcher
            layer.token_dispatcher.__class__ = Fp8Dispatcher


class _Quantised(torch.autograd.Function):
    """An all-to-all whose messages are quantised one way: forward (dispatch) or backward (combine)."""

    @staticmethod
    def forward(ctx, x_th, group, to, of, forward):
        ctx.group, ctx.to, ctx.of, ctx.forward_too = group, to, of, forward
        return _send(x_th, group, to, of, quantised=forward)

    @staticmethod
    def backward(ctx, gradient_th):
        return _send(gradient_th, ctx.group, ctx.of, ctx.to, quantised=not ctx.forward_too), *(None,) * 4


def _send(x_th: torch.Tensor, group: dist.ProcessGroup, to: Splits, of: Splits, quantised: bool) -> torch.Tensor:
    """Rows of [t, h] to the ranks of a group; `to` and `of` are the rows that come from, and go to, each."""
    if not quantised:
        return _exchange(x_th.contiguous(), group, to, of)
    # In a group of one as well, so that the numbers of a run do not depend on its expert-parallel size.
    message = _exchange(to_message(x_th.contiguous()), group, to, of)
    return of_message(message, x_th.size(1)).values(x_th.dtype)


def _exchange(x: torch.Tensor, group: dist.ProcessGroup, to: Splits, of: Splits) -> torch.Tensor:
    if group.size() == 1:
        return x
    out = x.new_empty(sum(to), *x.shape[1:])
    dist.all_to_all_single(out, x, output_split_sizes=to, input_split_sizes=of, group=group)
    return out
