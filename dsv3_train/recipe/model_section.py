"""The recipe's section `model`: the architecture."""

from __future__ import annotations

from typing import Literal, Union

from pydantic import Field

from dsv3_train.recipe import ranges
from dsv3_train.recipe.section import Section


class RopeScaling(Section):
    """YaRN on the decoupled key (technical report, section 4.3); absent in 4K pre-training."""

    factor: float = Field(ge=1.0, le=1e4)
    """s: context extension factor (40 in the report)."""
    original_max_position_embeddings: ranges.Positions = 4096
    beta_fast: float = Field(default=32.0, ge=1e-3, le=1e6)
    """Rotations over the original context beyond which a frequency stays; its logarithm is taken."""
    beta_slow: float = Field(default=1.0, ge=1e-3, le=1e6)
    """Those below which a frequency is divided by `factor` in full."""
    mscale: float = Field(default=1.0, ge=0, le=100)
    mscale_all_dim: float = Field(default=1.0, ge=0, le=100)


class Model(Section):
    """The architecture, under the names of the published `config.json`."""

    vocab_size: ranges.Vocabulary
    hidden_size: ranges.Width
    num_hidden_layers: int = Field(gt=0, le=1000)
    """Transformer layers of the main model, without the MTP modules."""
    num_attention_heads: ranges.Width
    intermediate_size: ranges.Width
    """Width of a dense FFN."""
    moe_intermediate_size: ranges.Width
    """Width of one expert, routed or shared."""
    first_k_dense_replace: int = Field(ge=0, le=1000)
    """The first layers, whose FFN is dense."""
    n_routed_experts: ranges.Experts
    n_shared_experts: int = Field(ge=0, le=1 << 10)
    num_experts_per_tok: ranges.Experts
    n_group: ranges.Experts
    """Groups of experts; a token's experts come from `topk_group` of them."""
    topk_group: ranges.Experts
    routed_scaling_factor: ranges.RoutedScale = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Of the router: `sigmoid`, selected scores normalised and the choice biased (DeepSeek-V3); or `softmax` over all
    experts without either (DeepSeek-V2-Lite), which converts and generates but does not train here."""
    q_lora_rank: Union[ranges.Width, None]
    """Width of the query latent; null: no query compression (as DeepSeek-V2-Lite)."""
    kv_lora_rank: ranges.Width
    qk_nope_head_dim: ranges.Width
    qk_rope_head_dim: ranges.Width
    v_head_dim: ranges.Width
    num_nextn_predict_layers: int = Field(ge=0, le=100)
    """Multi-Token Prediction depth."""
    rms_norm_eps: ranges.NormEpsilon = 1e-6
    initializer_range: ranges.Spread = 0.006
    rope_theta: ranges.RopeBase = 10000.0
    rope_scaling: Union[RopeScaling, None] = None
    """null: plain RoPE, as in the report's 4K pre-training."""
