"""The one exception that means "the input is at fault, not the program"."""

from __future__ import annotations

import errno
import os
import re
import traceback

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room for us."""
_OF_FILES = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


UNSEEN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Characters that a terminal obeys or cannot show, but for tabs and ends of lines: control characters, those that turn
the direction of text, halves of surrogates (bytes of file names that are no UTF-8)."""
_SPELT = re.compile(UNSEEN.pattern[:-1] + "\\u061c\\u200b-\\u200f\\u2060-\\u2065\\u206a-\\u206f\\ufeff]")
"""`UNSEEN`, and what has no width: of use in a text, and in a name a way to make two look alike."""


def printable(text: str) -> str:
    """Text of a file, a file's name or another program, for a terminal: what it would obey is spelt out (`\\x1b`)."""
    return UNSEEN.sub(_spelt, text)


def on_one_line(text: str) -> str:
    """As `printable`, of a name: ends of lines and tabs are spelt out too."""
    return _SPELT.sub(_spelt, text).replace("\n", "\\n").replace("\t", "\\t")


def _spelt(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


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


TRACEBACK = "DSV3_TRACEBACK"
"""The environment variable that, when it is set, has `unexpected` show where an error came from in full."""


def unexpected(error: BaseException) -> str:
    """One line for an error that nobody foresaw, which is a fault of this project; its traceback if `TRACEBACK` asks.

    A net: input that leads here wants a `UserError` of its own where it is read.
    """
    if os.environ.get(TRACEBACK):
        return printable("".join(traceback.format_exception(error)).rstrip())
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "dsv3" in frame.filename] or frames
    at = f" at {os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else ""
    told = on_one_line(str(error))[:500]
    if isinstance(error, MemoryError):
        return f"out of memory{at} ({told or 'no more could be had'}); {TRACEBACK}=1 shows where in full"
    return (
        f"{type(error).__name__}{at}: {told or 'no message'}; this is a fault of dsv3, not of what it was given: "
        f"please report it with what {TRACEBACK}=1 in the environment shows"
    )
