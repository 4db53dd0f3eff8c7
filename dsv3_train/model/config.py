"""Recipe -> Megatron-core's configuration of the model and its parallelism."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_train.recipe.chunks import SCHEDULED
from dsv3_train.recipe.layout import layout_string
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import megatron_versions


def _leave_empty(weight: torch.Tensor) -> None:
    pass


def megatron_config(recipe: Recipe, device: str, *, inference: bool = False) -> MLATransformerConfig:
    """Megatron-core's configuration for `recipe` on `device` (`cpu`, `cuda`, or `meta` for a dry run).

    What changes over a run (MTP weight, bias update speed) is set by the training loop before every step.
    With `inference`, fusions that only training supports are off.
    """
    model, parallel = recipe.model, recipe.parallel
    on_gpu = device == "cuda"
    bf16 = recipe.precision.params == "bf16"
    params_dtype = torch.bfloat16 if bf16 else torch.float32
    dense, layers = model.first_k_dense_replace, model.num_hidden_layers
    config = MLATransformerConfig(
        deterministic_mode=recipe.runtime.deterministic,
        # Architecture
        num_layers=layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.intermediate_size,
        kv_channels=model.v_head_dim,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # model/init.py fills the weights, the same for every layout. (Not `perform_initialization=False`: local
        # layers would lose the marks of tensor-parallel weights, and with them the gradient norm.)
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        mtp_num_layers=model.num_nextn_predict_layers or None,
        mtp_loss_scaling_factor=0.0,
        # The fused kernel sums over heads in the order that Triton's autotuning finds fastest, another in each process.
        **_rope(recipe, fused=on_gpu and not inference and not recipe.runtime.deterministic),
        # Experts
        num_moe_experts=model.n_routed_experts,
        moe_layer_freq=[0] * dense + [1] * (layers - dense),
        moe_ffn_hidden_size=model.moe_intermediate_size,
        moe_shared_expert_intermediate_size=model.n_shared_experts * model.moe_intermediate_size or None,
        moe_router_topk=model.num_experts_per_tok,
        moe_router_num_groups=model.n_group if model.n_group > 1 else None,
        moe_router_group_topk=model.topk_group if model.n_group > 1 else None,
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_router_score_function=model.scoring_func,
        moe_router_pre_softmax=model.scoring_func == "softmax",
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=model.scoring_func == "sigmoid",
        moe_router_bias_update_rate=0.0,
        moe_router_load_balancing_type="seq_aux_loss" if recipe.schedule.balance_loss else "none",
        moe_aux_loss_coeff=recipe.schedule.balance_loss,
        moe_token_dispatcher_type="flex" if parallel.dispatcher == "deepep" else parallel.dispatcher,
        moe_enable_deepep=parallel.dispatcher == "deepep",
        **megatron_versions.deepep_sms(recipe.pipeline.communication_sms or 20),
        moe_grouped_gemm=True,
        moe_permute_fusion=on_gpu,
        # Parallelism
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        **_pipeline(recipe),
        # Precision and memory
        bf16=bf16,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        # Megatron checks these against the TE that it finds; they add no parameters.
        **({} if device == "meta" else _fp8(recipe) | _recompute(recipe)),
        # Kernels
        transformer_impl="transformer_engine" if on_gpu else "local",
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=on_gpu and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )
    # Set afterwards: Megatron allows both for its own interleaved schedule only (transformer_config.py:1857, 1909).
    config.overlap_moe_expert_parallel_comm = recipe.overlaps_pairs
    config.delay_wgrad_compute = on_gpu and deferring(recipe)
    return config


def deferring(recipe: Recipe) -> bool:
    """Whether weight gradients are taken apart from those of inputs."""
    return recipe.pipeline.schedule in SCHEDULED and recipe.pipeline.defer_weight_gradients


def _rope(recipe: Recipe, fused: bool) -> dict:
    """Plain RoPE, unless the recipe scales it.

    Megatron's MLA defaults to YaRN with factor 40, and multiplies the softmax scale by the mscale of
    `rotary_scaling_factor` whatever the RoPE type: factor 1 makes both do nothing. The type stays `yarn`
    because the fused kernel, 6% of a step on an H200, knows no other.
    """
    scaling = recipe.model.rope_scaling
    common = {"rope_type": "yarn", "rotary_base": recipe.model.rope_theta, "apply_rope_fusion": fused}
    if scaling is None:
        return {
            **common,
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": recipe.training.sequence_length,
        }
    return {
        **common,
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }


def _pipeline(recipe: Recipe) -> dict:
    if recipe.parallel.pipeline == 1:
        return {}
    virtual = recipe.stage_count // recipe.parallel.pipeline
    return {
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "pipeline_model_parallel_layout": layout_string(recipe),
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": virtual == 1,
        "batch_p2p_sync": False,  # its wait for the device after each exchange works around an older torch
        "deallocate_pipeline_outputs": True,
    }


_TENSORWISE = {"current": "tensorwise", "delayed": "delayed"}
"""Megatron-core's names of scaling by tensor. Gradients are E5M2 there, as Transformer Engine's recipes have it."""


def _fp8(recipe: Recipe) -> dict:
    kind = recipe.precision.fp8
    if kind in ("none", "emulated"):
        return {}
    return {
        "fp8": "hybrid" if kind in _TENSORWISE else "e4m3",
        "fp8_recipe": _TENSORWISE.get(kind, kind),
        "fp8_param": recipe.precision.fp8_params,
        # Experts pad their own rows to multiples of 16. Padding by the router would send more tokens: at the report's
        # 128 a rank and expert 6% more rows on the wire, in memory and in products.
        "moe_router_padding_for_quantization": False,
    }


def _recompute(recipe: Recipe) -> dict:
    modules = recipe.training.recompute
    if not modules:
        return {}
    if modules == ["full"]:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
