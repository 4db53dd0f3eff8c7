"""Bytes of activations that an MoE layer holds between its forward and its backward pass. Plain arithmetic on shapes.

Of Transformer Engine's layers as Megatron-core 0.16 builds them, fused MLA RoPE and permutation, tokens spread evenly
over experts; tools/activation_bytes.py measures the same on a GPU.
"""

from __future__ import annotations

from dsv3_train.recipe.schema import Recipe

_SCALED = 1 + 4 / 128
"""Bytes of a value that Transformer Engine keeps in E4M3: an FP32 scale for each 128."""
_E4M3, _E5M6 = 1 + 1 / 128, 1.5 + 1 / 128
"""Bytes of a value in the tiles of precision/tiles.py."""


def countable(recipe: Recipe) -> bool:
    """Whether `moe_layer_bytes` knows the layers: BF16 on GPUs, no tensor parallelism, one of these recomputations."""
    known = {"layernorm", "mla_up_proj", "moe_act"}
    on_gpu = recipe.precision.params == "bf16" and recipe.runtime.device != "cpu"
    has_experts = recipe.model.first_k_dense_replace < recipe.model.num_hidden_layers
    return on_gpu and has_experts and recipe.parallel.tensor == 1 and set(recipe.training.recompute) <= known


def moe_layer_bytes(recipe: Recipe, tokens: int) -> dict[str, int]:
    """By what they are, for `tokens` tokens of one rank, as many of whose peers' it gets for its experts.

    Without tensor parallelism. `sum(...values())` is what `tokens` cost per layer and micro-batch in flight.
    """
    m, precision, again = recipe.model, recipe.precision, recipe.training.recompute
    fp8 = precision.fp8 not in ("none", "emulated")
    kept = _SCALED if fp8 else 2.0  # an input that a linear layer keeps by itself
    rows, hidden, heads = tokens * m.num_experts_per_tok, m.hidden_size, m.num_attention_heads
    shared = m.n_shared_experts * m.moe_intermediate_size
    latents = (m.q_lora_rank or 0) + m.kv_lora_rank
    queries_keys_values = heads * (2 * (m.qk_nope_head_dim + m.qk_rope_head_dim) + m.v_head_dim)
    swiglu = _E4M3 if precision.swiglu_input == "fp8" else 2.0
    attention = _E5M6 if precision.attention_output == "e5m6" else 2.0
    held = {
        "inputs of both norms": 2 * 2.0 * tokens * hidden,
        # Query and key-value down-projections have one input: in FP8 each keeps a copy. The router keeps the other.
        "outputs of both norms": 0.0 if "layernorm" in again else ((2 if fp8 else 1) * kept + 2.0) * tokens * hidden,
        "MLA latents": 2.0 * tokens * (latents + m.qk_rope_head_dim),
        "normed MLA latents": 0.0 if "mla_up_proj" in again else kept * tokens * latents,
        "queries, keys, values": 0.0 if "mla_up_proj" in again else 2.0 * tokens * queries_keys_values,
        "attention output": tokens * heads * (attention * m.v_head_dim + 4),  # and FP32 sums of its softmax
        "router": tokens * m.n_routed_experts * (3 * 4 + 1),  # logits, scores, gates in FP32, the map of choices
        "permutation": tokens * (2 * m.n_routed_experts + 1) * 4,
        "inputs of experts": kept * rows * hidden,
        "SwiGLU inputs of experts": swiglu * rows * 2 * m.moe_intermediate_size,
        "SwiGLU outputs of experts": 0.0 if "moe_act" in again else kept * rows * m.moe_intermediate_size,
        "shared expert": tokens * shared * (2 * swiglu + kept),
    }
    return {name: round(count) for name, count in held.items()}
