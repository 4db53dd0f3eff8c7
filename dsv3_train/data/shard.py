"""One shard of a corpus: its documents tokenised, in a worker process that loads nothing heavy."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dsv3_train.data import fim
from dsv3_train.data.documents import Fault, Piece, read
from dsv3_train.data.inputs import InputFile
from dsv3_train.data.tokenizer import Tokenizer

FAULTS_LISTED = 100
"""Faults that a part, and a manifest, name; all of them are counted."""
_LARGEST, _SMALLEST, _SHARDS = 64 << 20, 128 << 10, 64


@dataclass(frozen=True)
class Work:
    """What all shards have in common."""

    parts: str
    """Directory of the results."""
    tokenizer: str
    fim_rate: float
    seed: int
    text_key: str
    dtype: str


@dataclass(frozen=True)
class Shard:
    """Consecutive pieces of the corpus."""

    number: int
    pieces: tuple[Piece, ...]
    key: str
    """Hash of all that decides the result: input bytes, tokenizer, settings."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass
class Part:
    """A tokenised shard: `NUMBER.bin` (tokens), `NUMBER.npy` (tokens per document, int32), `NUMBER.json` (this)."""

    key: str
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    tokens: int = 0
    fim_documents: int = 0
    empty_documents: int = 0
    bad: int = 0
    faults: list[tuple[str, int, str]] = field(default_factory=list)
    """(file, line within the shard's piece or 0, reason) of the first ones."""
    lines: dict[str, int] = field(default_factory=dict)
    """Lines read of each file."""


def plan(files: Iterable[InputFile], hashes: dict[str, str], work: Work, tokenizer_hash: str) -> list[Shard]:
    """Divide the corpus, in order, into shards; the same ones for any number of workers."""
    files = list(files)
    target = min(_LARGEST, max(_SMALLEST, sum(file.size for file in files) // _SHARDS))
    shards: list[Shard] = []
    pieces: list[Piece] = []

    def close() -> None:
        content = [(p.file.name, hashes[p.file.path], p.start, p.end) for p in pieces]
        settings = (tokenizer_hash, work.fim_rate, work.seed, work.text_key, work.dtype)
        key = hashlib.sha256(json.dumps([content, settings]).encode()).hexdigest()
        shards.append(Shard(len(shards), tuple(pieces), key))
        pieces.clear()

    for file in files:
        divisible = file.is_lines and not file.compression
        step = target if divisible else max(file.size, 1)
        for start in range(0, max(file.size, 1), step):
            pieces.append(Piece(file, start, min(start + step, file.size)))
            if sum(piece.end - piece.start for piece in pieces) >= target:
                close()
    if pieces:
        close()
    return shards


def finished(shard: Shard, work: Work) -> Part | None:
    """The shard's result if an earlier run left it whole."""
    stem = Path(work.parts, f"{shard.number:06d}")
    try:
        part = Part(**json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")))
        size = stem.with_suffix(".bin").stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    return part if part.key == shard.key and size == part.tokens * np.dtype(work.dtype).itemsize else None


def tokenise(shard: Shard, work: Work) -> Part:
    """Write the shard's part; its .json comes last and says that the rest is whole."""
    tokenizer = _tokenizer(work.tokenizer)
    part = Part(shard.key)
    lengths: list[int] = []
    stem = Path(work.parts, f"{shard.number:06d}")
    # A part of other settings must not look finished while it is overwritten.
    stem.with_suffix(".json").unlink(missing_ok=True)
    with open(stem.with_suffix(".bin"), "wb") as out:
        for text in _documents(shard, work, part):
            cut = fim.cut(text, work.fim_rate, work.seed)
            ids = document_ids(tokenizer, text, cut)
            out.write(np.array(ids, work.dtype).tobytes())
            lengths.append(len(ids))
            part.documents += 1
            part.bytes += len(text.encode())
            part.characters += len(text)
            part.tokens += len(ids)
            part.fim_documents += cut is not None
    np.save(stem.with_suffix(".npy"), np.array(lengths, np.int32))
    unfinished = stem.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(part)), encoding="utf-8")
    os.replace(unfinished, stem.with_suffix(".json"))
    return part


def document_ids(tokenizer: Tokenizer, text: str, cut: tuple[str, str, str] | None) -> list[int]:
    """Token ids of one document, its end included; rearranged if `cut` is (prefix, middle, suffix)."""
    if cut is None:
        return [*tokenizer.encode(text), tokenizer.eos_id]
    prefix, middle, suffix = map(tokenizer.encode, cut)
    begin, hole, end = map(tokenizer.special, ("fim_begin", "fim_hole", "fim_end"))
    return [begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_id]


def _documents(shard: Shard, work: Work, part: Part) -> Iterator[str]:
    for piece in shard.pieces:
        line = 0
        for line, item in read(piece, work.text_key):
            if isinstance(item, Fault):
                part.bad += 1
                if len(part.faults) < FAULTS_LISTED:
                    part.faults.append((piece.file.name, line, item.reason))
            elif item:
                yield item
            elif item is not None:
                part.empty_documents += 1
        part.lines[piece.file.name] = part.lines.get(piece.file.name, 0) + line


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)
