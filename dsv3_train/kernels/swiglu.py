"""SwiGLU, with or without each token's gate, forward and backward in one kernel each.

    y = silu(gate) * up * p        gate and up: the two halves of a row; p: the token's gate, 1 where there is none

Arithmetic is FP32; each tensor is read and written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_ROWS, _COLUMNS = 16, 128


def reference(x_tf: torch.Tensor, probs_t1: torch.Tensor | None = None) -> torch.Tensor:
    """What `swiglu` computes, in plain PyTorch."""
    gate, up = x_tf.float().chunk(2, dim=-1)
    y = F.silu(gate) * up
    return (y if probs_t1 is None else y * probs_t1.float()).to(x_tf.dtype)


def swiglu(x_tf: torch.Tensor, probs_t1: torch.Tensor | None = None) -> torch.Tensor:
    """[..., 2 f] of BF16 or FP32, gates before ups, and FP32 or BF16 probabilities [tokens, 1] or None -> [..., f]."""
    return _Swiglu.apply(x_tf, probs_t1)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tf, probs_t1):
        ctx.save_for_backward(x_tf, probs_t1)
        out = x_tf.new_empty(*x_tf.shape[:-1], x_tf.size(-1) // 2)
        rows = out.numel() // out.size(-1)
        _swiglu_forward[(triton.cdiv(rows, _ROWS),)](
            x_tf.contiguous(), out if probs_t1 is None else probs_t1.contiguous(), out, rows, out.size(-1),
            WEIGHTED=probs_t1 is not None, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, gradient_tf):
        x_tf, probs_t1 = ctx.saved_tensors
        back = torch.empty_like(x_tf, memory_format=torch.contiguous_format)
        of_probs = None if probs_t1 is None else torch.empty_like(probs_t1, memory_format=torch.contiguous_format)
        width = back.size(-1) // 2
        rows = back.numel() // back.size(-1)
        _swiglu_backward[(triton.cdiv(rows, _ROWS),)](
            x_tf.contiguous(), back if probs_t1 is None else probs_t1.contiguous(), gradient_tf.contiguous(), back,
            back if of_probs is None else of_probs, rows, width,
            WEIGHTED=probs_t1 is not None, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return back, of_probs


@triton.jit(do_not_specialize=["rows"])
def _swiglu_forward(
    x_ptr, probs_ptr, out_ptr, rows, width, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(probs_ptr + row, row < rows, other=0.0).to(tl.float32)[:, None] if WEIGHTED else 1.0
    start = row.to(tl.int64)[:, None] * width
    for at in range(0, width, COLUMNS):
        column = at + tl.arange(0, COLUMNS)[None, :]
        there = (row < rows)[:, None] & (column < width)
        gate = tl.load(x_ptr + 2 * start + column, there, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + 2 * start + width + column, there, other=0.0).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up * weight
        tl.store(out_ptr + start + column, y.to(out_ptr.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward(
    x_ptr, probs_ptr, gradient_ptr, back_ptr, of_probs_ptr, rows, width,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(probs_ptr + row, row < rows, other=0.0).to(tl.float32)[:, None] if WEIGHTED else 1.0
    start = row.to(tl.int64)[:, None] * width
    of_weight = tl.zeros([ROWS], tl.float32)
    for at in range(0, width, COLUMNS):
        column = at + tl.arange(0, COLUMNS)[None, :]
        there = (row < rows)[:, None] & (column < width)
        gate = tl.load(x_ptr + 2 * start + column, there, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + 2 * start + width + column, there, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + start + column, there, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WEIGHTED:
            of_weight += tl.sum(gradient * silu * up, 1)
        weighted = gradient * weight
        of_gate = weighted * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(back_ptr + 2 * start + column, of_gate.to(back_ptr.dtype.element_ty), there)
        tl.store(back_ptr + 2 * start + width + column, (weighted * silu).to(back_ptr.dtype.element_ty), there)
    if WEIGHTED:
        tl.store(of_probs_ptr + row, of_weight.to(of_probs_ptr.dtype.element_ty), row < rows)
