"""The index of a Megatron-core indexed dataset (`PREFIX.idx`), read and written without torch.

The layout is that of `megatron.core.datasets.indexed_dataset`; tests compare the two byte by byte. Ours exists
because `dsv3 data` and its worker processes start in a tenth of the time that torch takes to import, because
importing Megatron-core early would defeat the CPU runtime's patches, and because Megatron-core meets a damaged
index with an assertion or with whatever the bytes happen to mean.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_train.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of tokens, sequences, document boundaries
_TYPES = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_AT_ONCE = 1 << 20
"""Sequences that are looked at together."""
_CODES = {np.dtype(kind): code for code, kind in _TYPES.items()}


@dataclass(frozen=True)
class Index:
    """What `PREFIX.idx` says of `PREFIX.bin`. One sequence is one document, as Megatron's GPT dataset takes it."""

    dtype: np.dtype
    lengths: np.ndarray
    """Tokens per sequence, int32 [n]."""
    offsets: np.ndarray
    """Where each begins in the .bin, bytes, int64 [n]."""
    boundaries: np.ndarray
    """Sequences before each document, and all of them: int64 [documents + 1]."""
    tokens: int

    def tokens_from(self, sequence: int) -> int:
        """Tokens of this sequence and all after it."""
        if sequence >= len(self.offsets):
            return 0
        return self.tokens - int(self.offsets[sequence]) // self.dtype.itemsize


def write(path: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write the index of documents of `lengths` tokens (int32 [n]) that follow one another."""
    offsets = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(lengths) + 1))
        file.write(lengths.astype(np.int32).tobytes())
        file.write(offsets.tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def read(prefix: str) -> Index:
    """The index of the dataset at `prefix`; arrays are mapped, not read, so the cost does not grow with the data.

    Raises:
        UserError: a file is missing, is no index, or is not as long as the other one says.
    """
    idx, bin_ = f"{prefix}.idx", f"{prefix}.bin"
    for file in (idx, bin_):
        if not os.path.isfile(file):
            raise UserError(f"{file}: no such file; `dsv3 data prepare ... --output {prefix}` writes it")
    size = os.path.getsize(idx)
    try:
        with open(idx, "rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"{idx}: {error.strerror}") from None
    if not header.startswith(_MAGIC[: len(header)]) or not header:
        raise UserError(f"{idx}: no index of a dataset (it does not begin with MMIDIDX); prepare it again")
    if len(header) < _HEADER.size:
        raise UserError(f"{idx}: truncated, {size} bytes are less than a header; copy or prepare it again")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        raise UserError(f"{idx}: version {version}, token type {code}: only version 1 with integers is known")
    if sequences == 0 or boundaries < 2:
        raise UserError(f"{idx}: holds no document; prepare it from inputs that have text")
    if sequences >= 2**31:
        raise UserError(f"{idx}: {sequences} documents, Megatron-core counts to 2^31 - 1; prepare several datasets")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if size == expected + sequences:
        raise UserError(
            f"{idx}: has a mode for each sequence (a multimodal dataset); text alone is trained on, so write it without"
        )
    if size != expected:
        raise UserError(
            f"{idx}: {'truncated' if size < expected else 'too long'}, {size} bytes instead of {expected}; "
            "copy or prepare it again"
        )
    dtype = np.dtype(_TYPES[code])

    def array(kind: type, count: int, offset: int) -> np.ndarray:
        return np.memmap(idx, kind, "r", offset, (count,))

    lengths = array(np.int32, sequences, _HEADER.size)
    offsets = array(np.int64, sequences, _HEADER.size + 4 * sequences)
    described, found = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize, os.path.getsize(bin_)
    if described != found:
        raise UserError(
            f"{bin_}: {found} bytes, but {idx} describes {described}: truncated, or of another dataset; "
            "copy or prepare both again"
        )
    return Index(
        dtype, lengths, offsets, array(np.int64, boundaries, _HEADER.size + 12 * sequences), found // dtype.itemsize
    )


def verify(prefix: str, index: Index) -> None:
    """Read the whole index, a part at a time, and see that its parts agree.

    Raises:
        UserError: they do not.
    """
    size, count = index.dtype.itemsize, len(index.lengths)
    end = before = 0
    sound = index.boundaries[0] == 0 and index.boundaries[-1] == count
    for start in range(0, count, _AT_ONCE):
        lengths = np.asarray(index.lengths[start : start + _AT_ONCE], np.int64)
        ends = end + np.cumsum(lengths) * size
        sound &= bool(lengths.min() >= 0) and np.array_equal(
            index.offsets[start : start + _AT_ONCE], ends - lengths * size
        )
        end = int(ends[-1])
    for start in range(0, len(index.boundaries), _AT_ONCE):
        boundaries = index.boundaries[start : start + _AT_ONCE]
        sound &= bool(boundaries[0] >= before) and bool((np.diff(boundaries) >= 0).all())
        before = boundaries[-1]
    if not sound or end != index.tokens * size:
        raise UserError(f"{prefix}.idx: damaged, lengths and offsets contradict each other; copy or prepare it again")
