"""Groups of experts are scored by their best 2, as in DeepSeek-V3's code, however many experts a token has."""

from __future__ import annotations

import pytest
import torch

from dsv3_train.runtime import distributed

TOKENS, EXPERTS, GROUPS = 64, 32, 8


@pytest.fixture(scope="module")
def rules():
    distributed.prepare_import("cpu")
    from dsv3_train.model import routing

    return routing.megatrons_own, routing.group_limited_topk


def chosen(rule, topk: int, group_topk: int) -> list[set[int]]:
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    values, experts = rule(scores, topk, TOKENS, EXPERTS, GROUPS, group_topk)
    assert torch.equal(values, scores.gather(1, experts))
    return [set(row.tolist()) for row in experts]


def test_as_megatrons_where_that_sums_two(rules):
    megatrons, ours = rules
    assert chosen(ours, 8, 4) == chosen(megatrons, 8, 4)


@pytest.mark.parametrize(("topk", "group_topk"), [(4, 4), (8, 2)])
def test_not_as_megatrons_otherwise(rules, topk, group_topk):
    """Should Megatron-core come to sum two as well, the patch is no longer needed."""
    megatrons, ours = rules
    assert chosen(ours, topk, group_topk) != chosen(megatrons, topk, group_topk)
    size = EXPERTS // GROUPS
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).view(TOKENS, GROUPS, size)
    best = scores.topk(2).values.sum(-1).topk(group_topk).indices
    for experts, groups in zip(chosen(ours, topk, group_topk), best.tolist(), strict=True):
        assert {expert // size for expert in experts} <= set(groups)
