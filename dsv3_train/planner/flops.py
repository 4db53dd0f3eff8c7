"""Floating-point operations per token, forward and backward.

Megatron's convention: 2 per multiply-add, three passes (forward, input gradient, weight gradient), matrix
multiplications and attention alone (no norms, activations, router or embedding look-up); of routed experts those
that a token visits. It reproduces the figures published for DeepSeek-V3 at 4096 tokens (arXiv 2505.09343):
249.8 GF causal, 280.5 GF non-causal.
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
    """FLOPs of one token's forward and backward pass; `mtp` adds the Multi-Token Prediction modules."""
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
