"""Block-scaled FP8 in plain PyTorch: the oracle for GPU kernels. Slow, exact about its rounding, on any device.

Activations and gradients are scaled in tiles of 1 x 128, weights in blocks of 128 x 128, each by its own largest value
(report, section 3.3.2). A scale is 448 / amax in FP32, or the power of 2 below it; a tile of zeros, or with an infinity
or NaN, has scale 1 (Transformer Engine's rule, common/recipe/recipe_common.cuh). Held against its kernels
on an H200 and an H100: codes and scales are equal (tests/gpu/test_fp8_te.py, docs/fp8.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv3_train.precision.formats import E4M3, Format

TILE = (1, 128)
COLUMN_TILE = (128, 1)
BLOCK = (128, 128)
K_BLOCK = 128
"""Partial sums leave the tensor cores' accumulators for FP32 ones every so many products (report, section 3.3.2)."""
INSTRUCTION = 32
"""Products that one FP8 instruction of a Hopper tensor core adds up."""


@dataclass(frozen=True)
class Quantised:
    """A matrix in codes and scales."""

    codes_mk: torch.Tensor
    scale_inverse: torch.Tensor
    """FP32 [tiles down, tiles across]: what a code's value is multiplied by."""
    tile: tuple[int, int]
    """Rows and columns that share a scale; the last tiles may stand over."""
    format: Format

    def values(self) -> torch.Tensor:
        """What the codes stand for before scaling, FP32 [m, k]."""
        return self.format.decode(self.codes_mk)

    def dequantise(self) -> torch.Tensor:
        """FP32 [m, k]."""
        return self.values() * self.scales()

    def scales(self) -> torch.Tensor:
        """Each value's scale_inverse, FP32 [m, k]."""
        rows, columns = self.codes_mk.shape
        down = self.scale_inverse.repeat_interleave(self.tile[0], 0)[:rows]
        return down.repeat_interleave(self.tile[1], 1)[:, :columns]


def scale_of(amax: torch.Tensor, fmt: Format, power_of_2: bool, source: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The scale of tiles whose largest absolute value is `amax`, FP32.

    Args:
        power_of_2: clear the mantissa, so that scaling is exact.
        source: type of the quantised tensor, whose largest value stands in where the scale overflows FP32.
    """
    amax = amax.float()
    scale = torch.full_like(amax, fmt.largest) / amax
    scale = torch.where(scale.isinf(), torch.finfo(source).max, scale)
    if power_of_2:
        scale = (scale.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)


def quantise(
    x_mk: torch.Tensor, tile: tuple[int, int] | None = TILE, fmt: Format = E4M3, power_of_2: bool = True
) -> Quantised:
    """A matrix [m, k] of BF16 or FP32 in codes and scales; `tile` None: one scale for all of it."""
    rows, columns = x_mk.shape
    tile = tile or (rows, columns)
    x = x_mk.float()
    down, across = -(-rows // tile[0]), -(-columns // tile[1])
    padded = F.pad(x, (0, across * tile[1] - columns, 0, down * tile[0] - rows))
    amax = padded.abs().view(down, tile[0], across, tile[1]).amax(dim=(1, 3))
    scale = scale_of(amax, fmt, power_of_2, x_mk.dtype)
    spread = Quantised(x, scale, tile, fmt).scales()
    return Quantised(fmt.encode(x * spread), 1.0 / scale, tile, fmt)


def block_gemm(
    a_mk: Quantised, b_nk: Quantised, *, accumulator_bits: int | None = None, promote_every: int | None = K_BLOCK
) -> torch.Tensor:
    """a times b transposed, FP32 [m, n]: products of codes, scaled and summed in FP32 by blocks of K.

    Args:
        accumulator_bits: keep so many bits of a partial sum after each instruction, as Hopper's tensor cores do (about
            14; report, section 3.3.2); None: FP32.
        promote_every: products after which a partial sum is scaled and goes on in FP32; None: all of K.

    Raises:
        ValueError: a scale changes between two promotions.
    """
    length = a_mk.codes_mk.size(1)
    step = promote_every or length
    for operand in (a_mk, b_nk):
        if operand.tile[1] < length and operand.tile[1] % step:
            raise ValueError(f"the scales of {operand.tile} tiles change within {step} products")
    a, b = a_mk.values(), b_nk.values()
    a_scale, b_scale = a_mk.scales(), b_nk.scales()
    out = torch.zeros(a.size(0), b.size(0), device=a.device)
    for start in range(0, length, step):
        partial = _partial(a[:, start : start + step], b[:, start : start + step], accumulator_bits)
        out += partial * (a_scale[:, start, None] * b_scale[None, :, start])
    return out


def _partial(a_mk: torch.Tensor, b_nk: torch.Tensor, bits: int | None) -> torch.Tensor:
    if bits is None:
        return a_mk @ b_nk.t()
    total = torch.zeros(a_mk.size(0), b_nk.size(0), device=a_mk.device)
    for start in range(0, a_mk.size(1), INSTRUCTION):
        total = total + a_mk[:, start : start + INSTRUCTION] @ b_nk[:, start : start + INSTRUCTION].t()
        total = _truncate(total, bits)
    return total


def _truncate(x: torch.Tensor, bits: int) -> torch.Tensor:
    """FP32 with all but the `bits` leading bits of its significand cleared."""
    return (x.view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)
