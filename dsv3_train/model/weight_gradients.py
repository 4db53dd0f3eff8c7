"""Gradients of weights, taken when the schedule says: at once, or some time after those of the inputs (I and W).

Zero-bubble schedules fill idle time with weight gradients. The three kinds of linear layers defer theirs alike:
`linear` and `grouped_linear` here, for local layers; Megatron-core's tensor-parallel linears (the output head, and on a
CPU all the others) through one patched backward function; Transformer Engine's through its own `backward_dw`.
What is no matrix product (norms, router, embedding) stays with the gradients of inputs, as in the published DualPipe.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import layers

from dsv3_train.precision.emulated import EXACT, Exact

_current: Hashable | None = None
_pending: dict[Hashable, list[Callable[[], object]]] = defaultdict(list)


@contextlib.contextmanager
def deferred(key: Hashable) -> Iterator[None]:
    """Within, backward passes leave their weight gradients to `compute(key)`; None: they do not."""
    global _current
    _current = key
    try:
        yield
    finally:
        _current = None


@torch.no_grad()  # a gradient with a graph of its own would keep every input alive
def compute(key: Hashable) -> int:
    """Add what was deferred under `key` to the parameters' `main_grad`; returns how many products that took."""
    waiting = _pending.pop(key, [])
    for add in waiting:
        add()
    return len(waiting)


def pending() -> list[Hashable]:
    """Keys whose weight gradients nobody has computed yet."""
    return list(_pending)


def take(weight: torch.Tensor, product: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """In a backward function: the weight's gradient now, or, within `deferred`, None and `product` for later."""
    if _current is None:
        return product()
    _pending[_current].append(lambda: weight.main_grad.add_(product()))  # type: ignore[attr-defined]
    return None


def _product(arithmetic: Exact, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[..., out] and [..., in] -> [out, in]."""
    gradient, x = gradient.reshape(-1, gradient.size(-1)), x.reshape(-1, x.size(-1))
    tokens = [x.size(0)]
    return arithmetic.tokens(gradient, tokens).t().matmul(arithmetic.tokens(x, tokens))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, arithmetic):
        operand = arithmetic.weight(weight)
        ctx.save_for_backward(x, weight, operand)
        ctx.arithmetic = arithmetic
        return arithmetic.output(arithmetic.features(x).matmul(operand.t()))

    @staticmethod
    def backward(ctx, gradient):
        x, weight, operand = ctx.saved_tensors
        arithmetic = ctx.arithmetic
        back = arithmetic.output(arithmetic.features(gradient).matmul(operand))
        return back, take(weight, lambda: _product(arithmetic, gradient, x)), None


def linear(x: torch.Tensor, weight: torch.Tensor, arithmetic: Exact = EXACT) -> torch.Tensor:
    """[..., in] times [out, in] -> [..., out]; its weight gradient can be deferred.

    Args:
        arithmetic: what happens to operands and results of its three products.
    """
    return _Linear.apply(x, weight, arithmetic)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, counts, arithmetic):
        operand = arithmetic.weight(weight)
        ctx.save_for_backward(x, weight, operand)
        ctx.counts, ctx.arithmetic = counts, arithmetic
        parts = arithmetic.features(x).split(counts)
        return arithmetic.output(torch.cat([part.matmul(w.t()) for part, w in zip(parts, operand, strict=True)]))

    @staticmethod
    def backward(ctx, gradient):
        x, weight, operand = ctx.saved_tensors
        counts, arithmetic = ctx.counts, ctx.arithmetic

        def products() -> torch.Tensor:
            # Every expert takes part, also one without tokens: its gradient is zero, not missing.
            both = (arithmetic.tokens(tensor, counts).split(counts) for tensor in (gradient, x))
            return torch.stack([part.t().matmul(part_of_x) for part, part_of_x in zip(*both, strict=True)])

        parts = arithmetic.features(gradient).split(counts)
        back = torch.cat([part.matmul(w) for part, w in zip(parts, operand, strict=True)])
        return arithmetic.output(back), take(weight, products), None, None


def grouped_linear(
    x_ti: torch.Tensor, weight_eoi: torch.Tensor, counts: list[int], arithmetic: Exact = EXACT
) -> torch.Tensor:
    """[tokens, in] sorted by expert, each expert's `counts` times its [out, in] -> [tokens, out]; else as `linear`."""
    return _GroupedLinear.apply(x_ti, weight_eoi, counts, arithmetic)


_linear_backward = layers.LinearWithGradAccumulationAndAsyncCommunication.backward


def _megatron_backward(ctx, gradient):
    """Megatron-core's own, unless the weight gradient is to be deferred: it has no way to leave that out."""
    if _current is None or ctx.gradient_accumulation_fusion or ctx.grad_output_buffer is not None:
        return _linear_backward(ctx, gradient)
    x, weight = ctx.saved_tensors
    group, sequence_parallel = ctx.tp_group, ctx.sequence_parallel
    input_gradient = gradient.matmul(weight)
    if ctx.allreduce_dgrad:
        torch.distributed.all_reduce(input_gradient, group=group)
    if sequence_parallel:
        mine = torch.empty_like(x)
        torch.distributed.reduce_scatter_tensor(mine, input_gradient.contiguous(), group=group)
        input_gradient = mine

    def product() -> torch.Tensor:
        whole = x
        if sequence_parallel:
            whole = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
            torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return _product(EXACT, gradient, whole)

    take(weight, product)
    bias_gradient = gradient.reshape(-1, gradient.size(-1)).sum(0) if ctx.use_bias else None
    return input_gradient, None, bias_gradient, *(None,) * (len(ctx.needs_input_grad) - 3)


def install() -> None:
    """Let Megatron-core's tensor-parallel linears defer their weight gradients.

    The one patch to Megatron-core outside runtime/cpu.py: `wgrad_deferral_limit` serves the output head alone, and
    `ColumnParallelLinear.backward_dw` does nothing. tests/test_weight_gradients.py says when upstream can.
    """
    layers.LinearWithGradAccumulationAndAsyncCommunication.backward = staticmethod(_megatron_backward)


def te_layers(chunk: torch.nn.Module) -> list[Any]:
    """Transformer Engine's layers of a chunk that were built to keep weight gradients for `backward_dw`."""
    stores = ((module, getattr(module, "wgrad_store", None)) for module in chunk.modules())
    return [module for module, store in stores if store is not None and store.delay_wgrad_compute()]
