"""Products of tokens with the weights of their experts: one launch for all experts, counts that stay on the GPU.

    y_t = x_t W_e(t)^T        tokens sorted by expert e; W_e: [out, in]

Weights are separate tensors, as Transformer Engine and Megatron-core's optimizers keep them, so kernels take a table
of their addresses. Weight gradients are added in FP32 where Megatron-core's data-parallel wrapper keeps them
(`main_grad`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS, _DEPTH, _BAND = 128, 256, 64, 8
"""Tile of a product and of its sum; `_BAND` tiles of rows take turns before the next tile of columns, for the cache."""


def reference(x_ti: torch.Tensor, counts_e: torch.Tensor, weights_oi: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `product` computes, in plain PyTorch: each expert's rows of [t, in] times its [out, in]^T -> [t, out]."""
    parts = x_ti.split(counts_e.tolist())
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weights_oi, strict=True)])


@dataclass(frozen=True)
class Plan:
    """Which expert's rows each tile takes, on the GPU: for all products over the same tokens."""

    ends_e: torch.Tensor
    """int32: where each expert's rows end."""
    tiles: torch.Tensor
    """int32 [tiles, 3]: expert, or -1 where no tile is needed; first row; end of the expert's rows."""

    @classmethod
    def of(cls, counts_e: torch.Tensor, rows: int) -> Plan:
        """For int64 counts per expert, `rows` in all, whatever their division."""
        experts = counts_e.numel()
        ends_e = counts_e.cumsum(0, dtype=torch.int32)
        tiles = torch.full((triton.cdiv(rows, _ROWS) + experts, 3), -1, dtype=torch.int32, device=counts_e.device)
        _routing_plan[(experts,)](ends_e, tiles, ROWS=_ROWS)
        return cls(ends_e, tiles)


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where tensors of one shape begin, int64 on their device. They have to be contiguous."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("a weight is not contiguous")
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(tensors[0].device)


def fits(out: int, inner: int) -> bool:
    """Whether the kernels take weights of [out, inner]: whole blocks of the sum, in either direction."""
    return out % _DEPTH == 0 and inner % _DEPTH == 0


def product(x_ti: torch.Tensor, plan: Plan, table_e: torch.Tensor, out: int, *, transposed: bool) -> torch.Tensor:
    """BF16 [t, i] times each expert's BF16 weight -> [t, `out`].

    Args:
        table_e: addresses of the weights.
        transposed: weights are [i, out]; else [out, i].
    """
    rows, depth = x_ti.shape
    y_to = x_ti.new_empty(rows, out)
    tiles = plan.tiles.size(0)
    _grouped_gemm_bf16[(tiles * triton.cdiv(out, _COLUMNS),)](
        x_ti, table_e, y_to, plan.tiles, tiles, depth, out,
        TRANSPOSED=transposed, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, BAND=_BAND, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y_to


def add_weight_gradients(gradient_to: torch.Tensor, x_ti: torch.Tensor, plan: Plan, table_e: torch.Tensor) -> None:
    """Add each expert's rows of [t, out]^T [t, in] to the FP32 [out, in] at the addresses of `table_e`."""
    out, inner = gradient_to.size(1), x_ti.size(1)
    grid = (triton.cdiv(out, _ROWS) * triton.cdiv(inner, _COLUMNS), plan.ends_e.numel())
    _grouped_gemm_bf16_wgrad[grid](
        gradient_to, x_ti, table_e, plan.ends_e, out, inner,
        ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip


@triton.jit
def _routing_plan(ends_ptr, tiles_ptr, ROWS: tl.constexpr):
    """One program an expert: write its tiles behind those of the experts before it."""
    expert = tl.program_id(0)
    start, tile = 0, 0
    for before in range(expert):
        end = tl.load(ends_ptr + before)
        tile += tl.cdiv(end - start, ROWS)
        start = end
    end = tl.load(ends_ptr + expert)
    for first in range(start, end, ROWS):
        tl.store(tiles_ptr + 3 * tile, expert)
        tl.store(tiles_ptr + 3 * tile + 1, first)
        tl.store(tiles_ptr + 3 * tile + 2, end)
        tile += 1


@triton.jit(do_not_specialize=["tiles"])
def _grouped_gemm_bf16(
    x_ptr, table_ptr, y_ptr, tiles_ptr, tiles, depth, out,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    across = tl.cdiv(out, COLUMNS)
    band = program // (BAND * across) * BAND
    high = tl.minimum(tiles - band, BAND)
    inside = program % (BAND * across)
    tile, tile_column = band + inside % high, inside // high
    expert = tl.load(tiles_ptr + 3 * tile)
    if expert < 0:
        return
    first, end = tl.load(tiles_ptr + 3 * tile + 1), tl.load(tiles_ptr + 3 * tile + 2)
    weight_ptr = tl.multiple_of(tl.load(table_ptr + expert).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    row = first + tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    here, there = (row < end)[:, None], (column < out)[None, :]
    x_at = x_ptr + row.to(tl.int64)[:, None] * depth + inner[None, :]
    if TRANSPOSED:
        w_at = weight_ptr + inner[:, None] * out + column[None, :]
    else:
        w_at = weight_ptr + inner[:, None] + column[None, :] * depth
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(0, depth, DEPTH):
        sums = tl.dot(tl.load(x_at, here, other=0.0), tl.load(w_at, there, other=0.0), sums)
        x_at += DEPTH
        w_at += DEPTH * out if TRANSPOSED else DEPTH
    y_at = y_ptr + row.to(tl.int64)[:, None] * out + column[None, :]
    tl.store(y_at, sums.to(y_ptr.dtype.element_ty), here & there)


@triton.jit
def _grouped_gemm_bf16_wgrad(
    gradient_ptr, x_ptr, table_ptr, ends_ptr, out, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's [out, in]: a sum over the expert's tokens."""
    expert = tl.program_id(1)
    start = tl.load(ends_ptr + expert - 1, expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    down = tl.cdiv(out, ROWS)
    row = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // down * COLUMNS + tl.arange(0, COLUMNS)
    here, there = (row < out)[:, None], (column < inner)[None, :]
    token = start + tl.arange(0, DEPTH)
    g_at = gradient_ptr + token.to(tl.int64)[None, :] * out + row[:, None]
    x_at = x_ptr + token.to(tl.int64)[:, None] * inner + column[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(start, end, DEPTH):
        own = at + tl.arange(0, DEPTH) < end
        gradient = tl.load(g_at, here & own[None, :], other=0.0)
        x = tl.load(x_at, there & own[:, None], other=0.0)
        sums = tl.dot(gradient, x, sums)
        g_at += DEPTH * out
        x_at += DEPTH * inner
    main_ptr = tl.multiple_of(tl.load(table_ptr + expert).to(tl.pointer_type(tl.float32)), 16)
    to = main_ptr + row[:, None] * inner + column[None, :]
    tl.store(to, tl.load(to, here & there, other=0.0) + sums, here & there)
