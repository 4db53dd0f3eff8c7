"""Documents out of one input file, or out of a range of its lines; what cannot be read is reported, not raised."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Union

from dsv3_train.data import compression, parquet
from dsv3_train.data.compression import Damaged
from dsv3_train.data.inputs import InputFile

LONGEST_LINE = 256 << 20
"""Bytes. JSON has to be in memory as a whole, up to five times over."""
_HELD = 1 << 22
"""Characters of a text file that are read into memory; a longer one is read as it is used."""


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
    lost: bool = False
    """The rest of its file is lost with it, however much that is."""


@dataclass(frozen=True)
class LongText:
    """A text file that is too long to be in memory, as one document."""

    piece: Piece

    def characters(self, begin: int = 0, end: int | None = None) -> Iterator[str]:
        """The characters [begin, end), read from the file piece by piece.

        Raises:
            Damaged: it cannot be read to its end.
        """
        position = 0
        for text in _texts(self.piece):
            if end is not None and position >= end:
                return
            part = text[max(begin - position, 0) : None if end is None else end - position]
            position += len(text)
            if part:
                yield part


Document = Union[str, LongText]


def read(piece: Piece, text_key: str) -> Iterator[tuple[int, Document | Fault | None]]:
    """(line, document) in order; a Fault for what is lost, None for a blank line.

    Lines (rows of Parquet) count from 1 within the piece; 0 stands for a file that is one document.

    Raises:
        UserError: Parquet without the package that reads it.
    """
    kind = piece.file.format.kind
    if kind == "unknown":
        yield 0, Fault(piece.file.format.fault)
    elif kind == "text":
        yield 0, _read_whole(piece)
    else:
        number = 0
        try:
            for number, item in _rows(piece, text_key):
                yield number, item
        except Damaged as damage:
            yield number + 1, Fault(f"{damage}; this line and all after it are lost", lost=True)


def _rows(piece: Piece, text_key: str) -> Iterator[tuple[int, str | Fault | None]]:
    if piece.file.format.kind == "parquet":
        for number, value in enumerate(parquet.values(piece.file.path, text_key), 1):
            yield number, _document(value, text_key)
        return
    with open(piece.file.path, "rb") as stream:
        for number, line in enumerate(_split(piece, stream), 1):
            if line is None:
                yield (
                    number,
                    Fault(f"longer than {LONGEST_LINE >> 20} MiB; give the document as a text file of its own"),
                )
            else:
                yield number, _parse(line, text_key) if line.strip() else None


def _read_whole(piece: Piece) -> Document | Fault:
    held: list[str] = []
    size = 0
    try:
        for text in _texts(piece):
            held.append(text)
            size += len(text)
            if size > _HELD:
                return LongText(piece)
    except Damaged as damage:
        return Fault(str(damage))
    return "".join(held)


def _texts(piece: Piece) -> Iterator[str]:
    """A file's text in pieces, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, pending, first = 0, 0, True
    with open(piece.file.path, "rb") as stream:
        for chunk in _and_end(compression.chunks(stream, piece.file.format.compression)):
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise Damaged(f"not UTF-8 at byte {position - pending + error.start}") from None
            position += len(chunk)
            pending = len(decoder.getstate()[0])
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text


def _and_end(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if chunk:
            yield chunk
    yield b""


def _split(piece: Piece, stream: BinaryIO) -> Iterator[bytes | None]:
    """Lines, None for one that is too long."""
    if not piece.file.format.compression:
        position = piece.start
        if position:
            # The line that holds the byte before belongs to the piece before.
            stream.seek(position - 1)
            position += _skip_line(stream) - 1
        while position < piece.end and (line := stream.readline(LONGEST_LINE)):
            position += len(line)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                line = b""
                position += _skip_line(stream)
                yield None
            else:
                yield line
        return
    parts: list[bytes] = []
    size = 0
    for chunk in compression.chunks(stream, piece.file.format.compression):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*parts, line]) if size + len(line) < LONGEST_LINE else None
            parts, size = [], 0
        size += len(rest)
        parts = [*parts, rest] if size < LONGEST_LINE else []
    if size >= LONGEST_LINE:
        yield None
    elif last := b"".join(parts):
        yield last


def _skip_line(stream: BinaryIO) -> int:
    """Bytes to the end of this line, which are passed over."""
    passed = 0
    while part := stream.readline(1 << 20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _parse(line: bytes, text_key: str) -> str | Fault:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Fault(f"not UTF-8 at byte {error.start}")
    try:
        record = json.loads(text)
    except ValueError as error:
        return Fault(f"invalid JSON ({error})")
    except RecursionError:
        return Fault("invalid JSON (nested too deeply)")
    if not isinstance(record, dict):
        return Fault(f"not a JSON object but {type(record).__name__}")
    if text_key not in record:
        others = ", ".join(repr(key[:40]) for key, value in [*record.items()][:8] if isinstance(value, str))
        return Fault(f"no key {text_key!r}" + (f" (text is in {others}; see --text-key)" if others else ""))
    return _document(record[text_key], text_key)


def _document(value: object, text_key: str) -> str | Fault:
    if not isinstance(value, str):
        return Fault(f"key {text_key!r} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Fault(f"key {text_key!r}: lone surrogate at character {error.start}")
    return value
