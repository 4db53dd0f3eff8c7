"""Speed and memory as the log reports them."""

from __future__ import annotations

import re
import time

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
    if "MIG" in words or (words & {"H100", "H200", "H800"} and words & {"PCIe", "NVL"}):  # slices; slower parts
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


class StepClock:
    """Where the time of one step goes, in seconds; waits for the device at each mark."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = self._last = time.perf_counter()
        self.phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """What went by since the last mark was `phase`."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.phases[phase] = now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """All of the step so far."""
        return self._last - self._start
