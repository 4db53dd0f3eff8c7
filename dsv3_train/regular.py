"""Files that others made, read as what they are: regular files, of which only so much is read whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from dsv3_train.errors import UserError, on_one_line

LARGEST = 64 << 20
"""Bytes of a file that is read whole; a tokenizer is a tenth of that."""


def opened(path: Path, *, follow: bool = True) -> BinaryIO:
    """A regular file, open to read. A FIFO without a writer would be waited for, and a device never ends.

    Args:
        follow: links. Else one that was put in the file's place is an error.

    Raises:
        OSError: it cannot be opened.
        UserError: it is a FIFO, a device or a socket.
    """
    links = 0 if follow else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | links)
    kind = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # of a directory, `open` says so
        os.close(descriptor)
        raise UserError(
            f"{on_one_line(str(path))}: not a regular file (a FIFO, a device or a socket); copy it into one first"
        )
    try:
        return open(descriptor, "rb")
    except OSError as error:
        os.close(descriptor)
        raise OSError(error.errno, error.strerror, str(path)) from None


def appended(path: Path) -> BinaryIO:
    """A regular file, made if need be, open to add to its end.

    Raises:
        OSError: it cannot be opened.
        UserError: it is no regular file. A FIFO without a reader would be waited for.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{on_one_line(str(path))}: not a regular file; remove it")
    return open(descriptor, "ab", buffering=0)


def read(path: Path, most: int = LARGEST, *, follow: bool = True) -> bytes:
    """A regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        UserError: it is none, or larger.
    """
    with opened(path, follow=follow) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{on_one_line(str(path))}: more than {most:,} bytes, which no file of its kind has")
    return content


def text(path: Path, most: int, what: str) -> str:
    """A file of at most `most` bytes of UTF-8.

    Raises:
        UserError: it cannot be read, is larger, or is no text; `what` says what was wanted.
    """
    told = on_one_line(str(path))
    try:
        with opened(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{told}: cannot read ({error.strerror or error})") from None
    if len(content) > most:
        raise UserError(f"{told}: larger than {most:,} bytes; {what} is wanted")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{told}: not UTF-8 (byte {error.start:,}); {what} is wanted") from None


def contents(path: Path) -> bytes:
    """The bytes of a regular file of a directory that is copied on.

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
        return read(real, follow=False)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; fetch it again, or put a copy of the file in its place") from None


def _belongs(real: Path, folder: Path) -> bool:
    """Whether what a link in `folder` leads to is the folder's own. Both are free of links."""
    if real.name.startswith("."):
        return False
    return real.parent == folder or (folder.parent.name == "snapshots" and real.parent == folder.parents[1] / "blobs")
