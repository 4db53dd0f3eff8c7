"""The router's product on tensor cores: BF16 operands as they are, sums in FP32.

    logits_te = sum_h x_th W_eh

x and W are BF16 already, so that FP32 copies of them, which Megatron-core 0.16.1 multiplies on CUDA cores, hold the
same numbers: the logits differ by the order of FP32 sums alone. The gradient of the logits is FP32; it is taken as two
BF16 numbers, their sum within 2^-17 of it, side by side in one product.
"""

from __future__ import annotations

import torch


def reference(x_th: torch.Tensor, weight_eh: torch.Tensor) -> torch.Tensor:
    """What `router_product` computes, in plain PyTorch."""
    return x_th.float() @ weight_eh.float().t()


def router_product(x: torch.Tensor, weight_eh: torch.Tensor) -> torch.Tensor:
    """BF16 [..., h] and [e, h] -> FP32 [..., e]."""
    return _RouterProduct.apply(x, weight_eh)


class _RouterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_eh):
        ctx.save_for_backward(x, weight_eh)
        x_th = x.reshape(-1, x.size(-1))
        return torch.mm(x_th, weight_eh.t(), out_dtype=torch.float32).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight_eh = ctx.saved_tensors
        x_th, gradient_te = x.reshape(-1, x.size(-1)), gradient.reshape(-1, gradient.size(-1))
        high = gradient_te.to(x.dtype)
        both_t2e = torch.cat([high, (gradient_te - high).to(x.dtype)], dim=1)
        of_x = torch.mm(both_t2e, weight_eh.repeat(2, 1))
        of_weight = torch.mm(both_t2e.t(), x_th, out_dtype=torch.float32).view(2, *weight_eh.shape).sum(0)
        return of_x.view_as(x), of_weight.to(weight_eh.dtype)
