"""Whether a checkpoint's files are still what was written: `manifest.json` holds each one's size and SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dsv3_train.runtime import heartbeat

NAME = "manifest.json"
_CHUNK = 1 << 22
Sums = dict[str, tuple[int, str]]
"""File name -> (bytes, SHA-256)."""


def sums(files: Iterable[Path]) -> Sums:
    """Read files back and sum them up."""
    return {file.name: (file.stat().st_size, _sha256(file)) for file in files}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
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
    """
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        return {
            name: (int(size), str(digest)) for name, (size, digest) in json.loads(path.read_text())["sha256"].items()
        }
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a manifest ({error})") from None


def fault(directory: Path, share: tuple[int, int] = (0, 1), demanded: bool = False) -> str | None:
    """What is wrong with a checkpoint, naming the file; None: all of this share is as it was written.

    Args:
        share: (rank, ranks): the files are divided among them, for reading takes as long as loading.
        demanded: a checkpoint without a manifest is at fault.

    Raises:
        OSError: a file cannot be read here, which says nothing about what is in it.
    """
    try:
        known = read(directory)
    except ValueError as error:
        return f"{NAME}: {error}"
    if known is None and demanded:
        return f"{NAME}: missing"
    rank, ranks = share
    for name, (size, digest) in sorted((known or {}).items())[rank::ranks]:
        file = directory / name
        heartbeat.mark(f"verification of {directory.name}")
        try:
            if file.stat().st_size != size:
                return f"{name}: {file.stat().st_size} bytes, {size} were written"
            if _sha256(file) != digest:
                return f"{name}: its SHA-256 is not the one of what was written"
        except FileNotFoundError:
            return f"{name}: missing"
    return None
