"""Which groups of experts a token may go to: DeepSeek-V3's rule, in place of Megatron-core's."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe import moe_utils

megatrons_own = moe_utils.group_limited_topk


def group_limited_topk(
    scores: torch.Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, experts] scores -> the `topk` best of the `group_topk` best groups: scores and experts, [tokens, topk].

    A group counts as much as its best 2 experts together (report, section 2.1.2).
    """
    grouped_tge = scores.unflatten(1, (num_groups, -1))
    kept_tg = grouped_tge.topk(2, dim=-1).values.sum(dim=-1).topk(group_topk, dim=-1).indices
    outside_tg = torch.ones(num_tokens, num_groups, dtype=torch.bool, device=scores.device)
    outside_tg.scatter_(1, kept_tg, False)
    masked_te = grouped_tge.masked_fill(outside_tg.unsqueeze(-1), float("-inf")).flatten(1)
    return masked_te.topk(topk, dim=-1)


def install() -> None:
    """Megatron-core 0.16 sums the best `topk / group_topk` of a group: 2 for DeepSeek-V3, but not for all like it."""
    moe_utils.group_limited_topk = group_limited_topk
