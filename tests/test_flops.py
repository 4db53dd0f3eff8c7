"""FLOPs per token against the figures published for DeepSeek-V3 (arXiv 2505.09343, table 4)."""

import pytest

from dsv3_train.planner.flops import flops_per_token
from dsv3_train.recipe.schema import Model

V3 = Model(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_nextn_predict_layers=1,
)
"""The published config.json."""


@pytest.mark.parametrize(("options", "giga"), [({}, 249.81), ({"causal": False}, 280.51), ({"mtp": True}, 259.99)])
def test_per_token(options, giga):
    assert round(flops_per_token(V3, 4096, **options) / 1e9, 2) == giga


@pytest.mark.parametrize(("causal", "tflops", "mfu"), [(True, 385, 38.94), (False, 432, 43.73)])
def test_published_speed(causal, tflops, mfu):
    """272.80B tokens a day on 2048 H800."""
    per_gpu = flops_per_token(V3, 4096, causal=causal) * 272.80e9 / 86400 / 2048 / 1e12
    assert round(per_gpu) == tflops
    assert round(100 * per_gpu / 989, 2) == mfu


def test_no_mtp_modules_no_mtp_flops():
    without = V3.model_copy(update={"num_nextn_predict_layers": 0})
    assert flops_per_token(without, 4096, mtp=True) == flops_per_token(V3, 4096)


def test_without_query_compression():
    """`q_lora_rank: null`: one full matrix in place of two of low rank, on every layer."""
    full = V3.model_copy(update={"q_lora_rank": None})
    per_layer = 7168 * 128 * 192 - 1536 * (7168 + 128 * 192)
    assert flops_per_token(full, 4096) - flops_per_token(V3, 4096) == 6 * 61 * per_layer
