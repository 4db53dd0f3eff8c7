"""Tensors of a Hugging Face directory that a checkpoint keeps by their bytes, in `hf/kept.safetensors`.

The scales of FP8 blocks (0.17 GB of DeepSeek-V3's 689), which no rule brings back for certain; weights in FP32 beside
others in BF16, which training in BF16 rounds (norms of some models); and what is beside the model (beside.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dsv3_train.checkpoint.hf.files import Stored, layout, read_header

FILE = "kept.safetensors"
_PIECE = 64 << 20
"""Bytes that are in memory at once."""


def write(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Copy tensors into `folder`."""
    plan = layout(folder / FILE, {name: (stored.dtype, stored.shape) for name, stored in tensors.items()})
    with (folder / FILE).open("wb", buffering=0) as file:
        os.pwrite(file.fileno(), plan.header, 0)
        for name, stored in tensors.items():
            copy(stored, file.fileno(), plan.tensors[name].begin)
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Stored]:
    """What `folder` keeps, by name.

    Raises:
        UserError: the file is damaged.
        OSError: it is missing.
    """
    return read_header(folder / FILE)


def copy(stored: Stored, descriptor: int, position: int) -> None:
    """Write a tensor's bytes at a byte of an open file."""
    with open(stored.file, "rb", buffering=0) as source:
        source.seek(stored.begin)
        left = stored.nbytes
        while left:
            data = source.read(min(_PIECE, left))
            if not data:
                raise OSError(None, "has become shorter while it was read", stored.file)
            left -= len(data)
            while data:
                written = os.pwrite(descriptor, data, position)
                data, position = data[written:], position + written
