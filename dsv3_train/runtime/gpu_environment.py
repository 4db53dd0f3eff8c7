"""Environment variables of a GPU run: for the processes that this program starts, and in SLURM's batch script."""

from __future__ import annotations

from dsv3_train.recipe.schema import Recipe


def gpu_environment(recipe: Recipe | None) -> dict[str, str]:
    """What is set before Megatron-core is imported; the shell's values win.

    Args:
        recipe: the run's; None where nothing trains.
    """
    chosen = {
        # Kernels start in the order of their launch: communication before compute. (Megatron's launch scripts)
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # The flight recorder: every rank's last collectives, written when one times out or the watchdog ends a rank.
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    if recipe is not None and not recipe.precision.power_of_2_scales:
        chosen["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"  # Transformer Engine's only way to ask for them
    if recipe is not None and recipe.overlaps_pairs:
        # Kernels of two streams have to start beside each other, and leave each other room.
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
        sms = recipe.pipeline.communication_sms
        names = ("NCCL_MAX_CTAS", "NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN")
        chosen |= {name: str(sms) for name in names} if sms else {}
    return chosen
