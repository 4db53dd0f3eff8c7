"""Whether a checkpoint's files are still what was written: `manifest.json` holds each one's size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import TypeAdapter

from dsv3_train import regular
from dsv3_train.errors import UserError
from dsv3_train.runtime import heartbeat

NAME = "manifest.json"
_CHUNK = 1 << 22
Sums = dict[str, tuple[int, str]]
"""File name -> (bytes, SHA-256)."""
_LARGEST, _LONGEST_NAME = 64 << 20, 255


_READER = TypeAdapter(Sums)


def sums(files: Iterable[Path]) -> Sums:
    """Read files back and sum them up."""
    return {file.name: (file.stat().st_size, _sha256(file)) for file in files}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with regular.opened(file) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write(directory: Path, known: Sums) -> None:
    """Leave the manifest of a checkpoint in it."""
    (directory / NAME).write_text(json.dumps({"sha256": known}, indent=0), encoding="utf-8")


def read(directory: Path) -> Sums | None:
    """The manifest of a checkpoint; None: it was written before there were any.

    Raises:
        ValueError: what is there is no manifest.
        OSError: it cannot be read.
    """
    path = directory / NAME
    try:
        found = _READER.validate_python(json.loads(regular.read(path, _LARGEST))["sha256"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, UserError, RecursionError) as error:  # pydantic's is a ValueError
        raise ValueError(f"not a manifest ({' '.join(str(error).split())})") from None
    for name in found:
        if Path(name).name != name or len(os.fsencode(name)) > _LONGEST_NAME:
            raise ValueError(f"not a manifest ({name!r} is no file of the checkpoint)")
    return found


def faults(directory: Path, share: tuple[int, int] = (0, 1), demanded: bool = False) -> Iterator[str]:
    """What is wrong with a checkpoint, file by file; nothing: all of this share is as it was written.

    Args:
        share: (rank, ranks): the files are divided among them, for reading takes as long as loading.
        demanded: a checkpoint without a manifest is at fault.

    Raises:
        OSError: a file cannot be read here, which says nothing about what is in it.
    """
    try:
        known = read(directory)
    except ValueError as error:
        yield f"{NAME}: {error}"
        return
    if known is None and demanded:
        yield f"{NAME}: missing"
    rank, ranks = share
    for name, entry in sorted((known or {}).items())[rank::ranks]:
        heartbeat.mark(f"verification of {directory.name}")
        if found := fault_of(directory / name, entry):
            yield found


def fault(directory: Path, share: tuple[int, int] = (0, 1), demanded: bool = False) -> str | None:
    """The first of `faults`; None: there is none."""
    return next(faults(directory, share, demanded), None)


def fault_of(file: Path, entry: tuple[int, str], size_alone: bool = False) -> str | None:
    """What is wrong with one file, naming it.

    Args:
        entry: its bytes and SHA-256 as written.
        size_alone: whether to look at its size, and to read nothing.

    Raises:
        OSError: it cannot be read here.
    """
    size, digest = entry
    try:
        if (now := file.stat().st_size) != size:
            return f"{file.name}: {now} bytes, {size} were written"
        if not size_alone and _sha256(file) != digest:
            return f"{file.name}: its SHA-256 is not the one of what was written"
    except FileNotFoundError:
        return f"{file.name}: missing"
    except UserError:
        return f"{file.name}: no regular file"
    return None
