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
    storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
    if not x.is_contiguous() or size != x.numel() * x.element_size():
        raise RuntimeError(f"a tensor {tuple(x.shape)} of a larger storage cannot wait in {fmt.name}")
    x_th = x.detach().flatten(0, -2)
    dtype, shape, waiting = x.dtype, x_th.shape, [(storage, to_tiles(x_th, fmt))]
    storage.resize_(0)
    del x_th, storage  # only `waiting` has it: the hook can outlive the backward pass, with the graph's nodes

    def restore(_gradient: torch.Tensor) -> None:
        # Into the storage, beside the tensor: a write to that would count as a change of what backward functions keep.
        storage, tiles = waiting.pop()
        storage.resize_(size)
        tiles.values(
            dtype, out=torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, shape, (shape[1], 1))
        )

    until.register_hook(restore)
