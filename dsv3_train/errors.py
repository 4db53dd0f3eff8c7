"""The one exception that means "the input is at fault, not the program"."""

from __future__ import annotations

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room for us."""
_OF_FILES = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS)


class UserError(Exception):
    """Bad recipe, data, checkpoint or environment.

    The command line prints the message (one line per fault: file, key, fix) and exits with code 2
    without a traceback. Raise it before anything is written.
    """


def of_file(error: BaseException) -> UserError | None:
    """As a `UserError`, if a file or folder is what it is said not to be, or not ours to read or write, or if a disk is
    full, also where a library has put an error of its own on top."""
    if isinstance(error, OSError) and error.errno in _OF_FILES and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}; give another, or change its permissions")
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in FULL):
        cause = cause.__cause__ or cause.__context__
    return UserError(f"{cause.filename or 'a disk'}: {cause.strerror}; make room, and start again") if cause else None
