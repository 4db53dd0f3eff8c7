"""Fill-in-the-middle at document level, prefix-suffix-middle order (technical report, section 4.1)."""

from __future__ import annotations

import hashlib


def cut(text: str, rate: float, seed: int) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) of a document chosen with probability `rate`, or None for one that stays as it is.

    Choice and cuts (between characters, uniform) come from a hash of the seed and the text alone, so that they do
    not depend on where or by which process the document is read.
    """
    if rate == 0:
        return None
    digest = hashlib.blake2b(text.encode(), digest_size=24, key=str(seed).encode()).digest()
    chance, first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if chance >= rate * 2**64:
        return None
    begin, end = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    return text[:begin], text[begin:end], text[end:]
