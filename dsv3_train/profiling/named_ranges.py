"""Names in a trace for what a training step is made of, while a profiler runs: layers, attention, dispatch, experts,
combine, p2p, grad reduce. (F, B, I, W of each stage and micro-batch come from pipeline/timeline.py.) Nothing stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_layer import TransformerLayer

_CUDA = torch.cuda.is_available()


class _Range:
    """A named range that may end in another order than it began: an event in torch.profiler's trace, and for Nsight
    Systems, where there is a GPU, an NVTX range.
    """

    def __init__(self, name: str) -> None:
        self._recorded = torch.profiler.record_function(name)
        self._recorded.__enter__()
        self._nvtx = torch.cuda.nvtx.range_start(name) if _CUDA else None

    def end(self) -> None:
        if self._nvtx is not None:
            torch.cuda.nvtx.range_end(self._nvtx)
        self._recorded.__exit__(None, None, None)


@contextmanager
def named(name: str) -> Iterator[None]:
    """What runs within has this name."""
    opened = _Range(name)
    try:
        yield
    finally:
        opened.end()


@contextmanager
def named_ranges(trainer: Any) -> Iterator[None]:
    """Name the parts of `trainer`'s models and what its schedule calls, until the end."""
    with ExitStack() as until:
        for model in trainer.models:
            for module in model.modules():
                _name_parts(module, until)
        _wrap(until, P2PCommunicator, "_communicate", "p2p")
        if trainer.executor is not None:
            _wrap(until, trainer.executor.messages, "post", "p2p post")
            _wrap(until, trainer.executor.messages, "take", "p2p wait")
        for chunk in trainer.chunks:
            _wrap(until, chunk, "start_grad_sync", "grad reduce")
        _wrap(until, trainer.config, "finalize_model_grads_func", "grad reduce")
        yield


def _name_parts(module: torch.nn.Module, until: ExitStack) -> None:
    if isinstance(module, TransformerLayer):
        _name_module(module, f"layer {module.layer_number}", until)
    elif isinstance(module, Attention):
        _name_module(module, "attention", until)
    elif isinstance(module, Router):
        _name_module(module, "route", until)
    elif isinstance(module, MoELayer):
        _wrap(until, module, "dispatch", "dispatch", differentiable=True)
        _wrap(until, module, "combine", "combine", differentiable=True)
        _name_module(module.experts, "experts", until)
        if module.shared_experts is not None:
            _name_module(module.shared_experts, "shared experts", until)
    elif type(module) is MLP:  # its subclasses are experts
        _name_module(module, "mlp", until)


def _name_module(module: torch.nn.Module, name: str, until: ExitStack) -> None:
    """Its forward, and its backward from the gradient of what it gave to that of what it was given."""
    open_ranges: list[_Range] = []

    def begin(_: Any, inputs: tuple) -> None:
        open_ranges.append(_Range(f"{name} forward"))

    def end(_: Any, inputs: tuple, named_inputs: dict, outputs: Any) -> None:
        open_ranges.pop().end()
        _name_backward(name, (*inputs, *named_inputs.values()), outputs)

    for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end, with_kwargs=True)):
        until.callback(handle.remove)


def _wrap(until: ExitStack, owner: Any, attribute: str, name: str, differentiable: bool = False) -> None:
    """Replace a function of an object or class by one that names its time."""
    plain: Callable = getattr(owner, attribute)
    own = vars(owner).get(attribute)

    @functools.wraps(plain)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with named(f"{name} forward" if differentiable else name):
            result = plain(*arguments, **options)
        if differentiable:
            _name_backward(name, arguments, result)
        return result

    setattr(owner, attribute, wrapped)
    # What a class gives its objects must not become an attribute of each.
    until.callback(setattr, owner, attribute, own) if own is not None else until.callback(delattr, owner, attribute)


def _name_backward(name: str, inputs: Any, outputs: Any) -> None:
    """Hooks on the gradients of the first output and the first input: they leave autograd's graph as it is."""
    first, last = _first_with_gradient(outputs), _first_with_gradient(inputs)
    if first is None or last is None or first is last:
        return
    opened: list[_Range] = []

    def begin(_: torch.Tensor) -> None:
        opened.append(_Range(f"{name} backward"))

    def end(_: torch.Tensor) -> None:
        while opened:
            opened.pop().end()

    first.register_hook(begin)
    last.register_hook(end)


def _first_with_gradient(tensors: Any) -> torch.Tensor | None:
    for tensor in tensors if isinstance(tensors, (tuple, list)) else [tensors]:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            return tensor
    return None
