"""FLOPs per token against the figures published for DeepSeek-V3 (arXiv 2505.09343, table 4) and derived ones."""

import pytest

from dsv3_train.planner.flops import flops_per_token
from dsv3_train.recipe.load import load


@pytest.mark.parametrize(
    ("options", "giga"), [({}, 249.81), ({"causal": False}, 280.51), ({"mtp": True}, 259.99)]
)
def test_published(options, giga):
    recipe = load("dsv3_671b_2048xh800")
    assert round(flops_per_token(recipe.model, 4096, **options) / 1e9, 2) == giga


def test_without_query_compression():
    recipe = load("dsv3_16b")
    m = recipe.model
    expected = m.hidden_size * m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    compressed = m.model_copy(update={"q_lora_rank": 512})
    difference = flops_per_token(m, 4096) - flops_per_token(compressed, 4096)
    uncompressed = 512 * (m.hidden_size + m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim))
    assert difference == 6 * m.num_hidden_layers * (expected - uncompressed)
