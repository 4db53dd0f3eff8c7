"""Environment variables of a GPU run: for the processes that this program starts, and in SLURM's batch script."""

from __future__ import annotations

import os

from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Recipe

_FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""Transformer Engine's only way to ask for scales that are not powers of 2; read as set if it is 1."""


def gpu_environment(recipe: Recipe | None) -> dict[str, str]:
    """What is set before Megatron-core is imported; the shell's values win, where they do not change numbers.

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
        chosen[_FP32_SCALES] = "1"
    if recipe is not None and recipe.overlaps_pairs:
        # Kernels of two streams have to start beside each other, and leave each other room.
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
        sms = recipe.pipeline.communication_sms
        names = ("NCCL_MAX_CTAS", "NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN")
        chosen |= {name: str(sms) for name in names} if sms else {}
    return chosen


def refuse_other_scales(recipe: Recipe) -> None:
    """The shell must not choose the scales of FP8 that the recipe chooses.

    Raises:
        UserError: it does.
    """
    said, wanted = os.environ.get(_FP32_SCALES), recipe.precision.power_of_2_scales
    if recipe.precision.fp8 == "blockwise" and said is not None and (said == "1") == wanted:
        raise UserError(
            f"{_FP32_SCALES}={said} in the environment and precision.power_of_2_scales={str(wanted).lower()} in the "
            f"recipe ask for different FP8: unset the variable, or set the key to {str(not wanted).lower()}"
        )
