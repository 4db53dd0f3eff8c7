"""Directories that one process at a time works in, on file systems with locks and without."""

from __future__ import annotations

import errno
import fcntl
import shutil
from pathlib import Path
from typing import IO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system says that has none, as Lustre without its option for them."""


def alone(lock: IO) -> bool:
    """Whether no other process has locked this open file, as far as its file system tells; from now on we have."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def remove(directory: Path, lock: IO) -> None:
    """Remove a directory that the open file locks which lies in it.

    That file last, and closed: NFS keeps an open one there under another name, and the directory with it.
    """
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != Path(lock.name).name:
            path.unlink()
    lock.close()
    shutil.rmtree(directory, ignore_errors=True)
