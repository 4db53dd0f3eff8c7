"""The table of names: every tensor of the published files, and the values of Megatron's tensors that it holds.

Both directions, `verify` and `inspect` read this one table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Model

BLOCK = 128
"""Side of an FP8 block; blocks are cut at a matrix's border (report, section 3.3.2)."""
SCALE = "_scale_inv"
"""What the published files append to a weight's name for the FP32 scales of its FP8 blocks."""

_FEW, _TIMES = 100_000, 4
"""Tensors that are listed whatever the files have (DeepSeek-V3 has 46,000 weights); and of what they have, so often."""


class Row(NamedTuple):
    """One line of the table. `{e}` is the expert's number, and the first index of Megatron's tensor."""

    theirs: str
    ours: str
    shape: str
    """Of the published tensor, [out, in]."""
    stored: Literal["fp8", "bf16", "fp32"] = "bf16"
    """As published: `fp8` in 128x128 blocks. (Files without FP8 store those as the rest.)"""
    part: Literal["", "gate", "up"] = ""
    """Megatron fuses gate and up: the first and the second half of its tensor's rows."""
    copy: str = ""
    """Equal to this tensor of the main model, which Megatron's MTP shares."""


MODEL = (
    Row("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocabulary hidden"),
    Row("model.norm.weight", "decoder.final_layernorm.weight", "hidden"),
    Row("lm_head.weight", "output_layer.weight", "vocabulary hidden"),
)
ATTENTION = (
    Row("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    Row("self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight", "kv_a hidden", "fp8"),
    Row("self_attn.kv_a_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight", "kv_latent"),
    Row("self_attn.kv_b_proj.weight", "self_attention.linear_kv_up_proj.weight", "kv_b kv_latent", "fp8"),
    Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "hidden value", "fp8"),
)
QUERY_LATENT = (
    Row("self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight", "q_latent hidden", "fp8"),
    Row("self_attn.q_a_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight", "q_latent"),
    Row("self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight", "query q_latent", "fp8"),
)
QUERY = (Row("self_attn.q_proj.weight", "self_attention.linear_q_proj.weight", "query hidden", "fp8"),)
# A dense FFN's norm is the linear layer's own under Transformer Engine's names; an MoE layer's stands apart.
DENSE = (
    Row("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "hidden"),
    Row("mlp.gate_proj.weight", "mlp.linear_fc1.weight", "ffn hidden", "fp8", part="gate"),
    Row("mlp.up_proj.weight", "mlp.linear_fc1.weight", "ffn hidden", "fp8", part="up"),
    Row("mlp.down_proj.weight", "mlp.linear_fc2.weight", "hidden ffn", "fp8"),
)
MOE = (
    Row("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "hidden"),
    Row("mlp.gate.weight", "mlp.router.weight", "experts hidden"),
)
BIAS = (Row("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", "experts", "fp32"),)
EXPERT = (
    Row("mlp.experts.{e}.gate_proj.weight", "mlp.experts.experts.linear_fc1.weight", "expert hidden", "fp8", "gate"),
    Row("mlp.experts.{e}.up_proj.weight", "mlp.experts.experts.linear_fc1.weight", "expert hidden", "fp8", "up"),
    Row("mlp.experts.{e}.down_proj.weight", "mlp.experts.experts.linear_fc2.weight", "hidden expert", "fp8"),
)
SHARED_EXPERTS = (
    Row("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.linear_fc1.weight", "shared hidden", "fp8", "gate"),
    Row("mlp.shared_experts.up_proj.weight", "mlp.shared_experts.linear_fc1.weight", "shared hidden", "fp8", "up"),
    Row("mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight", "hidden shared", "fp8"),
)
MTP = (
    Row("embed_tokens.weight", "", "vocabulary hidden", copy="model.embed_tokens.weight"),
    Row("enorm.weight", "enorm.weight", "hidden"),
    Row("hnorm.weight", "hnorm.weight", "hidden"),
    Row("eh_proj.weight", "eh_proj.weight", "hidden hidden*2"),  # of [embedding, hidden], in this order in both
    Row("shared_head.norm.weight", "final_layernorm.weight", "hidden"),
    Row("shared_head.head.weight", "", "vocabulary hidden", copy="lm_head.weight"),
)
"""Beside a transformer layer, in `model.layers.N`, N from num_hidden_layers on; Megatron's are `mtp.layers.0` on."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the published files and its place in a Megatron tensor."""

    name: str
    shape: tuple[int, ...]
    key: str
    """Of the Megatron tensor: the checkpoint's name."""
    key_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Of its first value within the Megatron tensor; an expert has one index more than `shape`."""
    stored: str
    copy: bool
    """A duplicate: MTP's of the embedding or the output head. `key` is the original's."""

    @property
    def extent(self) -> tuple[int, ...]:
        """Its shape with as many dimensions as the Megatron tensor has."""
        return (1,) * (len(self.key_shape) - len(self.shape)) + self.shape

    @property
    def values(self) -> int:
        """How many it holds."""
        return prod(self.shape)

    @property
    def scale_name(self) -> str:
        """Of the FP8 scales that come with it where it is stored in FP8."""
        return self.name + SCALE

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Blocks in each dimension."""
        return tuple(-(-size // BLOCK) for size in self.shape)


def number(model: Model, mtp: int) -> int:
    """How many tensors `weights` has, without going through them."""
    layers = model.num_hidden_layers + mtp
    # MTP's layer is like the last of the main model.
    dense = layers if model.first_k_dense_replace >= model.num_hidden_layers else model.first_k_dense_replace
    rows = {moe: layer_rows(model, moe) for moe in (False, True)}
    of = {moe: sum(model.n_routed_experts if "{e}" in row.theirs else 1 for row in some) for moe, some in rows.items()}
    return len(MODEL) + len(MTP) * mtp + of[False] * dense + of[True] * (layers - dense)


def refuse_more(model: Model, mtp: int, there: int, place: str) -> None:
    """Refuse a model of far more tensors than there are, before all of them are listed as missing.

    Args:
        there: tensors in the files.
        place: of the configuration, for the message.

    Raises:
        UserError: names the keys.
    """
    if (expected := number(model, mtp)) > max(_FEW, _TIMES * there):
        raise UserError(
            f"{place}: n_routed_experts: {model.n_routed_experts:,} and num_hidden_layers: {model.num_hidden_layers:,} "
            f"make {expected:,} tensors, and the files have {there:,}; correct them, or fetch the files again"
        )


@functools.lru_cache(maxsize=4)
def weights(model: Model, mtp: int) -> tuple[Weight, ...]:
    """Every tensor of a model with `mtp` MTP modules (FP8 scales apart), layer by layer as the published files go."""
    sizes = _sizes(model)
    embedding, norm, head = (_weight(row, row.theirs, row.ours, sizes) for row in MODEL)
    found = [embedding]
    for layer in range(model.num_hidden_layers + mtp):
        depth = layer - model.num_hidden_layers
        theirs = f"model.layers.{layer}."
        if depth >= 0:
            for row in MTP:
                original = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}.get(row.copy)
                key = original.key if original else f"mtp.layers.{depth}.{row.ours}"
                found.append(_weight(row, theirs + row.theirs, key, sizes))
        ours = f"decoder.layers.{layer}." if depth < 0 else f"mtp.layers.{depth}.transformer_layer."
        # MTP's layer is like the last of the main model.
        moe = min(layer, model.num_hidden_layers - 1) >= model.first_k_dense_replace
        for row in layer_rows(model, moe):
            numbers = range(model.n_routed_experts) if "{e}" in row.theirs else (None,)
            for e in numbers:
                name = theirs + (row.theirs if e is None else row.theirs.format(e=e))
                found.append(_weight(row, name, ours + row.ours, sizes, e))
    return (*found, norm, head)


def layer_rows(model: Model, moe: bool) -> tuple[Row, ...]:
    """The lines of the table that one transformer layer has."""
    attention = ATTENTION + (QUERY if model.q_lora_rank is None else QUERY_LATENT)
    if not moe:
        return attention + DENSE
    bias = BIAS if model.scoring_func == "sigmoid" else ()
    return attention + MOE + bias + EXPERT + (SHARED_EXPERTS if model.n_shared_experts else ())


def _sizes(m: Model) -> dict[str, int]:
    heads = m.num_attention_heads
    return {
        "vocabulary": m.vocab_size,
        "hidden": m.hidden_size,
        "hidden*2": 2 * m.hidden_size,
        "q_latent": m.q_lora_rank or 0,
        "query": heads * (m.qk_nope_head_dim + m.qk_rope_head_dim),
        "kv_latent": m.kv_lora_rank,
        "kv_a": m.kv_lora_rank + m.qk_rope_head_dim,
        "kv_b": heads * (m.qk_nope_head_dim + m.v_head_dim),
        "value": heads * m.v_head_dim,
        "ffn": m.intermediate_size,
        "experts": m.n_routed_experts,
        "expert": m.moe_intermediate_size,
        "shared": m.n_shared_experts * m.moe_intermediate_size,
    }


def _weight(row: Row, name: str, key: str, sizes: dict[str, int], expert: int | None = None) -> Weight:
    shape = tuple(sizes[word] for word in row.shape.split())
    key_shape, offset = shape, (0,) * len(shape)
    if row.part:
        rows, *rest = shape
        key_shape = (2 * rows, *rest)
        offset = (rows if row.part == "up" else 0, *offset[1:])
    if expert is not None:
        key_shape, offset = (sizes["experts"], *key_shape), (expert, *offset)
    return Weight(name, shape, key, key_shape, offset, row.stored, bool(row.copy))
