"""`dsv3_671b_2048xh800` against what is published, value by value.

TR: DeepSeek-V3 Technical Report, arXiv 2412.19437. HF: config.json of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

import math

import pytest

from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.layout import stages
from dsv3_train.recipe.load import load

B, T = 10**9, 10**12
LENGTH = 4096  # tokens per sequence, TR 4.2


@pytest.fixture(scope="module")
def recipe():
    return load("dsv3_671b_2048xh800")


@pytest.fixture(scope="module")
def plan(recipe):
    return Schedules(recipe)


def at(plan: Schedules, tokens: float):
    """The step that begins there, or with the next whole sequence."""
    return plan.at(math.ceil(tokens / LENGTH))


@pytest.mark.parametrize(
    ("key", "published"),
    [
        ("vocab_size", 129280),  # HF
        ("hidden_size", 7168),  # TR 4.2
        ("num_hidden_layers", 61),  # TR 4.2
        ("num_attention_heads", 128),  # TR 4.2
        ("intermediate_size", 18432),  # HF
        ("moe_intermediate_size", 2048),  # TR 4.2
        ("first_k_dense_replace", 3),  # TR 4.2
        ("n_routed_experts", 256),  # TR 4.2
        ("n_shared_experts", 1),  # TR 4.2
        ("num_experts_per_tok", 8),  # TR 4.2
        ("n_group", 8),  # HF
        ("topk_group", 4),  # HF; TR 4.2: at most 4 nodes
        ("routed_scaling_factor", 2.5),  # HF
        ("q_lora_rank", 1536),  # TR 4.2
        ("kv_lora_rank", 512),  # TR 4.2
        ("qk_nope_head_dim", 128),  # TR 4.2
        ("qk_rope_head_dim", 64),  # TR 4.2
        ("v_head_dim", 128),  # HF
        ("num_nextn_predict_layers", 1),  # TR 4.2
        ("rms_norm_eps", 1e-6),  # HF
        ("initializer_range", 0.006),  # TR 4.2
        ("rope_theta", 10000),  # HF
        ("rope_scaling", None),  # TR 4.3: YaRN only after pre-training
    ],
)
def test_architecture(recipe, key, published):
    assert getattr(recipe.model, key) == published


def test_parameters(recipe):
    """671B in total (TR 4.2); to the last value in the published index: 671,026,419,200."""
    m = recipe.model
    h, heads = m.hidden_size, m.num_attention_heads
    attention = (
        h * m.q_lora_rank
        + m.q_lora_rank * heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        + h * (m.kv_lora_rank + m.qk_rope_head_dim)
        + m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
        + heads * m.v_head_dim * h
        + (m.q_lora_rank + m.kv_lora_rank + 2 * h)  # norms
    )
    expert = 3 * h * m.moe_intermediate_size
    moe = (m.n_routed_experts + m.n_shared_experts) * expert + (h + 1) * m.n_routed_experts
    dense, layers = m.first_k_dense_replace, m.num_hidden_layers
    total = 2 * m.vocab_size * h + h + layers * attention + dense * 3 * h * m.intermediate_size + (layers - dense) * moe
    assert total == 671_026_419_200


@pytest.mark.parametrize(
    ("section", "key", "published"),
    [
        ("parallel", "world_size", 2048),  # TR 3.1
        ("parallel", "gpus_per_node", 8),  # TR 3.1
        ("parallel", "tensor", 1),  # TR 3.2
        ("parallel", "pipeline", 16),  # TR 3.2
        ("parallel", "expert", 64),  # TR 3.2
        ("parallel", "zero1", True),  # TR 3.2
        ("pipeline", "schedule", "dualpipe"),  # TR 3.2.1
        ("pipeline", "communication_sms", 20),  # TR 3.2.2
        ("precision", "params", "bf16"),  # TR 3.3.1
        ("precision", "fp8", "blockwise"),  # TR 3.3.2
        ("precision", "fp8_dispatch", True),  # TR 3.3.3
        ("precision", "swiglu_input", "fp8"),  # TR 3.3.3
        ("precision", "attention_output", "e5m6"),  # TR 3.3.3
        ("precision", "adam_moments", "bf16"),  # TR 3.3.3
        ("optim", "beta1", 0.9),  # TR 4.2
        ("optim", "beta2", 0.95),  # TR 4.2
        ("optim", "weight_decay", 0.1),  # TR 4.2
        ("optim", "clip_grad_norm", 1.0),  # TR 4.2
        ("schedule", "balance_loss", 1e-4),  # TR 4.2
        ("training", "sequence_length", LENGTH),  # TR 4.2
        ("training", "duration", 14_800_000_000_000),  # TR 4.2
        ("training", "recompute", ["layernorm", "mla_up_proj", "moe_act"]),  # TR 3.2.3, 3.3.3
    ],
)
def test_training_settings(recipe, section, key, published):
    assert getattr(getattr(recipe, section), key) == published


def test_a_moving_average_of_parameters_is_kept(recipe):
    assert recipe.optim.ema_decay is not None  # TR 3.2.3; the decay is not published


def test_expert_parallelism_spans_8_nodes_and_leaves_2_copies(recipe):
    # TR 3.2: 64-way over 8 nodes, within the 2048 / 16 data-parallel ranks.
    assert recipe.parallel.data == 128
    assert recipe.parallel.expert // recipe.parallel.gpus_per_node == 8
    assert recipe.parallel.expert_data == 2


def test_stages(recipe):
    placed = stages(recipe)
    assert len(placed) == 16
    assert placed[0] == "Etttt"
    assert set(placed[1:15]) == {"tttt"}
    assert placed[15] == "tmL"  # TR 3.2.3: MTP where the head is; DualPipe puts the embedding on the same rank


@pytest.mark.parametrize(("step", "published"), [(0, 0), (1000, 1.1e-4), (2000, 2.2e-4), (2001, 2.2e-4)])
def test_warm_up_is_linear_over_2000_steps(plan, step, published):
    # TR 4.2. The batch grows meanwhile, so steps and tokens are not proportional.
    first = next(first for number, first, _ in plan.plan() if number == step)
    assert plan.at(first).lr == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize(
    ("tokens", "published"),
    [
        (5 * T, 2.2e-4),  # TR 4.2: constant until 10T
        (10 * T, 2.2e-4),
        (12.15 * T, (2.2e-4 + 2.2e-5) / 2),  # cosine over 4.3T: midpoint
        (10 * T + 4.3 * T / 4, 2.2e-5 + 1.98e-4 * 0.8535533905932737),  # a quarter: (1 + cos 45 degrees) / 2
        (14.3 * T, 2.2e-5),
        (14.5 * T, 2.2e-5),  # for 333B
        (14.632 * T, 2.2e-5),
        (14.634 * T, 7.3e-6),  # for the last 167B
        (14.7 * T, 7.3e-6),
        (14.799 * T, 7.3e-6),
    ],
)
def test_learning_rate(plan, tokens, published):
    assert at(plan, tokens).lr == pytest.approx(published, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "published"),
    [
        (0, 3072),  # TR 4.2
        (234.5 * B, 9216),  # halfway, as the ramp is linear here
        (469 * B, 15360),
        (469.1 * B, 15360),
        (5 * T, 15360),
        (14.799 * T, 15360),
    ],
)
def test_batch_size(recipe, plan, tokens, published):
    size = at(plan, tokens).batch_size
    assert published - recipe.batch_multiple < size <= published
    assert size % recipe.batch_multiple == 0
    assert recipe.batch_multiple == 128


@pytest.mark.parametrize(("tokens", "published"), [(0, 0.3), (9.999 * T, 0.3), (10.001 * T, 0.1), (14.799 * T, 0.1)])
def test_mtp_weight(plan, tokens, published):
    assert at(plan, tokens).mtp_weight == published  # TR 4.2


@pytest.mark.parametrize(
    ("tokens", "published"), [(0, 0.001), (14.299 * T, 0.001), (14.301 * T, 0.0), (14.799 * T, 0.0)]
)
def test_bias_update_speed(plan, tokens, published):
    assert at(plan, tokens).bias_update_speed == published  # TR 4.2


def test_length(plan):
    assert plan.total_tokens == 14_800_000_000_000  # TR 4.2
    # By hand: (14.8T - 469B) / (15360 x 4096) = 227,785 steps after the ramp; in a continuous linear ramp from a to b
    # over D tokens there are D / (4096 (b - a)) x ln(b / a) = 14,997 + rounding down to 128 sequences, about 1%.
    assert plan.total_steps == pytest.approx(227_785 + 14_997, rel=1e-3)
    assert 0 <= plan.total_samples * LENGTH - plan.total_tokens < 15360 * LENGTH
