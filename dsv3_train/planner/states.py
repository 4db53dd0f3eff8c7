"""Bytes that one process holds for the whole run: weights, gradients, optimizer states. Plain arithmetic.

`account.py` counts the same weights on the model itself, and the tests hold one against the other; this needs neither
torch nor Megatron. Activations and FP8 copies of weights come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_train.recipe.chunks import MIRRORED, chunks_of
from dsv3_train.recipe.layout import stages
from dsv3_train.recipe.schema import Recipe


@dataclass(frozen=True)
class Held:
    """Values of one process: their copies are on other processes, as many as they have data-parallel replicas."""

    dense: int
    """All but routed experts."""
    experts: int


def state_bytes(recipe: Recipe) -> int:
    """Bytes on the fullest pipeline rank. Gradients are FP32, and so are master weights beside BF16 ones."""
    parallel, precision = recipe.parallel, recipe.precision
    weight = 2 if precision.params == "bf16" else 4
    master = 4 if precision.params == "bf16" else 0
    optimizer = master + 2 * (2 if precision.adam_moments == "bf16" else 4)
    copies = 2 if recipe.pipeline.schedule == "dualpipe" else 1  # of each stage: one more data-parallel dimension
    dense_share = copies * parallel.data * parallel.context if parallel.zero1 else 1
    expert_share = copies * parallel.expert_data if parallel.zero1 else 1
    return max(
        (rank.dense + rank.experts) * (weight + 4)
        + rank.dense * optimizer // dense_share
        + rank.experts * optimizer // expert_share
        for rank in held(recipe)
    )


def held(recipe: Recipe) -> list[Held]:
    """What one process of each pipeline rank holds, routing biases and copies of the embedding included."""
    per_stage, layer = [], 0
    for stage in stages(recipe):
        dense = experts = 0
        for part in stage:
            more_dense, more_experts = _part(recipe, part, layer)
            dense, experts = dense + more_dense, experts + more_experts
            layer += part == "t"
        # MTP embeds the next token with the main model's embedding: a copy, but where both are on one rank.
        if "m" in stage and "E" not in stage and recipe.pipeline.schedule not in MIRRORED:
            dense += _part(recipe, "E", layer)[0]
        per_stage.append((dense, experts))
    kind, virtual, count = recipe.pipeline.schedule, recipe.pipeline.virtual_stages, recipe.parallel.pipeline
    rows = []
    for rank in range(count):
        mine = [per_stage[stage] for _, stage in chunks_of(kind, count, rank, virtual)]
        rows.append(Held(sum(dense for dense, _ in mine), sum(experts for _, experts in mine)))
    return rows


def _part(recipe: Recipe, part: str, layer: int) -> tuple[int, int]:
    """(dense, expert) values of one letter of the layout; `layer` is the decoder layer's number."""
    m, tensor = recipe.model, recipe.parallel.tensor
    h = m.hidden_size
    match part:
        case "E":
            return m.vocab_size * h // tensor, 0
        case "L":
            return m.vocab_size * h // tensor + h, 0
        case "t" if layer < m.first_k_dense_replace:
            return _attention(recipe) + 3 * h * m.intermediate_size // tensor, 0
        case "m":
            dense, experts = _moe_layer(recipe)
            return dense + 3 * h + 2 * h * h // tensor, experts
        case _:
            return _moe_layer(recipe)


def _moe_layer(recipe: Recipe) -> tuple[int, int]:
    m, p = recipe.model, recipe.parallel
    expert = 3 * m.hidden_size * m.moe_intermediate_size
    router = m.n_routed_experts * (m.hidden_size + (m.scoring_func == "sigmoid"))  # with its bias
    experts = m.n_routed_experts // p.expert * (expert // p.expert_tensor)
    return _attention(recipe) + router + m.n_shared_experts * expert // p.tensor, experts


def _attention(recipe: Recipe) -> int:
    """With the layer's two norms. Down-projections and norms are whole on every tensor rank."""
    m, tensor = recipe.model, recipe.parallel.tensor
    h, heads, query_key = m.hidden_size, m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim
    if m.q_lora_rank is None:
        whole, split = 0, h * heads * query_key
    else:
        whole, split = m.q_lora_rank * (h + 1), m.q_lora_rank * heads * query_key
    whole += h * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank + 2 * h
    split += m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim) + heads * m.v_head_dim * h
    return whole + split // tensor
