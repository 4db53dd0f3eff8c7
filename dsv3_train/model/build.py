"""The model chunks of one rank: its stages, built of Transformer Engine's layers or of local ones."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_train.recipe.schema import Recipe


def build_chunks(recipe: Recipe, config: MLATransformerConfig) -> list[GPTModel]:
    """This rank's model chunks, one per virtual stage, with weights not yet set (see init.py).

    Needs Megatron's process groups. Parameters lie on the device that Megatron allocates on.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    return [build_stage(recipe, config, vp_stage if virtual else None) for vp_stage in range(virtual or 1)]


def build_stage(recipe: Recipe, config: MLATransformerConfig, vp_stage: int | None) -> GPTModel:
    """One stage of this pipeline rank."""
    use_te = config.transformer_impl == "transformer_engine"
    options = {"use_transformer_engine": use_te, "normalization": "RMSNorm"}
    block = get_gpt_decoder_block_spec(config, vp_stage=vp_stage, **options)
    mtp = None
    if config.mtp_num_layers:
        last_layer = get_gpt_decoder_layer_specs(config, **options)[-1]
        mtp = get_gpt_mtp_block_spec(config, last_layer, use_te, vp_stage=vp_stage)
    if not use_te:
        from dsv3_train.model.local_layers import ReplicatedLinear, replace
        from dsv3_train.runtime import cpu

        cpu.use_linear(ReplicatedLinear)
        block, mtp = replace(block), replace(mtp)
    chunk = GPTModel(
        config,
        block,
        vocab_size=recipe.model.vocab_size,
        max_sequence_length=recipe.training.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=mtp,
        vp_stage=vp_stage,
    )
    for name, parameter in chunk.named_parameters():
        if ".experts." in name and ".shared_experts." not in name:
            # Megatron keeps experts with the other parameters when EP is 1, and in an optimizer of their own
            # otherwise; always apart, an optimizer state moves between any two expert-parallel sizes.
            parameter.allreduce = False
    return chunk


def in_training_precision(chunk: GPTModel, config: MLATransformerConfig):
    """The chunk as it trains: BF16 with FP32 inputs and outputs at the ends of the pipeline, or FP32 as it is."""
    return Float16Module(config, chunk) if config.bf16 else chunk
