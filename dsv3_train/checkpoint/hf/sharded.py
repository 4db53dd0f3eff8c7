"""Reading any part of a tensor of Megatron's sharded checkpoints (`torch_dist`).

Needs neither Megatron nor process groups, and maps what it reads: a chunk may be as large as a rank's memory.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsv3_train.checkpoint import checksums, contents
from dsv3_train.checkpoint.hf.files import DTYPES, Stored
from dsv3_train.errors import UserError

_VALUES = ".distcp"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor as one rank saved it."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint."""

    key: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Checkpoint:
    """A sharded checkpoint, open for reading."""

    def __init__(self, path: Path) -> None:
        """Read the table of contents.

        Raises:
            UserError: unsafe, or damaged, as far as sizes and small files tell.
        """
        self.path = path
        metadata = contents.read(path)
        try:
            self.manifest = checksums.read(path)
            # What is read whole is checked at once, the rest by its size (and by content in hf/checks.py).
            for name, entry in sorted((self.manifest or {}).items()):
                if fault := checksums.fault_of(path / name, entry, size_alone=name.endswith(_VALUES)):
                    raise UserError(f"{path}: the checkpoint is damaged ({fault}); take another")
        except ValueError as error:
            raise UserError(f"{path / checksums.NAME}: {error}; take another checkpoint") from None
        except OSError as error:
            raise UserError(f"{error.filename or path}: {error.strerror}; take another checkpoint") from None
        places: dict[tuple, _StorageInfo] = {
            (index.fqn, tuple(index.offset)): info
            for index, info in metadata.storage_data.items()
            if index.offset is not None
        }
        try:
            self.tensors = {
                key: _tensor(path, key, entry, places)
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        except KeyError as error:
            raise UserError(f"{path / contents.NAME}: {error} is no type of a checkpoint's; take another") from None

    def read(self, key: str, offset: Sequence[int], extent: Sequence[int]) -> torch.Tensor:
        """The part of tensor `key` at `offset`, in the type that it was saved in; put together from its chunks.

        Raises:
            UserError: the checkpoint lacks a part of it.
        """
        tensor = self.tensors[key]
        pieces = []
        for chunk in tensor.chunks:
            first = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
            ends = starmap(min, zip(_end(offset, extent), _end(chunk.offset, chunk.sizes), strict=True))
            sizes = [end - begin for begin, end in zip(first, ends, strict=True)]
            if all(size > 0 for size in sizes):
                pieces.append((chunk, first, sizes))
        if sum(prod(sizes) for _, _, sizes in pieces) != prod(extent):
            raise UserError(f"{self.path}: a part of {key} is missing; the checkpoint is damaged, take another")
        views = []
        for chunk, first, sizes in pieces:
            view = _mapped(chunk, tensor.dtype)
            for dim, (begin, start, size) in enumerate(zip(first, chunk.offset, sizes, strict=True)):
                view = view.narrow(dim, begin - start, size)
            views.append(view)
        if len(views) == 1:
            return views[0]
        out = torch.empty(tuple(extent), dtype=DTYPES[tensor.dtype])
        for (_, first, sizes), view in zip(pieces, views, strict=True):
            target = out
            for dim, (begin, start, size) in enumerate(zip(first, offset, sizes, strict=True)):
                target = target.narrow(dim, begin - start, size)
            target.copy_(view)
        return out


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; one that this process has open already, and that has not changed, is not read again."""
    try:
        table = (path / contents.NAME).stat()
    except OSError:
        return Checkpoint(path)  # says why
    return _open(path, (table.st_ino, table.st_size, table.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _open(path: Path, changed: tuple[int, int, int]) -> Checkpoint:
    return Checkpoint(path)


def _end(offset: Sequence[int], extent: Sequence[int]) -> list[int]:
    return [begin + size for begin, size in zip(offset, extent, strict=True)]


def _tensor(path: Path, key: str, entry: TensorStorageMetadata, places: dict[tuple, _StorageInfo]) -> Tensor:
    chunks = []
    for chunk in entry.chunks:
        info = places[key, tuple(chunk.offsets)]
        chunks.append(
            Chunk(tuple(chunk.offsets), tuple(chunk.sizes), str(path / info.relative_path), info.offset, info.length)
        )
    return Tensor(key, _NAMES[entry.properties.dtype], tuple(entry.size), tuple(chunks))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: str, begin: int, length: int) -> None:
        self._file = open(file, "rb")  # noqa: SIM115  closed by close()
        self._begin, self._length, self._at = begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._begin + self._at)
        got = self._file.readinto(memoryview(buffer)[:count])
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


def _mapped(chunk: Chunk, dtype: str) -> torch.Tensor:
    """A chunk's values, mapped: `torch.save` keeps a tensor uncompressed within its ZIP archive."""
    tensor = None
    try:
        with _Window(chunk.file, chunk.begin, chunk.length) as window:
            entries = zipfile.ZipFile(window).infolist()  # type: ignore[arg-type]
            (values,) = [entry for entry in entries if entry.filename.endswith("/data/0")]
            window.seek(values.header_offset + 26)  # in the entry's own header: lengths of its name and extra field
            name, extra = (int.from_bytes(window.read(2), "little") for _ in range(2))
            stored = Stored(chunk.file, dtype, chunk.sizes, chunk.begin + values.header_offset + 30 + name + extra)
            if values.compress_type == zipfile.ZIP_STORED and values.file_size == stored.nbytes:
                return stored.read()
            window.seek(0)  # a view of something larger
            tensor = torch.load(io.BufferedReader(window), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{chunk.file}: damaged at byte {chunk.begin:,} ({error}); take another checkpoint") from None
    if tuple(tensor.shape) != chunk.sizes or tensor.dtype != DTYPES[dtype]:
        raise UserError(f"{chunk.file}: not what .metadata says at byte {chunk.begin:,}; take another checkpoint")
    return tensor
