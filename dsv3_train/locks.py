"""Directories that one process at a time works in, on file systems with locks and without."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dsv3_train.errors import UserError

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


class Busy(UserError):
    """Another process works in that directory at this moment."""


@dataclass
class Held:
    """A directory that this process alone works in, and in it nothing but ours."""

    path: Path
    lock: IO
    """An open file of the directory, locked."""
    ours: Callable[[str], bool]
    """Whether a relative path is one of ours; a directory's ends with `/`."""
    made: list[Path]
    """What was not there before: the directory if so, and those above it, the lowest first."""
    begun: bool
    """The directory is ours: made now, or by one of us that was cut short."""

    def clear(self) -> None:
        """Remove our files, and the directory unless it was there before us or holds something else.

        The lock last, and closed: NFS keeps an open file there under another name.
        """
        lock = self.path / Path(self.lock.name).name
        for entry, relative in _below(self.path, deepest_first=True):
            if Path(entry.path) == lock or not self.ours(relative):
                continue
            with contextlib.suppress(OSError):
                os.rmdir(entry.path) if relative.endswith("/") else os.unlink(entry.path)
        self.lock.close()
        with contextlib.suppress(OSError):
            lock.unlink()
            if self.begun:
                self.path.rmdir()

    def undo(self) -> None:
        """Remove the directories that were made, so that a refusal leaves nothing."""
        _remove_empty(self.made)


def hold(path: Path, lock: str, ours: Callable[[str], bool], remedy: str) -> Held:
    """Make a directory, or take up what was begun in it, and lock its file `lock`.

    Raises:
        UserError: it is a link or no directory, or holds what is not ours to use and delete; `remedy` is said.
        Busy: another process has locked it.
        FileNotFoundError: another process has just removed or renamed it.
        OSError: it cannot be written.
    """
    made = [above for above in path.parents if not above.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            made.insert(0, path)
        begun = path in made or os.path.lexists(path / lock)
        _refuse_foreign(path, ours if begun else lambda relative: False, remedy)
        name = os.fspath(path / lock)
        file = open(name, "w", opener=lambda *_: os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))  # noqa: SIM115
    except OSError:
        _remove_empty(made)
        raise
    if not alone(file):
        file.close()
        raise Busy(f"{path}: another process is at work there; wait for it")
    try:
        there = os.stat(name).st_ino
    except FileNotFoundError:
        there = None
    if there != os.fstat(file.fileno()).st_ino:  # it was locked until it was removed
        file.close()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return Held(path, file, ours, made, begun)


def _refuse_foreign(path: Path, ours: Callable[[str], bool], remedy: str) -> None:
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise UserError(f"{path}: is in the way, and no directory of ours; {remedy}")
    for entry, relative in _below(path):
        plain = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
        if not (plain and ours(relative)):
            raise UserError(f"{path}: holds {relative}, so it is not ours to use and delete; {remedy}")


def _below(path: Path, deepest_first: bool = False, prefix: str = "") -> Iterator[tuple[os.DirEntry, str]]:
    """Everything in a directory, and its relative path; links are not followed."""
    with os.scandir(path) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        inside = entry.is_dir(follow_symlinks=False)
        relative = f"{prefix}{entry.name}{'/' if inside else ''}"
        if not deepest_first:
            yield entry, relative
        if inside:
            yield from _below(Path(entry.path), deepest_first, relative)
        if deepest_first:
            yield entry, relative


def _remove_empty(directories: list[Path]) -> None:
    for one in directories:
        with contextlib.suppress(OSError):
            one.rmdir()
