"""Floating-point operations per token, forward and backward.

Megatron's convention: 2 per multiply-add and three passes (forward, input gradient, weight gradient), so 6 per
weight that a token is multiplied with, plus attention's core. Counted are

- every matrix of attention (low-rank ones as they stand, not absorbed), of the dense FFNs, and of the shared and the
  `num_experts_per_tok` routed experts that a token visits (3 matrices each), and the output head;
- attention's core: scores over nope + rope dimensions and their product with the values, per head, over all S
  positions, or S / 2 with `causal`;
- with `mtp`, per module: one more MoE layer, the 2h x h projection, and the output head again.

Not counted: embedding look-up, router, norms, activations, recomputation.

It reproduces what is published for DeepSeek-V3 at S = 4096 (arXiv 2505.09343, table 4: 385 TFLOPS causal, 432
non-causal at 272.80B tokens a day on 2048 GPUs): 249.81 GF causal, 280.51 non-causal; 259.99 causal with MTP.
"""

from __future__ import annotations

from dsv3_train.recipe.schema import Model


def _attention_weights(m: Model) -> int:
    query_key = m.qk_nope_head_dim + m.qk_rope_head_dim
    heads = m.num_attention_heads
    if m.q_lora_rank is None:
        query = m.hidden_size * heads * query_key
    else:
        query = m.q_lora_rank * (m.hidden_size + heads * query_key)
    key_value = m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim)
    key_value += m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
    return query + key_value + heads * m.v_head_dim * m.hidden_size


def _moe_weights(m: Model) -> int:
    return 3 * m.hidden_size * m.moe_intermediate_size * (m.num_experts_per_tok + m.n_shared_experts)


def flops_per_token(model: Model, sequence_length: int, *, causal: bool = True, mtp: bool = False) -> float:
    """FLOPs of one token's forward and backward pass in a sequence of `sequence_length` tokens.

    Args:
        causal: attention's core counts half, as a causal mask leaves it.
        mtp: with the Multi-Token Prediction modules.
    """
    m = model
    depth = m.num_nextn_predict_layers if mtp else 0
    moe_layers = m.num_hidden_layers - m.first_k_dense_replace
    head = m.hidden_size * m.vocab_size
    weights = (
        (m.num_hidden_layers + depth) * _attention_weights(m)
        + m.first_k_dense_replace * 3 * m.hidden_size * m.intermediate_size
        + (moe_layers + depth) * _moe_weights(m)
        + depth * 2 * m.hidden_size**2  # eh_proj
        + (1 + depth) * head
    )
    # Scores and their product with the values; under a causal mask a token sees half the sequence on average.
    seen = sequence_length / 2 if causal else sequence_length
    head_dims = m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim
    attention = (m.num_hidden_layers + depth) * seen * m.num_attention_heads * head_dims
    return 6 * (weights + attention)
