"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from dsv3_train.errors import UserError

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a file system says that cannot do it for directories."""


def sync(path: Path) -> None:
    """Have what is in a file, or which names are in a directory, on the disk itself: a power loss leaves it so."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def sync_below(directory: Path) -> None:
    """`sync` for every file and directory in a directory, and itself."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def write(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Under a temporary name, then renamed, both on the disk itself; folders are made.

    Args:
        mode: permissions, of which the umask takes away.

    Raises:
        UserError: it cannot be written.
    """
    try:
        put(path, content, mode)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from error


def put(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """`write`, with what the disk says as it is (OSError), naming the file."""
    partial = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            partial.unlink()  # of a process that was killed; or somebody's link
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        if error.filename is None:
            error.filename = str(path)
        raise
