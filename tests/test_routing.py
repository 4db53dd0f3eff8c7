"""Groups of experts are scored by their best 2, as in DeepSeek-V3's code, however many experts a token has."""

from __future__ import annotations

import pytest
import torch

from dsv3_train.runtime import distributed
from parity import assembled, batch, tiny

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


def test_tokens_are_counted_exactly_in_bf16():
    """Over many micro-batches and in the update of biases; Megatron-core alone would count them in BF16."""
    micro_batches = 24
    bf16, alone = {"params": "bf16", "adam_moments": "fp32"}, {"num_nextn_predict_layers": 0}
    with assembled(tiny(precision=bf16, model=alone)) as trainer:
        from megatron.core.transformer.module import Float16Module

        (model,), recipe = trainer.models, trainer.recipe
        routers = [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
        router, bias = routers[0], routers[0].expert_bias.clone()
        chosen_by: list[torch.Tensor] = []
        router.register_forward_hook(lambda _, __, out: chosen_by.append(out[1]))
        data = [batch(recipe, 0, number) for number in range(micro_batches)]
        for one in data:
            trainer.chunks[0](one["tokens"], one["position_ids"], None)
        counted = torch.cat(chosen_by).sum(0)
        tokens = micro_batches * data[0]["tokens"].numel()
        assert router.local_tokens_per_expert.sum() == tokens * recipe.model.num_experts_per_tok
        assert torch.equal(router.local_tokens_per_expert, counted.float())
        from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

        trainer.config.moe_router_bias_update_rate = 0.5
        _update_router_expert_bias([model], trainer.config)
        assert torch.equal(router.expert_bias - bias, 0.5 * (counted.float().mean() - counted).sign())
        Float16Module(trainer.config, model)
        # Should Megatron-core come to keep FP32, `in_training_precision` need not.
        assert router.local_tokens_per_expert.dtype == torch.bfloat16
