"""Speed and memory as the log reports them."""

from __future__ import annotations

import re

import psutil
import torch

from dsv3_train.planner.flops import flops_per_token
from dsv3_train.recipe.schema import Recipe

_PEAK_BF16_TFLOPS = {"H100": 989, "H800": 989, "H200": 989, "A100": 312, "A800": 312, "B200": 2250}
"""Dense BF16 peak of SXM parts, from the vendor's data sheets."""

CONVENTION = (
    "TFLOPS: Megatron's model FLOPs, causal attention, MTP included, recomputation not; MFU: over the dense BF16 peak"
)


def peak_bf16_tflops(gpu_name: str) -> float | None:
    """Dense BF16 TFLOPS of a GPU by the name that its driver gives, as `NVIDIA H100 80GB HBM3`; None if not known."""
    words = set(re.split(r"[ -]", gpu_name))
    if words & {"H100", "H200", "H800"} and words & {"PCIe", "NVL"}:  # slower parts of the same name
        return None
    return next((peak for part, peak in _PEAK_BF16_TFLOPS.items() if part in words), None)


class Speed:
    """Turns tokens per second into TFLOPS and MFU, on GPUs."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self._flops = flops_per_token(recipe.model, recipe.training.sequence_length, mtp=True)
        self._gpus = recipe.parallel.world_size if device == "cuda" else 0
        self.peak_tflops = peak_bf16_tflops(torch.cuda.get_device_name()) if self._gpus else None

    def of(self, tokens_per_second: float) -> dict[str, float | None]:
        """The speed and memory fields of a StepRecord."""
        if not self._gpus:
            return {"memory_gib": psutil.Process().memory_info().rss / 2**30}
        tflops = tokens_per_second * self._flops / self._gpus / 1e12
        return {
            "tflops_per_gpu": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
