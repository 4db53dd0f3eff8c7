"""Fill-in-the-middle at document level, prefix-suffix-middle order (technical report, section 4.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def cuts(texts: Iterable[str], rate: float, seed: int) -> tuple[int, int] | None:
    """Where the middle of a document begins and ends, in characters; None for one that stays as it is.

    A document is chosen with probability `rate`. Choice and cuts (between characters, uniform) come from a hash of the
    seed and the text alone, so that they do not depend on where or by which process the document is read.

    Args:
        texts: the document, in one piece or several.
    """
    if rate == 0:
        return None
    hashed, length = hashlib.blake2b(digest_size=24, key=str(seed).encode()), 0
    for text in texts:
        hashed.update(text.encode())
        length += len(text)
    digest = hashed.digest()
    chance, first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if chance >= rate * 2**64:
        return None
    begin, end = sorted((first % (length + 1), second % (length + 1)))
    return begin, end
