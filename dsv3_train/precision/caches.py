"""A tensor that waits for the backward pass in fewer bits."""

from __future__ import annotations

import torch

from dsv3_train.precision.formats import Format
from dsv3_train.precision.tiles import to_tiles


def hold(x: torch.Tensor, fmt: Format, until: torch.Tensor) -> None:
    """Keep `x` in tiles of `fmt` from now until `until` gets its gradient.

    Its storage is given up, and filled with the dequantised values when the gradient arrives.

    Args:
        x: BF16 or FP32 [..., h] that fills its storage, of which backward functions keep aliases; nothing reads it
            before the gradient.
        until: an output of the operation that `x` went into last.
    """
    if not until.requires_grad or not x.numel():
        return
    storage, shape, size = x.untyped_storage(), x.shape, x.untyped_storage().nbytes()
    if not x.is_contiguous() or size != x.numel() * x.element_size():
        raise RuntimeError(f"a tensor {tuple(shape)} of a larger storage cannot wait in {fmt.name}")
    dtype, waiting = x.dtype, [to_tiles(x.detach().flatten(0, -2), fmt)]
    storage.resize_(0)

    def restore(_gradient: torch.Tensor) -> None:
        # Into the storage, as Megatron-core's recomputation does: a copy into the tensor would count as a change of
        # what backward functions keep.
        storage.resize_(size)
        storage.copy_(waiting.pop().values(dtype).untyped_storage())

    until.register_hook(restore)
