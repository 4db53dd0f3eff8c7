"""Matrices that are hard to quantise."""

from __future__ import annotations

import torch

CASES = ["normal", "outliers", "zeros", "zero tiles", "subnormal", "tiny", "huge", "6 decades per token"]


def matrix(name: str, dtype: torch.dtype) -> torch.Tensor:
    """[512, 1024], on the GPU."""
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(512, 1024, generator=generator)
    if name == "outliers":
        x[torch.rand(x.shape, generator=generator) < 1e-3] *= 1e4
    elif name == "zeros":
        x.zero_()
    elif name == "zero tiles":
        x[:128, :256] = 0
        x[200, 128:640] = 0
        x[:, 1000] = 0
    elif name == "subnormal":  # of FP32 and BF16, in whole tiles and among others
        x[:256] *= 1e-39
        x[256:, ::3] *= 1e-40
    elif name == "tiny":
        x *= 1e-30
    elif name == "huge":
        x *= 1e37
    elif name == "6 decades per token":
        x *= torch.logspace(-3, 3, 512)[torch.randperm(512, generator=generator), None]
    elif name == "not finite":
        x[3, 5], x[130, 700], x[400, 1023] = float("inf"), float("nan"), float("-inf")
    return x.to(dtype).cuda()
