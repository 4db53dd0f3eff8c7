"""Safetensors files: where each tensor lies, reading part of one, and writing a file tensor by tensor.

The format is read here rather than through the library because a tensor is mapped into memory on its own and let
go at once: mapped as a whole, a file's pages stay with the process, and what a conversion needs cannot be stated.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from dsv3_train import regular
from dsv3_train.errors import UserError

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of types, in the library's order within a file: wider types first, then by name."""
PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of the format's types that are narrower than a byte: named in a header, never read."""
_LARGEST_HEADER = 16 << 20
"""Bytes. The library's own bound is 100 MB, which hostile JSON makes gigabytes and minutes of; DeepSeek-V3's 92,000
tensors in one file would take 10 MB."""
_ORDER = tuple(DTYPES)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str
    dtype: str
    """As in the file: `BF16`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    begin: int
    """Byte of the file at which it begins."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * (PACKED.get(self.dtype) or 8 * itemsize(self.dtype)) // 8

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows `first` to `last` (of a vector: values), mapped from the file; the pages go with the tensor."""
        last = self.shape[0] if last is None else last
        row = prod(self.shape[1:]) * itemsize(self.dtype)
        begin, length = self.begin + first * row, (last - first) * row
        shape = (last - first, *self.shape[1:])
        if length == 0:
            return torch.empty(shape, dtype=DTYPES[self.dtype])
        skip = begin % mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as file:
            # A private mapping: torch warns of memory that it must not write to, and nothing here does.
            mapped = mmap.mmap(file.fileno(), length + skip, offset=begin - skip, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            mapped.madvise(mmap.MADV_SEQUENTIAL)
        return torch.frombuffer(mapped, dtype=DTYPES[self.dtype], count=prod(shape), offset=skip).view(shape)


def itemsize(dtype: str) -> int:
    """Bytes of one value."""
    return DTYPES[dtype].itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, after a check that all of it is there.

    Raises:
        UserError: cut short, or no safetensors file.
    """
    size, text = _header(path)
    tensors = _tensors(path, text)
    end = _end(path, tensors, 8 + len(text))
    if end != size:
        what = "cut short" if size < end else "longer than its header says"
        raise UserError(f"{path}: {what}: {size:,} bytes, and its header speaks of {end:,}; fetch it again")
    return tensors


def _end(path: Path, tensors: Mapping[str, Stored], end: int) -> int:
    """The byte after the last tensor, each of which begins where the one before ends, the first at `end`."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            raise UserError(f"{path}: {name} begins at byte {tensor.begin}, not {end}, where the one before ends")
        end += tensor.nbytes
    return end


def header_text(path: Path) -> bytes:
    """A file's header as it stands, its length before it apart.

    Raises:
        UserError: cut short, or no safetensors file.
        OSError: it cannot be opened.
    """
    return _header(path)[1]


def _header(path: Path) -> tuple[int, bytes]:
    with regular.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise UserError(f"{path}: no safetensors file, or cut short in its header; fetch it again")
        return size, file.read(length)


def _tensors(path: Path, text: bytes) -> dict[str, Stored]:
    """As strict as the library: UTF-8, numbers of JSON, text alone in `__metadata__`; and no name twice."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
        more = header.pop("__metadata__", None)
        if more is not None and not all(isinstance(value, str) for value in more.values()):
            raise ValueError("__metadata__ has other values than text")
        return {name: _stored(path, name, entry, 8 + len(text)) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its header is no safetensors header ({error}); fetch it again") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    name.encode()  # half of a surrogate pair is no name
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES and dtype not in PACKED:
        raise ValueError(f"{name} has the unknown type {dtype}")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has no possible shape or place")
    stored = Stored(str(path), dtype, shape, start + begin)
    if stored.nbytes != end - begin:
        raise ValueError(f"{name} takes {end - begin} bytes, but {dtype} {list(shape)} is {stored.nbytes}")
    return stored


@dataclass(frozen=True)
class Layout:
    """A file to be written: its header, and where each tensor goes."""

    header: bytes
    tensors: dict[str, Stored]
    size: int


def layout(path: Path, contents: Mapping[str, tuple[str, tuple[int, ...]]], header_was: str | None = None) -> Layout:
    """The file that the safetensors library would write of `contents` (name -> type, shape), byte for byte.

    Args:
        header_was: of another writer's file, in whose order and words this is to be if it has the same tensors.
    """
    if header_was is not None:
        known = _tensors(path, header_was.encode())
        if {name: (stored.dtype, stored.shape) for name, stored in known.items()} == contents:
            text = header_was.encode()
            end = _end(path, known, 8 + len(text))
            return Layout(len(text).to_bytes(8, "little") + text, known, end)
    names = sorted(contents, key=lambda name: (_ORDER.index(contents[name][0]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        dtype, shape = contents[name]
        end = begin + prod(shape) * itemsize(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    tensors = {name: Stored(str(path), *contents[name], start + header[name]["data_offsets"][0]) for name in names}
    return Layout(len(text).to_bytes(8, "little") + text, tensors, start + begin)


def write_at(descriptor: int, tensor: torch.Tensor, position: int) -> None:
    """A contiguous tensor's bytes at a byte of an open file."""
    data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while data:
        written = os.pwrite(descriptor, data[: 1 << 30], position)
        data, position = data[written:], position + written
