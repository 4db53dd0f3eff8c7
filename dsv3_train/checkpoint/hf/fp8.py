"""Weights as the published files store them: E4M3 codes, and one FP32 scale for each 128x128 block.

Everything goes through FP32: dequantised to BF16 and back, DeepSeek-V3's scales change by up to 0.27%.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv3_train.checkpoint.hf.names import BLOCK

LARGEST = 448.0
"""Of E4M3's values."""


def dequantise(codes_oi: torch.Tensor, scales_bc: torch.Tensor) -> torch.Tensor:
    """[out, in] E4M3 codes and [ceil(out / 128), ceil(in / 128)] FP32 scales -> FP32 [out, in]."""
    blocks = _blocks(codes_oi.float())
    return _matrix(blocks * scales_bc[:, None, :, None], codes_oi.shape)


def quantise(weight_oi: torch.Tensor, powers_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """FP32 [out, in] -> E4M3 codes [out, in] and FP32 scales [ceil(out / 128), ceil(in / 128)].

    A block's scale is its largest magnitude / 448 (report, section 3.3.2), 1 for a block of zeros. What
    `dequantise` made comes back bit for bit: where rounding of that quotient has lost the scale's last bit, the
    neighbour that reproduces every value of the block is taken. With `powers_of_two` (files whose `scale_fmt` is
    ue8m0), a scale is the next power of two.
    """
    blocks = _blocks(weight_oi)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    if powers_of_two:
        mantissa, exponent = torch.frexp(scales)  # 0.5 <= mantissa < 1
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        return _matrix(_codes(blocks, scales), weight_oi.shape), scales
    codes = _codes(blocks, scales)
    row = blocks[:, :1]
    for towards in (torch.inf, 0.0):
        neighbours = torch.nextafter(scales, torch.full_like(scales, towards))
        # One row tells trained weights, which no scale reproduces, from those that are as they were.
        r, c = torch.nonzero((largest > 0) & _reproduces(row, _codes(row, neighbours), neighbours), as_tuple=True)
        some, scale = blocks[r, :, c][:, :, None], neighbours[r, c][:, None]  # [n, 128, 1, 128], [n, 1]
        other = _codes(some, scale)
        exact = _reproduces(some, codes.view(torch.uint8)[r, :, c][:, :, None].view(codes.dtype), scales[r, c][:, None])
        better = (~exact & _reproduces(some, other, scale))[:, 0]
        r, c = r[better], c[better]
        scales[r, c] = neighbours[r, c]
        codes.view(torch.uint8)[r, :, c] = other.view(torch.uint8)[better, :, 0]
    return _matrix(codes, weight_oi.shape), scales


def _blocks(weight_oi: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [block rows, 128, block columns, 128], zeros beyond the matrix's border."""
    rows, columns = weight_oi.shape
    padded = weight_oi
    if rows % BLOCK or columns % BLOCK:
        padded = F.pad(weight_oi, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.reshape(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)


def _matrix(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows, columns = shape
    whole = blocks.reshape(blocks.size(0) * BLOCK, blocks.size(2) * BLOCK)
    return whole[:rows, :columns].contiguous()


def _codes(blocks: torch.Tensor, scales_bc: torch.Tensor) -> torch.Tensor:
    return (blocks / scales_bc[:, None, :, None]).to(torch.float8_e4m3fn)


def _reproduces(blocks: torch.Tensor, codes: torch.Tensor, scales_bc: torch.Tensor) -> torch.Tensor:
    """[block rows, block columns]: whether codes x scales are the values, bit for bit."""
    return (codes.float() * scales_bc[:, None, :, None] == blocks).all(dim=3).all(dim=1)
