"""Activations in few bits, in tiles of 1 x 128 with power-of-2 scales, whose dequantising is exact in BF16.

What travels to experts and what waits for the backward pass are this (report, section 3.3.3): E4M3 in one byte a value,
or E5M6 in 12 bits; beside them one byte a tile, the exponent of its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_train.precision.formats import E4M3, E5M6, Format
from dsv3_train.precision.reference import TILE, quantise

_LENGTH = TILE[1]
_BIAS = 127
"""Exponents of scales from -127 to 127 in a byte (the E8M0 of the OCP's MX formats)."""


@dataclass
class Tiles:
    """A tensor [t, h] of BF16 or FP32 in tiles."""

    codes: torch.Tensor
    """Bytes [t, h] of E4M3, or [t, 3 h / 2] of E5M6."""
    exponents: torch.Tensor
    """Bytes [t, ceil(h / 128)]: what a code's value is multiplied by is 2^(byte - 127)."""
    format: Format

    def values(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantised [t, h], in `out` if it is given; exact in BF16 as in FP32."""
        # BF16 has FP32's range and all bits of either format, so that nothing is rounded on the way.
        if self.format is E5M6:
            values = E5M6.decode(_unpacked(self.codes)).to(dtype)
        else:
            values = self.codes.view(torch.float8_e4m3fn).to(dtype)
        out = torch.empty_like(values) if out is None else out
        powers, whole = _powers(self.exponents, dtype), values.size(1) // _LENGTH * _LENGTH
        if whole:
            values_tl, out_tl = (x[:, :whole].unflatten(1, (-1, _LENGTH)) for x in (values, out))
            torch.mul(values_tl, powers[:, : whole // _LENGTH, None], out=out_tl)
        if whole < values.size(1):
            torch.mul(values[:, whole:], powers[:, -1:], out=out[:, whole:])
        return out


def to_tiles(x_th: torch.Tensor, fmt: Format = E4M3) -> Tiles:
    """[t, h] in tiles; E5M6 needs an even h.

    On a GPU, Transformer Engine's kernel makes E4M3's: the same bits (tests/gpu/test_fp8_te.py).
    """
    if x_th.is_cuda and fmt is E4M3 and x_th.numel() and x_th.size(1) % _LENGTH == 0:
        return _by_transformer_engine(x_th)
    done = quantise(x_th, TILE, fmt, power_of_2=True)
    codes = _packed(done.codes_mk) if fmt is E5M6 else done.codes_mk.view(torch.uint8)
    return Tiles(codes, _exponents(done.scale_inverse), fmt)


def _by_transformer_engine(x_th: torch.Tensor) -> Tiles:
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    quantiser = te.Float8BlockQuantizer(
        tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, force_pow_2_scales=True, block_scaling_dim=1
    )
    done = quantiser(x_th).get_metadata()
    scales = done["rowwise_scale_inv"][:, : x_th.size(0)].t()  # its rows are tiles, its columns padded tokens
    return Tiles(done["rowwise_data"], _exponents(scales), E4M3)


def _exponents(scale_inverse: torch.Tensor) -> torch.Tensor:
    """Of powers of 2, FP32, the byte of `Tiles.exponents`."""
    # 2^-127, the inverse of BF16's largest power of 2, is subnormal: its exponent field is 0, as its byte has to be.
    return (scale_inverse.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def _powers(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Without arithmetic on subnormal numbers, which devices may flush: 2^-127 is the one with an exponent field of 0.
    bits = exponents.to(torch.int32)
    return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32).to(dtype)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """12-bit codes [t, h] in int16 -> bytes [t, 3 h / 2]: of each two, the lower eights, then the upper fours."""
    first, second = (codes.to(torch.int32) & 0xFFF).unflatten(1, (-1, 2)).unbind(2)
    upper = (first >> 8) | ((second >> 8) << 4)
    return torch.stack([first & 0xFF, second & 0xFF, upper], 2).to(torch.uint8).flatten(1)


def _unpacked(bytes_: torch.Tensor) -> torch.Tensor:
    first, second, upper = bytes_.unflatten(1, (-1, 3)).to(torch.int16).unbind(2)
    return torch.stack([first | ((upper & 0xF) << 8), second | ((upper >> 4) << 8)], 2).flatten(1)
