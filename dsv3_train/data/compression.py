"""Compressed files read in pieces of bounded size, whatever their contents unfold to."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
"""What a compressed file begins with; `.gz` and so on are the names of the formats here."""
_READ, _WRITTEN = 1 << 16, 1 << 20
_ZSTD_READ = 1 << 11
"""zstandard has no limit for what a call returns: so many bytes unfold to at most 64 MiB (4 bytes to 128 KiB)."""
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 500
"""Text shrinks 3 to 20 times. A file is refused that has unfolded to more than both."""


class Damaged(Exception):
    """A file that cannot be read to its end. The message says why, without the file's name."""


def named(name: str) -> str:
    """The compression that a file's name speaks of, or an empty string."""
    return next((suffix for suffix in MAGIC.values() if name.lower().endswith(suffix)), "")


def of(head: bytes) -> str:
    """The compression of a file that begins with these bytes, or an empty string."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")


def chunks(stream: BinaryIO, compression: str) -> Iterator[bytes]:
    """The contents of a file, any number of members or frames one after the other, at most 64 MiB at a time.

    Zero bytes behind the last member of .gz and .xz are padding (tapes and block devices leave them), not damage.

    Raises:
        Damaged: the data ends early, is not of this format, or unfolds without end.
    """
    if not compression:
        while chunk := stream.read(_WRITTEN):
            yield chunk
        return
    read = written = 0
    unfold = _new(compression)
    while chunk := stream.read(_ZSTD_READ if compression == ".zst" else _READ):
        read += len(chunk)
        while chunk:
            if unfold.eof:
                if compression in (".gz", ".xz") and not (chunk := chunk.lstrip(b"\0")):
                    break
                unfold = _new(compression)
            for part in _unfolded(unfold, chunk, compression):
                written += len(part)
                if written > _BOMB_BYTES and written > _BOMB_RATIO * read:
                    raise Damaged(f"{compression} data that unfolds to over {_BOMB_RATIO} times its size is no text")
                yield part
            chunk = unfold.unused_data  # of the next member or frame
    if not unfold.eof:
        raise Damaged(f"truncated {compression} data")


def _new(compression: str) -> Any:
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    if compression == ".bz2":
        return bz2.BZ2Decompressor()
    if compression == ".xz":
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=1 << 30)
    import zstandard  # only here: the rest of a run does without

    return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()


def _unfolded(unfold: Any, chunk: bytes, compression: str) -> Iterator[bytes]:
    """What comes out until the decompressor wants more or its member ends."""
    damage: list[type[Exception]] = [zlib.error, OSError, ValueError, lzma.LZMAError, EOFError]
    if compression == ".zst":
        import zstandard

        damage.append(zstandard.ZstdError)
    try:
        if compression == ".zst":
            yield unfold.decompress(chunk)
        elif compression == ".gz":
            part = unfold.decompress(chunk, _WRITTEN)
            while not unfold.eof and (unfold.unconsumed_tail or len(part) == _WRITTEN):
                yield part
                part = unfold.decompress(unfold.unconsumed_tail, _WRITTEN)
            yield part
        else:
            part = unfold.decompress(chunk, _WRITTEN)
            while not unfold.eof and not unfold.needs_input:
                yield part
                part = unfold.decompress(b"", _WRITTEN)
            yield part
    except tuple(damage) as error:
        raise Damaged(f"damaged {compression} data ({error})") from None
