"""Activations in few bits, in tiles of 1 x 128 with power-of-2 scales, whose dequantising is exact in BF16.

What travels to experts and what waits for the backward pass are this (report, section 3.3.3): E4M3 in one byte a value,
or E5M6 in 12 bits; beside them one byte a tile, the exponent of its scale.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from dsv3_train.precision.formats import E4M3, E5M6, Format
from dsv3_train.precision.reference import TILE, quantise

_LENGTH = TILE[1]


@dataclass
class Tiles:
    """A tensor [t, h] of BF16 or FP32 in tiles."""

    codes: torch.Tensor
    """Bytes [t, h] of E4M3; or [t, 3 h / 2] of E5M6, the lower eight bits of all values, then the upper four, of two
    values in a byte that are half a tile apart."""
    exponents: torch.Tensor
    """Bytes [t, ceil(h / 128)]: what a code's value is multiplied by is 2^(byte - 127), as E8M0 of the OCP's MX."""
    format: Format

    def values(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantised [t, h], in `out` if it is given; exact in BF16 as in FP32."""
        width = self.codes.size(1) * 2 // 3 if self.format is E5M6 else self.codes.size(1)
        if out is None:
            out = torch.empty(self.codes.size(0), width, dtype=dtype, device=self.codes.device)
        kernels = _kernels_for(out, self.format, message=self.codes.stride(0) != self.codes.size(1))
        if kernels is not None:
            kernels.decode(self.codes, self.exponents, self.format, out)
            return out
        # BF16 has FP32's range and all bits of either format, so that nothing is rounded on the way.
        if self.format is E5M6:
            values = E5M6.decode(_unpacked(self.codes)).to(dtype)
        else:
            values = self.codes.view(torch.float8_e4m3fn).to(dtype)
        powers, whole = _powers(self.exponents, dtype), width // _LENGTH * _LENGTH
        if whole:
            values_tl, out_tl = (x[:, :whole].unflatten(1, (-1, _LENGTH)) for x in (values, out))
            torch.mul(values_tl, powers[:, : whole // _LENGTH, None], out=out_tl)
        if whole < width:
            torch.mul(values[:, whole:], powers[:, -1:], out=out[:, whole:])
        return out


def to_tiles(x_th: torch.Tensor, fmt: Format = E4M3) -> Tiles:
    """[t, h], contiguous, in tiles; E5M6 needs an even h.

    On a GPU by one kernel, or where that does not work in plain PyTorch: the same bits.
    """
    kernels = _kernels_for(x_th, fmt)
    if kernels is None:
        return _plain(x_th, fmt)
    tiles = _empty(x_th, fmt)
    kernels.encode(x_th, fmt, tiles.codes, tiles.exponents)
    return tiles


def to_message(x_th: torch.Tensor) -> torch.Tensor:
    """[t, h] as bytes [t, h + ceil(h / 128)]: codes of E4M3 and exponents, a row for each token."""
    kernels = _kernels_for(x_th, E4M3, message=True)
    if kernels is None:
        tiles = _plain(x_th, E4M3)
        return torch.cat([tiles.codes, tiles.exponents], 1)
    message = _empty_message(x_th)
    tiles = of_message(message, x_th.size(1))
    kernels.encode(x_th, E4M3, tiles.codes, tiles.exponents)
    return message


def of_message(message: torch.Tensor, width: int) -> Tiles:
    """What `to_message` made of tokens of `width` values."""
    return Tiles(message[:, :width], message[:, width:], E4M3)


def _plain(x_th: torch.Tensor, fmt: Format) -> Tiles:
    done = quantise(x_th, TILE, fmt, power_of_2=True)
    codes = _packed(done.codes_mk) if fmt is E5M6 else done.codes_mk.view(torch.uint8)
    # 2^-127, the inverse of BF16's largest power of 2, is subnormal: its exponent field is 0, as its byte has to be.
    exponents = (done.scale_inverse.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return Tiles(codes, exponents, fmt)


def _empty(x_th: torch.Tensor, fmt: Format) -> Tiles:
    rows, width = x_th.shape
    codes = x_th.new_empty(rows, width if fmt is E4M3 else width * 3 // 2, dtype=torch.uint8)
    return Tiles(codes, x_th.new_empty(rows, width // _LENGTH, dtype=torch.uint8), fmt)


def _empty_message(x_th: torch.Tensor) -> torch.Tensor:
    return x_th.new_empty(x_th.size(0), x_th.size(1) + x_th.size(1) // _LENGTH, dtype=torch.uint8)


def _kernels_for(x_th: torch.Tensor, fmt: Format, message: bool = False) -> ModuleType | None:
    """precision/kernels.py for `x_th` and its tiles, those of a message or not."""
    if not x_th.is_cuda or not x_th.numel() or x_th.size(1) % _LENGTH:
        return None
    return _checked(fmt, x_th.dtype, x_th.size(1), message)


@functools.cache
def _checked(fmt: Format, dtype: torch.dtype, width: int, message: bool) -> ModuleType | None:
    """precision/kernels.py, if what it makes of a sample here are the reference's bits.

    Of a sample for which Triton makes the same programs: one for each dtype, and for which strides are multiples of 16.
    ptxas has compiled one of these wrongly, and the others not (see kernels.py).
    """
    generator, rows = torch.Generator().manual_seed(0), 63
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-9, 9, rows)[:, None]
    x[-1, :_LENGTH] = 0.0
    x = x.to(dtype)
    expected = _plain(x, fmt)
    try:
        from dsv3_train.precision import kernels

        on_gpu, back = x.cuda(), torch.empty_like(x, device="cuda")
        got = of_message(_empty_message(on_gpu), width) if message else _empty(on_gpu, fmt)
        kernels.encode(on_gpu, fmt, got.codes, got.exponents)
        kernels.decode(got.codes, got.exponents, fmt, back)
        pairs = (got.codes, expected.codes), (got.exponents, expected.exponents), (back, expected.values(dtype))
        if not all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs):
            raise ArithmeticError(f"{fmt.name} of {dtype} has other bits than the reference")
    except Exception as error:  # no Triton, one that does not compile, or wrong numbers: all have the same remedy
        warnings.warn(f"activations in few bits go without their kernels, slower: {error!r}", stacklevel=2)
        return None
    return kernels


def _powers(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Without arithmetic on subnormal numbers, which devices may flush: 2^-127 is the one with an exponent field of 0.
    bits = exponents.to(torch.int32)
    return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32).to(dtype)


def _halves(x_th: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the whole tiles, and of the rest: what shares bytes."""
    whole = x_th.size(1) // _LENGTH * _LENGTH
    for piece, length in ((x_th[:, :whole], _LENGTH), (x_th[:, whole:], x_th.size(1) - whole)):
        if piece.size(1):
            first, second = piece.unflatten(1, (-1, 2, length // 2)).unbind(2)
            yield first.flatten(1), second.flatten(1)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """12-bit codes [t, h] in int16 -> bytes [t, 3 h / 2]."""
    codes = codes.to(torch.int32) & 0xFFF
    upper = [(first >> 8) | ((second >> 8) << 4) for first, second in _halves(codes)]
    return torch.cat([codes & 0xFF, *upper], 1).to(torch.uint8)


def _unpacked(bytes_: torch.Tensor) -> torch.Tensor:
    width = bytes_.size(1) * 2 // 3
    codes = bytes_[:, :width].to(torch.int16)
    upper, start = bytes_[:, width:].to(torch.int16), 0
    whole = width // _LENGTH * _LENGTH
    for piece, length in ((codes[:, :whole], _LENGTH), (codes[:, whole:], width - whole)):
        if piece.size(1):
            mine = upper[:, start : start + piece.size(1) // 2].unflatten(1, (-1, length // 2))
            piece.unflatten(1, (-1, 2, length // 2)).bitwise_or_(torch.stack([(mine & 0xF) << 8, (mine >> 4) << 8], 2))
            start += piece.size(1) // 2
    return codes
