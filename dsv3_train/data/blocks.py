"""Hashes of parts of a file that lie evenly over it: a look into files of any size in bounded time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

SIZE, COUNT = 1 << 16, 256
"""Bytes of a block, and how many at most: files of up to 16 MiB are looked at as a whole."""


def read(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(where it begins, contents) of each block; the first and the last ones of the file are among them."""
    with open(path, "rb") as file:
        blocks = -(-file.seek(0, 2) // SIZE)
        count = min(blocks, COUNT)
        for number in range(count):
            start = (number * (blocks - 1) // max(count - 1, 1)) * SIZE
            file.seek(start)
            yield start, file.read(SIZE)


def digests(path: str | Path) -> list[str]:
    """The first 16 digits of each block's sha256."""
    return [digest(block) for _, block in read(path)]


def digest(block: bytes) -> str:
    """As `digests` gives it."""
    return hashlib.sha256(block).hexdigest()[:16]
