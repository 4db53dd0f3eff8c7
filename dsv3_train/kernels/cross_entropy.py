"""Cross entropy over logits as the head gives them, without a copy of them in FP32.

    loss = log(sum_j exp(x_j)) - x_label        d loss / d x_j = exp(x_j) / sum - (1 if j is the label)

Everything is computed in FP32 from logits of any floating type. What waits for the backward pass is the logits
themselves; their gradient takes their place. So a token of V words costs 2 V bytes in BF16, where a copy in FP32 and
its gradient cost 10 V.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl

_BLOCK = 4096


def reference(logits_sbv: torch.Tensor, labels_bs: torch.Tensor) -> torch.Tensor:
    """What `cross_entropy` computes with one rank, in plain PyTorch: FP32 losses [b, s], in nats."""
    logits_bvs = logits_sbv.float().permute(1, 2, 0)
    return F.cross_entropy(logits_bvs, labels_bs, reduction="none")


def cross_entropy(
    logits_sbv: torch.Tensor, labels_bs: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """FP32 losses [b, s], in nats. The backward pass overwrites the logits with their gradient.

    Args:
        logits_sbv: [s, b, v], contiguous, BF16 or FP32; of each rank of `group` its share of the vocabulary.
        labels_bs: [b, s], int64, in the whole vocabulary.
        group: the tensor-parallel ranks; None or one rank: the logits are whole.
    """
    return _CrossEntropy.apply(logits_sbv, labels_bs, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_sbv, labels_bs, group):
        logits_sbv = logits_sbv.contiguous()
        length, batch, width = logits_sbv.shape
        several = group is not None and group.size() > 1
        first = group.rank() * width if several else 0
        largest, total, own = (torch.empty_like(labels_bs, dtype=torch.float32) for _ in range(3))
        _cross_entropy_forward[(length * batch,)](
            logits_sbv, labels_bs, largest, total, own, batch, width, first, *labels_bs.stride(), *largest.stride(),
            BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        if several:
            of_all = largest.clone()
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=group)
            total *= torch.exp(largest - of_all)
            both = torch.stack([total, own])
            dist.all_reduce(both, group=group)
            (total, own), largest = both, of_all
        log_sum = largest + total.log()
        ctx.save_for_backward(logits_sbv, labels_bs, log_sum)
        ctx.first = first
        return log_sum - own

    @staticmethod
    def backward(ctx, gradient_bs):
        logits_sbv, labels_bs, log_sum_bs = ctx.saved_tensors
        length, batch, width = logits_sbv.shape
        _cross_entropy_backward[(length * batch, triton.cdiv(width, _BLOCK))](
            logits_sbv, labels_bs, log_sum_bs, gradient_bs, batch, width, ctx.first,
            *labels_bs.stride(), *log_sum_bs.stride(), *gradient_bs.stride(),
            BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        return logits_sbv, None, None


@triton.jit(do_not_specialize=["first"])
def _cross_entropy_forward(
    logits_ptr, labels_ptr, largest_ptr, total_ptr, own_ptr, batch, width, first,
    labels_b, labels_s, out_b, out_s, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token: the largest logit, the sum of exp(x - largest), and the label's logit (0 if not here)."""
    row = tl.program_id(0)
    s, b = row // batch, row % batch
    start = logits_ptr + row.to(tl.int64) * width
    largest, total = float("-inf"), 0.0
    for at in range(0, width, BLOCK):
        column = at + tl.arange(0, BLOCK)
        x = tl.load(start + column, column < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    label = tl.load(labels_ptr + b * labels_b + s * labels_s) - first
    here = (label >= 0) & (label < width)
    to = b * out_b + s * out_s
    tl.store(largest_ptr + to, largest)
    tl.store(total_ptr + to, total)
    tl.store(own_ptr + to, tl.load(start + label, here, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["first"])
def _cross_entropy_backward(
    logits_ptr, labels_ptr, log_sum_ptr, gradient_ptr, batch, width, first,
    labels_b, labels_s, sums_b, sums_s, gradient_b, gradient_s, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a token's gradient, in place of its logits."""
    row = tl.program_id(0)
    s, b = row // batch, row % batch
    start = logits_ptr + row.to(tl.int64) * width
    label = tl.load(labels_ptr + b * labels_b + s * labels_s) - first
    log_sum = tl.load(log_sum_ptr + b * sums_b + s * sums_s)
    gradient = tl.load(gradient_ptr + b * gradient_b + s * gradient_s).to(tl.float32)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    x = tl.load(start + column, there, other=0.0).to(tl.float32)
    probability = tl.exp(x - log_sum)
    out = gradient * tl.where(column == label, probability - 1.0, probability)
    tl.store(start + column, out.to(logits_ptr.dtype.element_ty), there)
