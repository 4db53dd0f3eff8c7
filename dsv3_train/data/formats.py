"""What an input file is, found by looking into it: its name alone says little, and often the wrong thing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from dsv3_train.data import compression
from dsv3_train.data.compression import Damaged

_HEAD = 1 << 16
_LINES = {".jsonl", ".ndjson", ".json"}
_TABLES = {".tsv": "tabs", ".csv": "commas"}
_PROSE = {".txt", ".text", ".md", ".rst"}
_KNOWN = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"\x04\x22\x4d\x18": "lz4 data; write it as .zst or .gz",
    b"\x1f\x9d": "data of `compress`; write it as .zst or .gz",
    b"ARROW1": "an Arrow file; write it as Parquet or JSONL",
    b"Obj\x01": "an Avro file; write it as Parquet or JSONL",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF; extract its text",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x7fELF": "a program",
    b"MMIDIDX": "the index of a dataset",
    b"\xff\xfe": "UTF-16; write it as UTF-8",
    b"\xfe\xff": "UTF-16; write it as UTF-8",
}
_TAR_AT, _TAR = 257, b"ustar"
_OBJECT = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')


@dataclass(frozen=True)
class Format:
    """How documents are read out of a file."""

    kind: Literal["text", "lines", "parquet", "unknown"]
    """`text`: the file is one document; `lines`: one JSON object a line."""
    compression: str = ""
    """`.gz`, `.zst`, `.bz2`, `.xz` or empty."""
    fault: str = ""
    """Why the file cannot be read, of kind `unknown`."""


TEXT = Format("text")


def look(path: str, text_key: str) -> Format:
    """The format of a file by its first 64 KiB of content; its name decides where content leaves a choice.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        packed = compression.of(stream.read(16))
        stream.seek(0)
        name = path.lower()
        claimed = compression.named(name)
        head = _beginning(stream, packed)
    if claimed and not packed:
        return Format("unknown", fault=f"holds no {claimed} data, though its name says so; rename it")
    suffix = Path(name.removesuffix(claimed)).suffix
    if head.startswith(b"PAR1"):
        return Format("unknown", fault=f"Parquet inside {packed}; unpack it") if packed else Format("parquet")
    if suffix == ".parquet":
        return Format("unknown", fault="holds no Parquet, though its name says so; rename or remove it")
    fault = _binary(head) or _table(head, suffix) if not _is_json(head) else _one_json(head)
    if fault:
        return Format("unknown", packed, fault)
    return Format("lines" if suffix in _LINES or _has_lines(head, suffix, text_key) else "text", packed)


def _beginning(stream: BinaryIO, packed: str) -> bytes:
    head = b""
    try:
        for chunk in compression.chunks(stream, packed):
            head += chunk[:_HEAD]
            if len(head) >= _HEAD:
                break
    except Damaged:  # told when it is read
        pass
    return head[:_HEAD].removeprefix(b"\xef\xbb\xbf")


def _binary(head: bytes) -> str:
    for magic, what in _KNOWN.items():
        if head.startswith(magic):
            return what
    if head[_TAR_AT:].startswith(_TAR):
        return "a tar archive; unpack it"
    if compression.of(head):
        return "compressed twice; unpack it once"
    if head.count(0) > len(head) // 10:  # UTF-16 has a zero byte in every second one
        return "binary data, or text that is not UTF-8"
    return ""


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] in (b"{", b"[")


def _lines(head: bytes) -> list[bytes]:
    """The first lines that are there whole and not blank."""
    lines = head.split(b"\n")
    if len(head) >= _HEAD:
        lines.pop()
    return [line for line in lines if line.strip()][:8]


def _one_json(head: bytes) -> str:
    """A fault where JSON begins that goes on over several lines."""
    first, second, *_ = [*(line.strip() for line in _lines(head)), b"", b""]
    if first != b"[" and not (first == b"{" and second.startswith((b'"', b"}"))):
        return ""
    return "JSON that goes on over several lines; write one object per line (JSONL)"


def _table(head: bytes, suffix: str) -> str:
    told = "; nothing says which column is the text: write it as JSONL or Parquet"
    if suffix in _TABLES:
        return f"a table of columns between {_TABLES[suffix]}{told}"
    lines = _lines(head)
    tabs = {line.count(b"\t") for line in lines}
    indented = any(line.startswith(b"\t") for line in lines)
    if len(lines) >= 3 and len(tabs) == 1 and 0 not in tabs and not indented and suffix not in _PROSE:
        return f"looks like a table of columns between tabs{told}; as one document of text, name it .txt"
    return ""


def _has_lines(head: bytes, suffix: str, text_key: str) -> bool:
    """Whether the content is one JSON object a line, though the name does not say so."""
    lines = _lines(head)
    if not lines:  # the first line is longer than what is looked at
        return _OBJECT.match(head) is not None
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            return False
    if not all(isinstance(record, dict) for record in records):
        return False
    # A lone object without text may be the settings of some program among its sources.
    return all(text_key in record for record in records) or (suffix not in _PROSE and (len(records) > 1 or not suffix))
