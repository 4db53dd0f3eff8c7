"""Which files a corpus is made of."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_train.data.formats import TEXT, Format
from dsv3_train.errors import UserError

STDLIB, PACKAGES = "python-stdlib", "python-packages"
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus."""

    path: str
    name: str
    """What reports call it."""
    size: int
    """Bytes on disk."""

    format: Format = TEXT
    """Found by `formats.look`."""


def find(inputs: Sequence[str]) -> list[InputFile]:
    """The files of every input, each file once.

    Their order is that of a hash of their names within the input: the same wherever the corpus lies, and such that
    the last documents, which may become the validation data, are a sample of all.

    Raises:
        UserError: an input is missing, matches nothing or holds no file.
    """
    found: dict[str, tuple[bytes, InputFile]] = {}
    for given in inputs:
        before = len(found)
        empty = True
        for path, name, relative in _files_of(given):
            empty = False
            name = name.encode(errors="surrogateescape").decode(errors="replace")
            order = hashlib.sha256(relative.encode(errors="surrogateescape")).digest()
            found.setdefault(os.path.realpath(path), (order, InputFile(path, name, os.path.getsize(path))))
        if empty and before == len(found):
            raise UserError(f"{given}: holds no file; give files, directories or globs with text or JSONL")
    return [file for _, file in sorted(found.values(), key=lambda pair: (pair[0], pair[1].name))]


def _files_of(given: str) -> Iterator[tuple[str, str, str]]:
    """(path, name in reports, name within the input) of each file."""
    if given == STDLIB:
        root = sysconfig.get_path("stdlib")
        for path, relative in _walk(root):
            if relative.endswith(".py") and not _NOT_STDLIB.intersection(Path(relative).parts):
                yield path, f"{STDLIB}/{relative}", relative
    elif given == PACKAGES:
        for root in sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")}):
            for path, relative in _walk(root):
                if relative.endswith(".py"):
                    yield path, f"{PACKAGES}/{relative}", relative
    elif os.path.isdir(given):
        for path, relative in _walk(given):
            yield path, path, relative
    elif os.path.isfile(given):
        yield given, given, os.path.basename(given)
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches:
            raise UserError(f"{given}: matches no file")
        for match in matches:
            if os.path.isfile(match):
                yield match, match, os.path.basename(match)
    elif os.path.exists(given):
        raise UserError(f"{given}: is neither a file nor a directory; give files, directories or globs")
    else:
        raise UserError(f"{given}: no such file or directory")


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """(path, path within `root`) of every regular file below it, but for hidden ones."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in files:
            path = os.path.join(directory, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path, os.path.relpath(path, root)
