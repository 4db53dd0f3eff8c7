"""The same bits every time, in the same layout."""

from __future__ import annotations

import os

_GPU_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS sums over streams in a fixed order
    "NCCL_ALGO": "Ring",  # NCCL otherwise chooses, and with it the order of sums, by what it measures
    "NCCL_PROTO": "Simple",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # attention's backward pass without atomic additions
}


def prepare(device: str) -> None:
    """Before CUDA, Transformer Engine and Megatron-core are imported; the shell's value wins."""
    if device != "cpu":
        for name, value in _GPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    import torch

    torch.use_deterministic_algorithms(True)
    # What it fills new memory with only shows reads of memory that was never written; it costs a pass over all of it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
