"""The two kinds of weights that conversion reads, seen the same way: by published name, in row blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import torch

from dsv3_train.checkpoint.hf import fp8
from dsv3_train.checkpoint.hf.files import Stored
from dsv3_train.checkpoint.hf.names import BLOCK, Weight
from dsv3_train.checkpoint.hf.sharded import open_checkpoint
from dsv3_train.checkpoint.hf.work import BLOCK_VALUES
from dsv3_train.errors import UserError


@dataclass(frozen=True)
class Published:
    """A tensor of a Hugging Face directory."""

    weight: Weight
    stored: Stored
    scale: Stored | None
    """Scales of its FP8 blocks."""

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.stored.dtype

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.stored.file}: {self.weight.name}"

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows in the type that they are stored in, FP8 as FP32; `first` at a block's border.

        Raises:
            UserError: a value is not finite.
        """
        values = self.stored.read(first, last)
        if self.scale is not None:
            scales = self.scale.read(first // BLOCK, -(-last // BLOCK))
            device = accelerator()
            values = fp8.dequantise(values.to(device), scales.to(device)).cpu()
        return _finite(values, self.place)


@dataclass(frozen=True)
class Sharded:
    """A published tensor's values within a Megatron checkpoint."""

    weight: Weight
    checkpoint: Path
    dtype: str
    """As saved."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.checkpoint}: {self.weight.key}"

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows in the type that they were saved in.

        Raises:
            UserError: a value is not finite, or the checkpoint is damaged.
        """
        weight = self.weight
        dim = len(weight.key_shape) - len(weight.shape)
        offset, extent = list(weight.offset), list(weight.extent)
        offset[dim] += first
        extent[dim] = last - first
        values = open_checkpoint(self.checkpoint).read(weight.key, offset, extent)
        return _finite(values.reshape(last - first, *weight.shape[1:]), self.place)


Side = Union[Published, Sharded]


def blocks(weight: Weight) -> Iterator[tuple[int, int]]:
    """Rows of a tensor, (first, last), so many at a time as may be in memory; cut at borders of FP8 blocks."""
    rows = weight.shape[0]
    step = max(BLOCK, BLOCK_VALUES // (weight.values // rows) // BLOCK * BLOCK)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


@functools.cache
def accelerator() -> str:
    """Where FP8 is worked out: the GPU if there is one. (Never asked in the process that starts workers.)"""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _finite(values: torch.Tensor, place: str) -> torch.Tensor:
    # The sum of values that are all finite may overflow, but seldom: then each is looked at.
    if not values.sum().isfinite() and not values.isfinite().all():
        raise UserError(f"{place}: has values that are not finite (NaN or infinite); the file is damaged")
    return values
