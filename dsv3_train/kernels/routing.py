"""Choice of experts and its gates, one kernel forward and one backward.

    s = sigmoid(x)                                  affinities (the paper, equation 15)
    chosen: the k largest of s + bias, in the groups whose two largest sum to most (section 2.1.2)
    p_i = scale * s_i / sum of the chosen s         gates (equations 13 and 14), 0 where not chosen

Torch takes some forty kernels for that and its gradient. The balance loss (equations 17 to 20) has scores of its own:
s over the sum of all, and the k largest s without bias or groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_EPSILON = tl.constexpr(1e-20)
"""Megatron-core's, in both sums."""


def reference_gates(
    logits_te: torch.Tensor, bias_e: torch.Tensor | None, k: int, groups: int, kept_groups: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gates` computes, in plain PyTorch."""
    scores_te = logits_te.sigmoid()
    biased_te = scores_te if bias_e is None else scores_te + bias_e
    grouped_tge = biased_te.unflatten(1, (groups, -1))
    if kept_groups < groups:
        kept_tg = grouped_tge.topk(2, dim=-1).values.sum(dim=-1).topk(kept_groups, dim=-1).indices
        outside_tg = torch.ones(grouped_tge.shape[:2], dtype=torch.bool, device=logits_te.device)
        grouped_tge = grouped_tge.masked_fill(outside_tg.scatter(1, kept_tg, False).unsqueeze(-1), float("-inf"))
    chosen_te = torch.zeros_like(logits_te, dtype=torch.bool)
    chosen_te.scatter_(1, grouped_tge.flatten(1).topk(k, dim=-1).indices, True)
    kept_te = scores_te * chosen_te
    if k > 1:
        kept_te = kept_te / (kept_te.sum(dim=-1, keepdim=True) + 1e-20)
    return scale * kept_te, chosen_te


def reference_balance_scores(logits_te: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `balance_scores` computes, in plain PyTorch."""
    scores_te = logits_te.sigmoid()
    chosen_te = torch.zeros_like(logits_te, dtype=torch.bool).scatter(1, scores_te.topk(k, dim=-1).indices, True)
    return scores_te / (scores_te.sum(dim=-1, keepdim=True) + 1e-20), chosen_te


def gates(
    logits_te: torch.Tensor, bias_e: torch.Tensor | None, k: int, groups: int, kept_groups: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP32 logits [t, e] -> FP32 gates [t, e] and bool choices [t, e], k in every row whatever the logits are.

    Args:
        bias_e: FP32, added for the choice alone; None: nothing.
        groups: of e / groups experts each, at least 2.
        kept_groups: groups that a token may go to; as many as there are: any.
        scale: of the gates' sum.
    """
    return _Gates.apply(logits_te, bias_e, k, groups, kept_groups, scale)


def balance_scores(logits_te: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP32 logits [t, e] -> FP32 scores [t, e] that sum to 1, and bool: the k largest."""
    return _BalanceScores.apply(logits_te, k)


def _blocks(logits_te: torch.Tensor) -> tuple[int, int]:
    """Rows of a program, and columns: a power of 2."""
    columns = triton.next_power_of_2(logits_te.size(1))
    return max(1, 1024 // columns), columns


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_te, bias_e, k, groups, kept_groups, scale):
        logits_te = logits_te.contiguous()
        tokens, experts = logits_te.shape
        gates_te, chosen_te = torch.empty_like(logits_te), torch.empty_like(logits_te, dtype=torch.uint8)
        rows, columns = _blocks(logits_te)
        _routing_gates_forward[(triton.cdiv(tokens, rows),)](
            logits_te, logits_te if bias_e is None else bias_e, gates_te, chosen_te, tokens, experts, scale,
            BIASED=bias_e is not None, K=k, GROUPS=groups, KEPT=kept_groups,
            GROUP_COLUMNS=triton.next_power_of_2(groups), ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
        chosen_te = chosen_te.view(torch.bool)
        ctx.save_for_backward(logits_te, chosen_te)
        ctx.normalised, ctx.scale = k > 1, scale
        ctx.mark_non_differentiable(chosen_te)
        return gates_te, chosen_te

    @staticmethod
    def backward(ctx, gradient_te, _):
        logits_te, chosen_te = ctx.saved_tensors
        return _back(logits_te, chosen_te, gradient_te, ctx.scale, ctx.normalised), *(None,) * 5


class _BalanceScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_te, k):
        logits_te = logits_te.contiguous()
        tokens, experts = logits_te.shape
        scores_te, chosen_te = torch.empty_like(logits_te), torch.empty_like(logits_te, dtype=torch.uint8)
        rows, columns = _blocks(logits_te)
        _routing_balance_forward[(triton.cdiv(tokens, rows),)](
            logits_te, scores_te, chosen_te, tokens, experts, K=k, ROWS=rows, COLUMNS=columns
        )
        chosen_te = chosen_te.view(torch.bool)
        ctx.save_for_backward(logits_te)
        ctx.mark_non_differentiable(chosen_te)
        return scores_te, chosen_te

    @staticmethod
    def backward(ctx, gradient_te, _):
        (logits_te,) = ctx.saved_tensors
        return _back(logits_te, None, gradient_te, 1.0, True), None


def _back(
    logits_te: torch.Tensor, chosen_te: torch.Tensor | None, gradient_te: torch.Tensor, scale: float, normalised: bool
) -> torch.Tensor:
    """The logits' gradient from that of scale * s / sum, over the chosen experts or over all."""
    back_te = torch.empty_like(logits_te)
    tokens, experts = logits_te.shape
    rows, columns = _blocks(logits_te)
    _routing_backward[(triton.cdiv(tokens, rows),)](
        logits_te, logits_te if chosen_te is None else chosen_te.view(torch.uint8), gradient_te.contiguous(), back_te,
        tokens, experts, scale, SOME=chosen_te is not None, NORMALISED=normalised, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return back_te


@triton.jit
def _best(values, column, COUNT: tl.constexpr):
    """Bool: the COUNT largest of each row, of equal ones the first. Always COUNT: what is not a number comes last."""
    values = tl.where(values == values, tl.maximum(values, -1e38), -1e38)
    chosen = column < 0
    for _ in tl.static_range(COUNT):
        at = tl.argmax(tl.where(chosen, float("-inf"), values), 1)
        chosen = chosen | (column == at[:, None])
    return chosen


@triton.jit(do_not_specialize=["tokens"])
def _routing_gates_forward(
    logits_ptr, bias_ptr, gates_ptr, chosen_ptr, tokens, experts, scale,
    BIASED: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    inside = column < experts
    there = (row < tokens) & inside
    at = row.to(tl.int64) * experts + column
    scores = tl.sigmoid(tl.load(logits_ptr + at, there, other=0.0))
    biased = scores
    if BIASED:
        biased += tl.load(bias_ptr + column, inside, other=0.0)
    if KEPT < GROUPS:
        group = column // (experts // GROUPS)
        group_column = tl.arange(0, GROUP_COLUMNS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
        of_groups = tl.full([ROWS, GROUP_COLUMNS], float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            own = tl.where((group == g) & inside, biased, float("-inf"))
            first = tl.max(own, 1)
            second = tl.max(tl.where(column == tl.argmax(own, 1)[:, None], float("-inf"), own), 1)
            of_groups = tl.where(group_column == g, (first + second)[:, None], of_groups)
        # Groups beyond the last are the smallest there can be: below what is not a number.
        of_groups = tl.where(group_column < GROUPS, tl.where(of_groups == of_groups, of_groups, -1e37), of_groups)
        kept = _best(of_groups, group_column, KEPT)
        allowed = column < 0
        for g in tl.static_range(GROUPS):
            this = tl.max((kept & (group_column == g)).to(tl.int32), 1)
            allowed = allowed | ((group == g) & (this[:, None] > 0))
        biased = tl.where(allowed, tl.where(biased == biased, biased, -1e37), -1e38)
    # Columns beyond the last expert must not be chosen before one that is not a number.
    chosen = _best(tl.where(inside, tl.where(biased == biased, biased, -1e37), -1e38), column, K)
    gates = tl.where(chosen, scores, 0.0)
    if K > 1:
        gates = gates / (tl.sum(gates, 1)[:, None] + _EPSILON)
    tl.store(gates_ptr + at, gates * scale, there)
    tl.store(chosen_ptr + at, chosen.to(tl.uint8), there)


@triton.jit(do_not_specialize=["tokens"])
def _routing_balance_forward(
    logits_ptr, scores_ptr, chosen_ptr, tokens, experts, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    inside = column < experts
    there = (row < tokens) & inside
    at = row.to(tl.int64) * experts + column
    scores = tl.sigmoid(tl.load(logits_ptr + at, there, other=0.0))
    chosen = _best(tl.where(inside, tl.where(scores == scores, scores, -1e37), -1e38), column, K)
    scores = tl.where(inside, scores, 0.0)
    tl.store(scores_ptr + at, scores / (tl.sum(scores, 1)[:, None] + _EPSILON), there)
    tl.store(chosen_ptr + at, chosen.to(tl.uint8), there)


@triton.jit(do_not_specialize=["tokens"])
def _routing_backward(
    logits_ptr, chosen_ptr, gradient_ptr, back_ptr, tokens, experts, scale,
    SOME: tl.constexpr, NORMALISED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d s_i = scale / S (g_i - sum_j g_j s_j / S) for those in the sum S; d x_i = s_i (1 - s_i) d s_i."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < tokens) & (column < experts)
    at = row.to(tl.int64) * experts + column
    scores = tl.sigmoid(tl.load(logits_ptr + at, there, other=0.0))
    gradient = tl.load(gradient_ptr + at, there, other=0.0) * scale
    summed = there
    if SOME:
        summed = tl.load(chosen_ptr + at, there, other=0) != 0
    gradient = tl.where(summed, gradient, 0.0)
    if NORMALISED:
        total = tl.sum(tl.where(summed, scores, 0.0), 1)[:, None] + _EPSILON
        gradient = tl.where(summed, (gradient - tl.sum(gradient * scores, 1)[:, None] / total) / total, 0.0)
    tl.store(back_ptr + at, gradient * scores * (1.0 - scores), there)
