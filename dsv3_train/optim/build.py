"""Wrapping model chunks for data parallelism, and the optimizer over them."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_train.optim import gather
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.pipeline_groups import replicas


def wrap_chunks(recipe: Recipe, config: MLATransformerConfig, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Megatron's data-parallel wrappers: gradients accumulate and reduce in FP32 (report, section 3.3.2)."""
    parallel = recipe.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.zero1,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=recipe.precision.fp8_params,
        check_for_nan_in_grad=False,  # it ends the run; training/guard.py passes the batch over
        delay_wgrad_compute=config.delay_wgrad_compute,
    )
    if config.transformer_impl == "transformer_engine":
        # Each micro-batch's weight gradients are added in FP32 as they are computed. Megatron's option for that wants
        # apex, for its own linears (here the output head); Transformer Engine's need nothing but these wrappers.
        for layer in (layer for chunk in chunks for layer in chunk.modules()):
            if hasattr(layer, "fuse_wgrad_accumulation"):
                layer.fuse_wgrad_accumulation = True
    copies = replicas()
    groups = copies.groups if copies else None
    return [
        # Buckets only pay in the first chunk: the others' reductions hide behind its backward pass.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0, pg_collection=groups)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(recipe: Recipe, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW (report, section 4.2) with FP32 master weights; no weight decay on norms and other vectors."""
    optim, bf16, copies = recipe.optim, recipe.precision.params == "bf16", replicas()
    options = {}
    if recipe.precision.adam_moments == "bf16":
        options = {
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16,
            "store_param_remainders": False,
        }
    if not torch.cuda.is_available():
        from dsv3_train.optim.adamw import AdamW
        from dsv3_train.runtime import cpu

        cpu.use_adam(AdamW)
    else:
        from dsv3_train.optim import gpu_adamw

        # Master weights of FP8 parameters have a way of their own into Transformer Engine's.
        gpu_adamw.use(not recipe.precision.fp8_params)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.0,  # set before every step
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad_norm,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=recipe.parallel.zero1,
            fp8_recipe="blockwise" if recipe.precision.fp8_params else None,
            overlap_param_gather=recipe.parallel.overlap_param_gather,
            **options,
        ),
        chunks,
        # Megatron's Gloo groups gather optimizer states for a kind of checkpoint that is not ours.
        **({"pg_collection": copies.groups, "use_gloo_process_groups": False} if copies else {}),
    )
    gather.install(optimizer)
    return optimizer


def begin_moments(optimizer: MegatronOptimizer) -> None:
    """Zero moments where no update has made them yet, so that a checkpoint has all that a resume asks for.

    What Megatron-core's `init_state_fn` does when it loads; that one lacks an argument of Transformer Engine's where
    moments are BF16.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = one.optimizer
        for param in (param for group in adam.param_groups for param in group["params"]):
            if not adam.state[param]:
                adam.initialize_state(param, store_param_remainders=False)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and weight decay for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]
