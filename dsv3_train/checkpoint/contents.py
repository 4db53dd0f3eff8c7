"""A checkpoint's table of contents, `.metadata`: a pickle, read so that nothing in it runs, and checked by value.

torch's reader takes that file with a plain `pickle.load`; all else it reads with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_train import regular
from dsv3_train.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

NAME = ".metadata"
_LARGEST = 1 << 30
_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    "torch": {"Size", "bfloat16", "float32", "float16", "uint8", "int16", "int32", "int64", "bool"},
    "torch.serialization": {"_get_layout"},
}
"""Every name in the table of contents of a checkpoint: plain records, types and enumerations."""


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Refuses every name but those of `_ALLOWED`, and numbers that would have torch's reader fill the memory.

    It is Python's own implementation, whose memo is a dict: C's is an array up to the largest number in the file.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has what no writer of checkpoints uses")

    # `MEMOIZE`, which numbers by itself, is all that protocol 4 and later use.
    dispatch = pickle._Unpickler.dispatch | dict.fromkeys(  # type: ignore[attr-defined, assignment]
        (pickle.PUT[0], pickle.LONG_BINPUT[0], pickle.BYTEARRAY8[0]), _refuse
    )


def read(path: Path) -> Metadata:
    """The table of contents of the checkpoint at `path`, whose files are all there.

    Raises:
        UserError: a name in it that could run code, what is no table of contents, or a file that is missing.
    """
    file = path / NAME
    try:
        # A table is smaller than what it lists: each part is an archive of its own.
        listed = sum(entry.stat().st_size for entry in path.iterdir() if entry.name != NAME and entry.is_file())
        content = regular.read(file, min(_LARGEST, listed))
    except FileNotFoundError:
        raise UserError(f"{path}: the checkpoint has no .metadata; it is damaged, take another") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; take another checkpoint") from None
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        ends = _check(found)
    except Exception as error:
        raise UserError(f"{file}: not a checkpoint's table of contents ({error}); refused") from None
    for name, end in ends.items():
        data = path / name
        try:
            with regular.opened(data) as stream:
                size = stream.seek(0, io.SEEK_END)
        except FileNotFoundError:
            raise UserError(f"{data}: missing; the checkpoint is damaged, take another") from None
        except OSError as error:
            raise UserError(f"{data}: {error.strerror}; take another checkpoint") from None
        if size < end:
            raise UserError(f"{data}: cut short, {size:,} of {end:,} bytes; take another checkpoint")
    return found


def _check(found: Any) -> dict[str, int]:
    """Look at everything that a reader relies on; each file's last byte that is spoken of.

    Raises:
        ValueError: says what is wrong.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    def demand(right: bool, what: Any) -> None:
        if not right:
            raise ValueError(f"{what} is not as a checkpoint has it")

    def numbers(value: Any, what: Any) -> tuple[int, ...]:
        demand(isinstance(value, torch.Size) and all(type(n) is int and n >= 0 for n in value), what)
        return tuple(value)

    demand(type(found) is Metadata, "it")
    tensors, places = found.state_dict_metadata, found.storage_data
    demand(type(tensors) is dict and type(places) is dict and not found.planner_data, "it")
    ends: dict[str, int] = {}
    lengths: dict[tuple[str, tuple[int, ...]], int] = {}
    for index, place in places.items():
        demand(type(index) is MetadataIndex and type(index.fqn) is str and type(place) is _StorageInfo, "a place")
        name, start, length = place.relative_path, place.offset, place.length
        demand(type(name) is str and name not in ("", ".", "..") and "/" not in name and "\0" not in name, index.fqn)
        demand(type(start) is int and type(length) is int and start >= 0 and length >= 0, index.fqn)
        demand(not getattr(place, "transform_descriptors", None), index.fqn)
        ends[name] = max(ends.get(name, 0), start + length)
        if index.offset is not None:
            lengths[index.fqn, numbers(index.offset, index.fqn)] = length
    for key, entry in tensors.items():
        demand(type(key) is str, "a name")
        if type(entry) is BytesStorageMetadata:
            continue
        demand(type(entry) is TensorStorageMetadata and type(entry.properties) is TensorProperties, key)
        demand(isinstance(entry.properties.dtype, torch.dtype) and type(entry.chunks) is list, key)
        size, itemsize = numbers(entry.size, key), entry.properties.dtype.itemsize
        for chunk in entry.chunks:
            demand(type(chunk) is ChunkStorageMetadata, key)
            begin, extent = numbers(chunk.offsets, key), numbers(chunk.sizes, key)
            demand(len(begin) == len(extent) == len(size), key)
            demand(all(a + b <= c for a, b, c in zip(begin, extent, size, strict=True)), key)
            demand((key, begin) in lengths, f"a part of {key}")
            demand(prod(extent) * itemsize <= lengths[key, begin], key)
        demand(sum(prod(chunk.sizes) for chunk in entry.chunks) == prod(size), key)
    return ends
