"""The recipe's section `model`: the architecture."""

from __future__ import annotations

from typing import Literal, Union

from pydantic import Field, PositiveInt

from dsv3_train.recipe.section import Section


class RopeScaling(Section):
    """YaRN on the decoupled key (technical report, section 4.3); absent in 4K pre-training."""

    factor: float = Field(ge=1.0)
    """s: context extension factor (40 in the report)."""
    original_max_position_embeddings: PositiveInt = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class Model(Section):
    """The architecture, under the names of the published `config.json`."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: int = Field(gt=0, le=1000)
    """Transformer layers of the main model, without the MTP modules."""
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    """Width of a dense FFN."""
    moe_intermediate_size: PositiveInt
    """Width of one expert, routed or shared."""
    first_k_dense_replace: int = Field(ge=0)
    """The first layers, whose FFN is dense."""
    n_routed_experts: PositiveInt
    n_shared_experts: int = Field(ge=0)
    num_experts_per_tok: PositiveInt
    n_group: PositiveInt
    """Groups of experts; a token's experts come from `topk_group` of them."""
    topk_group: PositiveInt
    routed_scaling_factor: float = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Of the router: `sigmoid`, selected scores normalised and the choice biased (DeepSeek-V3); or `softmax` over all
    experts without either (DeepSeek-V2-Lite), which converts and generates but does not train here."""
    q_lora_rank: Union[PositiveInt, None]
    """Width of the query latent; null: no query compression (as DeepSeek-V2-Lite)."""
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    num_nextn_predict_layers: int = Field(ge=0, le=100)
    """Multi-Token Prediction depth."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = Field(default=0.006, gt=0)
    rope_theta: float = 10000.0
    rope_scaling: Union[RopeScaling, None] = None
    """null: plain RoPE, as in the report's 4K pre-training."""
