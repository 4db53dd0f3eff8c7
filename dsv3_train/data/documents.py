"""Documents out of one input file, or out of a range of its lines; what cannot be read is reported, not raised."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from dsv3_train.data.inputs import InputFile

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file; of a file of lines, the lines that begin there."""

    file: InputFile
    start: int
    end: int


@dataclass(frozen=True)
class Fault:
    """Why something is not a document."""

    reason: str


class _Damaged(Exception):
    """Compressed data that ends early or is not what its name says."""


def read(piece: Piece, text_key: str) -> Iterator[tuple[int, str | Fault | None]]:
    """(line, document) in order; a Fault for what is lost, None for a blank line.

    Lines count from 1 within the piece; 0 stands for a file that is one document.
    """
    with open(piece.file.path, "rb") as stream:
        if piece.file.is_lines:
            yield from _read_lines(piece, stream, text_key)
        else:
            yield 0, _read_whole(piece, stream)


def _read_whole(piece: Piece, stream: BinaryIO) -> str | Fault:
    try:
        return _text(b"".join(_chunks(piece, stream)))
    except _Damaged as damage:
        return Fault(str(damage))


def _read_lines(piece: Piece, stream: BinaryIO, text_key: str) -> Iterator[tuple[int, str | Fault | None]]:
    number = 0
    try:
        for line in _split(piece, stream):
            number += 1
            yield number, _parse(line, text_key) if line.strip() else None
    except _Damaged as damage:
        yield number + 1, Fault(f"{damage}; this line and all after it are lost")


def _split(piece: Piece, stream: BinaryIO) -> Iterator[bytes]:
    if not piece.file.compression:
        position = piece.start
        if position:
            # The line that holds the byte before belongs to the piece before.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < piece.end and (line := stream.readline()):
            position += len(line)
            yield line
        return
    parts: list[bytes] = []
    for chunk in _chunks(piece, stream):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*parts, line])
            parts = []
        parts.append(rest)
    if last := b"".join(parts):
        yield last


def _chunks(piece: Piece, stream: BinaryIO) -> Iterator[bytes]:
    """Decompressed bytes, any number of gzip members or zstd frames one after the other."""
    if not piece.file.compression:
        yield stream.read()
        return
    new: Callable[[], Any] = lambda: zlib.decompressobj(wbits=31)  # noqa: E731
    damage: tuple[type[Exception], ...] = (zlib.error,)
    if piece.file.compression == ".zst":
        import zstandard  # only here: the rest of a run does without

        new, damage = zstandard.ZstdDecompressor().decompressobj, (zstandard.ZstdError,)
    decompress = new()
    try:
        while chunk := stream.read(_CHUNK):
            while chunk:
                if decompress.eof:
                    decompress = new()
                yield decompress.decompress(chunk)
                chunk = decompress.unused_data
    except damage as error:
        raise _Damaged(f"damaged {piece.file.compression} data ({error})") from None
    if not decompress.eof:
        raise _Damaged(f"truncated {piece.file.compression} data")


def _parse(line: bytes, text_key: str) -> str | Fault:
    text = _text(line)
    if isinstance(text, Fault):
        return text
    try:
        record = json.loads(text)
    except ValueError as error:
        return Fault(f"invalid JSON ({error})")
    except RecursionError:
        return Fault("invalid JSON (nested too deeply)")
    if not isinstance(record, dict):
        return Fault(f"not a JSON object but {type(record).__name__}")
    if text_key not in record:
        return Fault(f"no key {text_key!r}")
    document = record[text_key]
    if not isinstance(document, str):
        return Fault(f"key {text_key!r} is {type(document).__name__}, not a string")
    try:
        document.encode()
    except UnicodeEncodeError as error:
        return Fault(f"key {text_key!r}: lone surrogate at character {error.start}")
    return document


def _text(raw: bytes) -> str | Fault:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Fault(f"not UTF-8 at byte {error.start}")
