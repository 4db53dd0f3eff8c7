"""Our own kernels in the places of Megatron-core's, on a GPU: SwiGLU, the router's product and its choice of experts.

Megatron-core has no way to be given others: its modules call functions of its own by name. The names are set here.
tests/gpu/test_operators.py holds each against plain PyTorch; tools/bench_operators.py times them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import experts, router, shared_experts

from dsv3_train.kernels import routing
from dsv3_train.kernels.router import router_product
from dsv3_train.kernels.swiglu import swiglu

_megatrons_swiglu, _megatrons_weighted = mlp.bias_swiglu_impl, experts.weighted_bias_swiglu_impl
_megatrons_gating = router.router_gating_linear
_megatrons_choice = router.topk_routing_with_score_function
_megatrons_balance = router.compute_routing_scores_for_aux_loss


def install() -> None:
    """Set the names; what our kernels do not take goes to Megatron-core's own functions."""
    _set(_swiglu, _weighted_swiglu, _gating, _choice, _balance)


def uninstall() -> None:
    """Give the names back, for a comparison."""
    _set(_megatrons_swiglu, _megatrons_weighted, _megatrons_gating, _megatrons_choice, _megatrons_balance)


def _set(plain: Any, weighted: Any, gating: Any, choice: Any, balance: Any) -> None:
    mlp.bias_swiglu_impl = shared_experts.bias_swiglu_impl = plain
    experts.weighted_bias_swiglu_impl = mlp.weighted_bias_swiglu_impl = weighted
    router.router_gating_linear = gating
    router.topk_routing_with_score_function = choice
    router.compute_routing_scores_for_aux_loss = balance


def _swiglu(x: torch.Tensor, bias: torch.Tensor | None, fp8_input_store: bool = False, offload: bool = False):
    if bias is not None or fp8_input_store or offload or not x.is_cuda:
        return _megatrons_swiglu(x, bias, fp8_input_store, offload)
    return swiglu(x)


def _weighted_swiglu(x: torch.Tensor, bias: torch.Tensor | None, probs: torch.Tensor, fp8_input_store: bool = False):
    if bias is not None or fp8_input_store or not x.is_cuda:
        return _megatrons_weighted(x, bias, probs, fp8_input_store)
    return swiglu(x, probs)


def _gating(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    ours = x.is_cuda and bias is None and dtype == torch.float32
    if ours and x.dtype == weight.dtype == torch.bfloat16:
        return router_product(x, weight)
    return _megatrons_gating(x, weight, bias, dtype)


def _choice(
    logits: torch.Tensor,
    topk: int,
    *,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: torch.Tensor | None = None,
    router_replay: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Newer versions can ask for another output, or bring the choice; nothing that trains DeepSeek-V3 does.
    other = router_replay is not None or others.get("dense_output") or others.get("precomputed_indices") is not None
    ours = logits.is_cuda and logits.dtype == torch.float32 and score_function == "sigmoid" and not other
    if not ours:
        return _megatrons_choice(
            logits,
            topk,
            num_groups=num_groups,
            group_topk=group_topk,
            scaling_factor=scaling_factor,
            score_function=score_function,
            expert_bias=expert_bias,
            router_replay=router_replay,
            **others,
        )
    groups, kept = (num_groups, group_topk) if num_groups and group_topk else (1, 1)
    return routing.gates(logits, expert_bias, topk, groups, kept, scaling_factor or 1.0)


def _balance(
    logits: torch.Tensor, topk: int, score_function: str, fused: bool = False, padding_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    ours = logits.is_cuda and logits.dtype == torch.float32 and score_function == "sigmoid" and padding_mask is None
    if not ours:
        return _megatrons_balance(logits, topk, score_function, fused=fused, padding_mask=padding_mask)
    scores_te, chosen_te = routing.balance_scores(logits, topk)
    return chosen_te, scores_te
