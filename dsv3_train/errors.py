"""The one exception that means "the input is at fault, not the program"."""

from __future__ import annotations

import errno
import re

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room for us."""
_OF_FILES = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS)


UNSEEN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Characters that a terminal obeys or cannot show, but for tabs and ends of lines: control characters, those that turn
the direction of text, halves of surrogates (bytes of file names that are no UTF-8)."""


def printable(text: str) -> str:
    """Text of a file, a file's name or another program, for a terminal: what it would obey is spelt out (`\\x1b`)."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


class UserError(Exception):
    """Bad recipe, data, checkpoint or environment.

    The command line prints the message (one line per fault: file, key, fix) and exits with code 2
    without a traceback. Raise it before anything is written. What it quotes cannot reach a terminal as commands.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def of_file(error: BaseException) -> UserError | None:
    """As a `UserError`, if a file or folder is what it is said not to be, or not ours to read or write, or if a disk is
    full, also where a library has put an error of its own on top."""
    if isinstance(error, OSError) and error.errno in _OF_FILES and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}; give another, or change its permissions")
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in FULL):
        cause = cause.__cause__ or cause.__context__
    return UserError(f"{cause.filename or 'a disk'}: {cause.strerror}; make room, and start again") if cause else None
