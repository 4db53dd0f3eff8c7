"""Tiles made and read in one pass on a GPU, in Triton: the bits of precision/reference.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dsv3_train.precision.formats import E4M3, E5M6, Format

_ROWS = 32
"""Of a program, each with its tile of 128."""
_ANY_ROWS = triton.jit(do_not_specialize=["rows"])
"""One program for any number of tokens, where Triton would compile more for 1 and for multiples of 16."""


@triton.jit
def _scale_field(amax, LARGEST: tl.constexpr):
    """Exponent field of LARGEST / amax; of 1 for a tile of zeros or with what is not finite."""
    field = tl.div_rn(tl.full(amax.shape, LARGEST, tl.float32), amax).to(tl.int32, bitcast=True) >> 23
    field = tl.where(field == 255, 254, field)  # more than FP32 has: its largest power of 2
    return tl.where((amax > 0) & (amax < float("inf")), field, 127)


@triton.jit
def _largest(x):
    """Of absolute values in each row; infinity where there is a NaN, which no maximum has to keep."""
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)


@triton.jit
def _power(field):
    """2^(field - 127), FP32; of a field of 0 the subnormal 2^-127."""
    return tl.where(field == 0, 1 << 22, field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(y, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, LARGER: tl.constexpr):
    """The nearest values of a format, as `Format.round`."""
    y = tl.where(y > LARGEST, LARGEST, tl.where(y < -LARGEST, -LARGEST, y))
    power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    larger = tl.maximum(power, SMALLEST) * LARGER
    return (y + larger) - larger


@triton.jit
def _code(y, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, MANTISSA: tl.constexpr, NAN: tl.constexpr):
    """Of FP32 values the nearest codes without their signs, int32; SMALLEST is the format's smallest normal value.

    In 32 bits throughout: a cast to FP8 or FP16 leaves halves of registers that nothing writes, and ptxas (12.8.93)
    took the wrong one for a code.
    """
    rounded = tl.abs(_rounded(y, LARGEST, SMALLEST, 1.5 * (1 << (23 - MANTISSA))))
    below = tl.full(y.shape, SMALLEST, tl.float32).to(tl.int32, bitcast=True) - (1 << 23)  # code 0, were it normal
    normal = (rounded.to(tl.int32, bitcast=True) - below) >> (23 - MANTISSA)
    subnormal = (rounded * ((1 << MANTISSA) / SMALLEST)).to(tl.int32)
    return tl.where(y != y, NAN, tl.where(rounded < SMALLEST, subnormal, normal))


@triton.jit
def _value(code, SMALLEST: tl.constexpr, MANTISSA: tl.constexpr, NAN: tl.constexpr):
    """The other way; codes from NAN on are NaN."""
    below = tl.full(code.shape, SMALLEST, tl.float32).to(tl.int32, bitcast=True) - (1 << 23)
    normal = ((code << (23 - MANTISSA)) + below).to(tl.float32, bitcast=True)
    value = tl.where(code < (1 << MANTISSA), code.to(tl.float32) * (SMALLEST / (1 << MANTISSA)), normal)
    return tl.where(code >= NAN, float("nan"), value)


@triton.jit
def _sign(x, at: tl.constexpr):
    """FP32's sign as that bit of an int32."""
    return ((x.to(tl.int32, bitcast=True) >> 31) & 1) << at


@triton.jit
def _e4m3(y):
    """Codes of FP32 values, int32 (`Format.encode`)."""
    return _code(y, 448.0, 0.015625, 3, 0x7F) | _sign(y, 7)


@triton.jit
def _of_e4m3(codes):
    return _signed(_value(codes & 0x7F, 0.015625, 3, 0x7F), codes >> 7)


@triton.jit
def _e5m6(y):
    """12-bit codes of FP32 values, int32."""
    return _code(y, 65024.0, 6.103515625e-05, 6, 0x7E0) | _sign(y, 11)


@triton.jit
def _of_e5m6(codes):
    return _signed(_value(codes & 0x7FF, 6.103515625e-05, 6, 0x7E0), codes >> 11)


@triton.jit
def _signed(x, sign):
    return (x.to(tl.int32, bitcast=True) | (sign << 31)).to(tl.float32, bitcast=True)


@_ANY_ROWS
def _encode_e4m3(x_ptr, codes_ptr, exponents_ptr, rows, width, codes_stride, exponents_stride, ROWS: tl.constexpr):
    row, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    at = row[:, None].to(tl.int64) * width + tile * 128 + tl.arange(0, 128)[None, :]
    there = (row < rows)[:, None]
    x = tl.load(x_ptr + at, there, other=0.0).to(tl.float32)
    field = _scale_field(_largest(x), 448.0)
    to = row[:, None].to(tl.int64) * codes_stride + tile * 128 + tl.arange(0, 128)[None, :]
    tl.store(codes_ptr + to, _e4m3(x * _power(field)[:, None]).to(tl.uint8), there)
    tl.store(exponents_ptr + row.to(tl.int64) * exponents_stride + tile, (254 - field).to(tl.uint8), row < rows)


