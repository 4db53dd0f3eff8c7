"""Writing Megatron's sharded checkpoints (`torch_dist`) file by file, with no more in memory than one part."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from dsv3_train.checkpoint import checksums, contents
from dsv3_train.checkpoint.hf.files import DTYPES

_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Megatron's `metadata.json`."""


@dataclass(frozen=True)
class Part:
    """A chunk to be written."""

    key: str
    key_shape: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str


Placed = tuple[int, str, int, int]
"""Of a written part: its number in the unit, file, first byte, length."""


class _Writer(FileSystemWriter):
    """torch's writer, which would put the path of an unfinished checkpoint into `.metadata`, as an object."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Lazy(SavePlanner):
    """Hands each part to torch's writer when it comes to write it; the rest of a planner's work is done already."""

    def __init__(self, numbers: dict[MetadataIndex, int], values: Callable[[int], torch.Tensor]) -> None:
        self._numbers, self._values = numbers, values

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._values(self._numbers[write_item.index])

    set_up_planner = create_local_plan = create_global_plan = finish_plan = None  # type: ignore[assignment]


def write_parts(path: Path, number: int, parts: Sequence[Part], values: Callable[[int], torch.Tensor]) -> list[Placed]:
    """Write file `number` of a checkpoint: `values(i)` gives part i, in turn, and no two are held at once."""
    indices = [MetadataIndex(part.key, torch.Size(part.offset)) for part in parts]
    numbers = {index: i for i, index in enumerate(indices)}
    items = [
        WriteItem(index, WriteItemType.SHARD, tensor_data=_described(part))
        for index, part in zip(indices, parts, strict=True)
    ]
    writer = FileSystemWriter(path, thread_count=1)
    writer.set_up_storage_writer(False, rank=number, use_collectives=False)
    plan = writer.prepare_local_plan(SavePlan(items))
    results = writer.write_data(plan, _Lazy(numbers, values)).wait()
    return [
        (numbers[one.index], one.storage_data.relative_path, one.storage_data.offset, one.storage_data.length)
        for one in results
    ]


def finish(
    path: Path, units: Sequence[tuple[Sequence[Part], Sequence[Placed]]], common: dict[str, Any], sums: checksums.Sums
) -> None:
    """Write a checkpoint's table of contents, its common objects, `metadata.json`, and the checksums of all (`sums`:
    those of what is written already)."""
    table: dict[str, Any] = {}
    results = []
    for parts, placed in units:
        for part in parts:
            empty = TensorStorageMetadata(_properties(part), torch.Size(part.key_shape), [])
            table.setdefault(part.key, empty).chunks.append(_chunk(part))
        for number, file, begin, length in placed:
            index = MetadataIndex(parts[number].key, torch.Size(parts[number].offset))
            results.append(WriteResult(index, length, _StorageInfo(file, begin, length)))
    _Writer(path).finish(Metadata(table), [results])
    torch.save(common, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(_METADATA), encoding="utf-8")
    small = [path / name for name in (contents.NAME, "common.pt", "metadata.json")]
    checksums.write(path, sums | checksums.sums(small))


def _described(part: Part) -> TensorWriteData:
    return TensorWriteData(_chunk(part), _properties(part), torch.Size(part.key_shape))


def _chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.sizes))


def _properties(part: Part) -> TensorProperties:
    return TensorProperties(dtype=DTYPES[part.dtype])
