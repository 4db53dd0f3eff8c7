"""Files of a directory that others made, read and copied as what they are: regular files, and no links out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

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
        # A pipe would wait for a writer; a link put in its place meanwhile is not followed.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path}: no regular file; remove it, or put a copy of the file in its place")
            found = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; fetch it again, or put a copy of the file in its place") from None
    if len(found) > LARGEST:
        raise UserError(f"{path}: more than {LARGEST:,} bytes, which no file beside the weights has; copy it yourself")
    return found


def _belongs(real: Path, folder: Path) -> bool:
    """Whether what a link in `folder` leads to is the folder's own. Both are free of links."""
    if real.name.startswith("."):
        return False
    return real.parent == folder or (folder.parent.name == "snapshots" and real.parent == folder.parents[1] / "blobs")
