"""Files that a user names: regular ones alone, and of what is read whole only so much."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from dsv3_train.errors import UserError
from dsv3_train.profiling.values import plain


def opened(path: Path) -> BinaryIO:
    """A regular file, open to read. A FIFO without a writer would be waited for, and a device never ends.

    Raises:
        OSError: it cannot be opened.
        UserError: it is a FIFO, a device or a socket.
    """
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # of a directory, `open` says so
        raise UserError(
            f"{plain(str(path))}: not a regular file (a FIFO, a device or a socket); copy it into one first"
        )
    return open(path, "rb")


def text(path: Path, most: int, what: str) -> str:
    """A file of at most `most` bytes of UTF-8.

    Raises:
        UserError: it cannot be read, is larger, or is no text; `what` says what was wanted.
    """
    try:
        with opened(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{plain(str(path))}: cannot read ({error.strerror or error})") from None
    if len(content) > most:
        raise UserError(f"{plain(str(path))}: larger than {most:,} bytes; {what} is wanted")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{plain(str(path))}: not UTF-8 (byte {error.start:,}); {what} is wanted") from None
