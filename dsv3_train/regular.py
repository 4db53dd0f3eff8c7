"""Files of a directory that others made, read and copied as what they are: regular files, and no links out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

from dsv3_train.errors import UserError

LARGEST = 64 << 20
"""Bytes; a tokenizer is a tenth of that."""


def contents(path: Path) -> bytes:
    """The bytes of a regular file.

    A link is followed within its own directory, and from a snapshot of Hugging Face's cache to the blobs of the same
    repository (`models--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`). Any other could bring in what the
    directory's author cannot read and its user would publish, as `/proc/self/environ`.

    Raises:
        UserError: a link to elsewhere, no regular file, larger than `LARGEST`, or it cannot be read.
    """
    real = path
    if path.is_symlink():
        real = Path(os.path.realpath(path))
        if not _belongs(real, Path(os.path.realpath(path.parent))):
            raise UserError(f"{path}: a link out of its directory, to {real}; put a copy of the file in its place")
    try:
        return read(real, flags=os.O_NOFOLLOW, name=path)  # nor a link put in its place meanwhile
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; fetch it again, or put a copy of the file in its place") from None


def opened(path: Path, flags: int = 0, name: Path | None = None) -> IO[bytes]:
    """A regular file, open for reading; a link is followed to one.

    Args:
        flags: of `os.open`, besides.
        name: for messages, where it is not `path`.

    Raises:
        UserError: a directory, a pipe or a device.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)  # a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{name or path}: no regular file; remove it, or put a copy of the file in its place")
    return open(descriptor, "rb")


def read(path: Path, largest: int = LARGEST, flags: int = 0, name: Path | None = None) -> bytes:
    """The bytes of a regular file. Arguments and errors as of `opened`.

    Raises:
        UserError: larger than `largest`, too.
    """
    with opened(path, flags, name) as file:
        found = file.read(largest + 1)
    if len(found) > largest:
        raise UserError(f"{name or path}: more than {largest:,} bytes, which no such file has; put the right one there")
    return found


def _belongs(real: Path, folder: Path) -> bool:
    """Whether what a link in `folder` leads to is the folder's own. Both are free of links."""
    if real.name.startswith("."):
        return False
    return real.parent == folder or (folder.parent.name == "snapshots" and real.parent == folder.parents[1] / "blobs")
