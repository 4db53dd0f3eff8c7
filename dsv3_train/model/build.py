"""The model chunks of one rank: its stages, built of Transformer Engine's layers or of local ones."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_train.model import caches, routing
from dsv3_train.model.stage import Place, Stage, places
from dsv3_train.precision import dispatch
from dsv3_train.precision.emulated import BlockScaled
from dsv3_train.recipe.chunks import MIRRORED
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import megatron_versions


def build_chunks(recipe: Recipe, config: MLATransformerConfig) -> list[Stage]:
    """This rank's model chunks, by stage, with weights not yet set (see init.py).

    Needs Megatron's process groups. Parameters lie on the device that Megatron allocates on.
    """
    chunks = [build_stage(recipe, config, place) for place in places(recipe)]
    for chunk in chunks:
        if recipe.pipeline.schedule in MIRRORED and chunk.mtp_process and not chunk.pre_process:
            chunk.share_embedding(next(first for first in chunks if first.pre_process))
    return chunks


def build_stage(recipe: Recipe, config: MLATransformerConfig, place: Place) -> Stage:
    """One stage of this pipeline rank."""
    with place.view():
        return _build(recipe, config, place)


def _build(recipe: Recipe, config: MLATransformerConfig, place: Place) -> Stage:
    routing.install()
    megatron_versions.keep_query_without_norm()
    use_te = config.transformer_impl == "transformer_engine"
    options = {"use_transformer_engine": use_te, "normalization": "RMSNorm"}
    block = get_gpt_decoder_block_spec(config, vp_stage=place.virtual, **options)
    mtp = None
    if config.mtp_num_layers:
        last_layer = get_gpt_decoder_layer_specs(config, **options)[-1]
        mtp = get_gpt_mtp_block_spec(config, last_layer, use_te, vp_stage=place.virtual)
    if not use_te:
        from dsv3_train.model.local_layers import ReplicatedLinear, replace
        from dsv3_train.runtime import cpu

        cpu.use_linear(ReplicatedLinear)
        block, mtp = replace(block), replace(mtp)
    chunk = Stage(
        config,
        block,
        vocab_size=recipe.model.vocab_size,
        max_sequence_length=recipe.training.sequence_length,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=mtp,
        place=place,
    )
    _set_latent_norms(chunk)
    if recipe.precision.fp8 == "emulated":
        from dsv3_train.model.local_layers import set_arithmetic

        set_arithmetic(chunk, BlockScaled(recipe.precision.power_of_2_scales))
    caches.install(chunk, recipe.precision)
    if use_te:
        from dsv3_train.model import operators, resident_experts  # Triton is not everywhere

        operators.install()
        if not recipe.precision.fp8_dispatch:
            resident_experts.install(chunk, config)
    if recipe.precision.fp8_dispatch:
        dispatch.install(chunk)
    for name, parameter in chunk.named_parameters():
        if ".experts." in name and ".shared_experts." not in name:
            # Megatron keeps experts with the other parameters when EP is 1, and in an optimizer of their own
            # otherwise; always apart, an optimizer state moves between any two expert-parallel sizes.
            parameter.allreduce = False
        if place.replica and not recipe.parallel.zero1:
            parameter.shared = True  # Megatron's gradient norm counts each stage once
    return chunk


def _set_latent_norms(chunk: Stage) -> None:
    """DeepSeek's code norms MLA's latents with eps 1e-6 whatever `rms_norm_eps` is, and Moonlight's is 1e-5."""
    for attention in chunk.modules():
        if isinstance(attention, MLASelfAttention):
            # Norms of their own in local layers; inside the linear layer that follows in TE's.
            for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                if hasattr(getattr(attention, name, None), "eps"):
                    getattr(attention, name).eps = 1e-6


def in_training_precision(chunk: Stage, config: MLATransformerConfig):
    """The chunk as it trains: BF16 with FP32 inputs and outputs at the ends of the pipeline, or FP32 as it is.

    The tokens that each expert got are counted in FP32. Megatron-core casts those counts with everything else, takes
    routing biases back to FP32 and leaves the counts: added up over micro-batches and ranks in BF16 they stand still
    from some thousands on, and biases move the wrong way (tests/test_routing.py).
    """
    if not config.bf16:
        return chunk
    wrapped = Float16Module(config, chunk)
    for module in chunk.modules():
        if getattr(module, "local_tokens_per_expert", None) is not None:
            module.local_tokens_per_expert = module.local_tokens_per_expert.float()
    return wrapped