@_ANY_ROWS
def _encode_e5m6(x_ptr, codes_ptr, exponents_ptr, rows, width, codes_stride, exponents_stride, ROWS: tl.constexpr):
    row, tile, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, 64)
    at = row[:, None].to(tl.int64) * width + tile * 128 + column[None, :]
    there = (row < rows)[:, None]
    first = tl.load(x_ptr + at, there, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + 64, there, other=0.0).to(tl.float32)
    field = _scale_field(tl.maximum(_largest(first), _largest(second)), 65024.0)
    power = _power(field)[:, None]
    one, other = _e5m6(first * power), _e5m6(second * power)
    start = row[:, None].to(tl.int64) * codes_stride
    lower, upper = start + tile * 128 + column[None, :], start + width + tile * 64 + column[None, :]
    tl.store(codes_ptr + lower, (one & 0xFF).to(tl.uint8), there)
    tl.store(codes_ptr + lower + 64, (other & 0xFF).to(tl.uint8), there)
    tl.store(codes_ptr + upper, ((one >> 8) | ((other >> 8) << 4)).to(tl.uint8), there)
    tl.store(exponents_ptr + row.to(tl.int64) * exponents_stride + tile, (254 - field).to(tl.uint8), row < rows)


@_ANY_ROWS
def _decode_e4m3(codes_ptr, exponents_ptr, out_ptr, rows, width, codes_stride, exponents_stride, ROWS: tl.constexpr):
    row, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    at = row[:, None].to(tl.int64) * width + tile * 128 + tl.arange(0, 128)[None, :]
    there = (row < rows)[:, None]
    field = tl.load(exponents_ptr + row.to(tl.int64) * exponents_stride + tile, row < rows, other=127).to(tl.int32)
    of = row[:, None].to(tl.int64) * codes_stride + tile * 128 + tl.arange(0, 128)[None, :]
    codes = tl.load(codes_ptr + of, there, other=0).to(tl.int32)
    values = _of_e4m3(codes) * _power(field)[:, None]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), there)


@_ANY_ROWS
def _decode_e5m6(codes_ptr, exponents_ptr, out_ptr, rows, width, codes_stride, exponents_stride, ROWS: tl.constexpr):
    row, tile, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, 64)
    there = (row < rows)[:, None]
    field = tl.load(exponents_ptr + row.to(tl.int64) * exponents_stride + tile, row < rows, other=127).to(tl.int32)
    power = _power(field)[:, None]
    start = row[:, None].to(tl.int64) * codes_stride
    lower, upper = start + tile * 128 + column[None, :], start + width + tile * 64 + column[None, :]
    above = tl.load(codes_ptr + upper, there, other=0).to(tl.int32)
    one = tl.load(codes_ptr + lower, there, other=0).to(tl.int32) | ((above & 0xF) << 8)
    other = tl.load(codes_ptr + lower + 64, there, other=0).to(tl.int32) | ((above >> 4) << 8)
    at = row[:, None].to(tl.int64) * width + tile * 128 + column[None, :]
    tl.store(out_ptr + at, (_of_e5m6(one) * power).to(out_ptr.dtype.element_ty), there)
    tl.store(out_ptr + at + 64, (_of_e5m6(other) * power).to(out_ptr.dtype.element_ty), there)


_ENCODE, _DECODE = {E4M3: _encode_e4m3, E5M6: _encode_e5m6}, {E4M3: _decode_e4m3, E5M6: _decode_e5m6}


def encode(x_th: torch.Tensor, fmt: Format, codes: torch.Tensor, exponents: torch.Tensor) -> None:
    """BF16 or FP32 [t, h], contiguous, h a multiple of 128, into `codes` and `exponents` of `tiles.Tiles`.

    Rows of these may lie apart.
    """
    _run(_ENCODE[fmt], x_th, codes, exponents, x_th)


def decode(codes: torch.Tensor, exponents: torch.Tensor, fmt: Format, out_th: torch.Tensor) -> None:
    """The other way, into `out_th` [t, h] of BF16 or FP32, contiguous."""
    _run(_DECODE[fmt], codes, exponents, out_th, out_th)


def _run(kernel: Any, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor, plain_th: torch.Tensor) -> None:
    rows, width = plain_th.shape
    codes, exponents = (second, third) if plain_th is first else (first, second)
    grid = (triton.cdiv(rows, _ROWS), width // 128)
    kernel[grid](first, second, third, rows, width, codes.stride(0), exponents.stride(0), _ROWS)
