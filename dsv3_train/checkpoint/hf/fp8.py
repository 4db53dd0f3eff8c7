"""Weights as the published files store them: E4M3 codes, and one FP32 scale for each 128x128 block.

Everything goes through FP32: dequantised to BF16 and back without the scales that the files had, DeepSeek-V3's
scales change by up to 0.27%.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsv3_train.checkpoint.hf.names import BLOCK

LARGEST = 448.0
"""Of E4M3's values."""
_SAFE = 2.0**100
"""Scales between 1 / this and this bring back any code, whether values are kept in FP32 or BF16."""
_SHARE = 0.9
"""Of a tensor's blocks, how many must have the same largest code for it to be a rule: one may be clamped."""


class Rule(NamedTuple):
    """How a block's scale follows from its largest magnitude."""

    largest: float = LARGEST
    """The largest code: the scale is the largest magnitude / this (report, section 3.3.2)."""
    mantissa: float | None = None
    """Of every scale, which is the next such number from there: 0.5 for powers of two (`scale_fmt` ue8m0)."""

    def __str__(self) -> str:
        steps = {None: "", 0.5: ", up to a power of two"}
        return f"largest / {self.largest:g}" + steps.get(
            self.mantissa, f", up to {2 * (self.mantissa or 0):g} x a power of two"
        )


USUAL = Rule()


def dequantise(codes_oi: torch.Tensor, scales_bc: torch.Tensor) -> torch.Tensor:
    """[out, in] E4M3 codes and [ceil(out / 128), ceil(in / 128)] FP32 scales -> FP32 [out, in]."""
    blocks = _blocks(codes_oi.float())
    return _matrix(blocks * scales_bc[:, None, :, None], codes_oi.shape)


def quantise(
    weight_oi: torch.Tensor, rule: Rule = USUAL, kept_bc: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> E4M3 codes [out, in] and FP32 scales [ceil(out / 128), ceil(in / 128)].

    A block that is codes x its scale in `kept_bc` (FP32, as the files had it), in the type of the weight, FP32 or
    BF16, gets these codes and this scale: training left it as it came. Any other gets a scale by `rule`, 1 for a block
    of zeros.
    """
    if kept_bc is None:
        return _by_rule(weight_oi.float(), rule)
    blocks = _blocks(weight_oi.float())
    codes = _codes(blocks, kept_bc)
    as_it_came = _reproduces(blocks, codes, kept_bc, weight_oi.dtype)
    if as_it_came.all():
        return _matrix(codes, weight_oi.shape), kept_bc
    other, scales = _by_rule(weight_oi.float(), rule)
    mixed = torch.where(
        as_it_came[:, None, :, None], codes.view(torch.uint8), _blocks(other.view(torch.uint8))
    )  # torch's `where` has no FP8
    return _matrix(mixed, weight_oi.shape).view(other.dtype), torch.where(as_it_came, kept_bc, scales)


def _by_rule(weight_oi: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """FP32 [out, in] -> codes and scales.

    Of a checkpoint that has no scales from its files, what `dequantise` made comes back bit for bit all the same if
    its largest code was 448: where rounding of largest / 448 has lost the scale's last bit, the neighbour that
    reproduces every value of the block is taken.
    """
    blocks = _blocks(weight_oi)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / rule.largest, torch.ones_like(largest))
    if rule.mantissa is not None:
        mantissa, exponent = torch.frexp(scales)  # 0.5 <= mantissa < 1
        scales = torch.ldexp(torch.full_like(scales, rule.mantissa), exponent + (mantissa > rule.mantissa).int())
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


def find_rule(codes_oi: torch.Tensor, scales_bc: torch.Tensor) -> Rule | None:
    """The rule by which some rows of blocks were quantised, from their codes and scales; None: no known one.

    A scale says nothing of a block of zeros; a tensor of them has the usual rule.
    """
    if not (scales_bc >= 0).all():
        return None
    magnitudes = _blocks(codes_oi.view(torch.uint8) & 0x7F)
    tops = magnitudes.amax(dim=(1, 3)).view(codes_oi.dtype).float()
    tops = tops[tops > 0]
    mantissas = torch.frexp(scales_bc[scales_bc > 0])[0].unique()
    several = scales_bc.numel() > 1 and not (tops == LARGEST).all()  # one scale alone, and largest / 448, share none
    if len(mantissas) == 1 and (mantissas[0] == 0.5 or several):
        # The next such number leaves the largest code in the upper half of the range, both ends included.
        largest = LARGEST
        while tops.numel() and tops.max() <= largest / 2 and tops.min() < largest / 2:
            largest /= 2
        return Rule(largest, float(mantissas[0])) if (tops >= largest / 2).all() else None
    if not tops.numel():
        return USUAL
    values, counts = tops.unique(return_counts=True)
    return Rule(float(values[counts.argmax()])) if counts.max() >= _SHARE * tops.numel() else None


def lossy(scales_bc: torch.Tensor) -> torch.Tensor:
    """[block rows, block columns]: scales so small or so large (0 too) that codes may not come back through them."""
    magnitude = scales_bc.abs()
    return ~((magnitude >= 1 / _SAFE) & (magnitude <= _SAFE))


def comes_back(codes_oi: torch.Tensor, scales_bc: torch.Tensor) -> bool:
    """Whether every code does, kept in FP32 and in BF16."""
    values = dequantise(codes_oi, scales_bc)
    for kept in (values, values.bfloat16()):
        codes, scales = quantise(kept, kept_bc=scales_bc)
        if not (torch.equal(codes.view(torch.uint8), codes_oi.view(torch.uint8)) and torch.equal(scales, scales_bc)):
            return False
    return True


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
    divisors = torch.where(scales_bc == 0, torch.ones_like(scales_bc), scales_bc)  # a block of zeros may have 0
    return (blocks / divisors[:, None, :, None]).to(torch.float8_e4m3fn)


def _reproduces(
    blocks: torch.Tensor, codes: torch.Tensor, scales_bc: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[block rows, block columns]: whether codes x scales, rounded to `dtype`, are the values, bit for bit."""
    values = (codes.float() * scales_bc[:, None, :, None]).to(dtype)
    return (values == blocks).all(dim=3).all(dim=1)
