"""One shard of a corpus: its documents tokenised, in a worker process that loads nothing heavy."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dsv3_train import regular
from dsv3_train.data import fim
from dsv3_train.data.compression import Damaged
from dsv3_train.data.cutting import Cutter
from dsv3_train.data.documents import Document, Fault, Piece, read
from dsv3_train.data.inputs import InputFile
from dsv3_train.data.special_tokens import DEFINITION
from dsv3_train.data.tokenizer import Tokenizer
from dsv3_train.errors import UserError

FAULTS_LISTED = 100
"""Faults that a part, and a manifest, name; all of them are counted."""
_LARGEST, _SMALLEST, _SHARDS = 64 << 20, 128 << 10, 64
_CHECKED_EVERY, _CHECKED_CHARACTERS = 64, 4096
"""Of every so many documents, so many characters are turned back into text."""


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
    lost: int = 0
    """Files that could not be read to their end, counted in `bad` too."""
    checked_characters: int = 0
    lost_characters: int = 0
    """Of the checked ones: those that are not in the text that their token ids stand for."""
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
        content = [(p.file.name, hashes[p.file.path], p.start, p.end, asdict(p.file.format)) for p in pieces]
        settings = (tokenizer_hash, work.fim_rate, work.seed, work.text_key, work.dtype)
        key = hashlib.sha256(json.dumps([content, settings]).encode()).hexdigest()
        shards.append(Shard(len(shards), tuple(pieces), key))
        pieces.clear()

    for file in files:
        divisible = file.format.kind == "lines" and not file.format.compression
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
        part = Part(**json.loads(regular.read(stem.with_suffix(".json"))))
        size = stem.with_suffix(".bin").stat().st_size
        lengths = np.load(stem.with_suffix(".npy"), allow_pickle=False)
        counted = lengths.shape == (part.documents,) and int(lengths.sum()) == part.tokens
        fits = part.key == shard.key and size == part.tokens * np.dtype(work.dtype).itemsize
    except (OSError, ValueError, TypeError, EOFError, RecursionError, UserError):
        return None
    return part if fits and counted else None


def tokenise(shard: Shard, work: Work) -> Part:
    """Write the shard's part; its .json comes last and says that the rest is whole.

    Raises:
        UserError: a package that reads one of the files is missing.
    """
    tokenizer, cutter = _tokenizer(work.tokenizer)
    part = Part(shard.key)
    lengths: list[int] = []
    stem = Path(work.parts, f"{shard.number:06d}")
    # A part of other settings must not look finished while it is overwritten.
    stem.with_suffix(".json").unlink(missing_ok=True)
    with open(stem.with_suffix(".bin"), "wb") as out:
        for bad, document in _documents(shard, work, part):
            begin, length = out.tell(), 0
            seen = collections.Counter[str]()

            def counted(texts: Iterable[str], seen: collections.Counter[str] = seen) -> Iterator[str]:
                for text in texts:
                    seen["bytes"] += len(text.encode())
                    seen["characters"] += len(text)
                    yield text

            try:
                middle = fim.cuts(_characters(document)(), work.fim_rate, work.seed)
                for ids in document_ids(tokenizer, cutter, document, middle, counted):
                    out.write(np.array(ids, work.dtype).tobytes())
                    length += len(ids)
                if length > np.iinfo(np.int32).max:
                    raise Damaged("has more tokens than an index can count (2^31); divide it")
            except Damaged as damage:  # of a text that is read while it is encoded
                out.seek(begin)
                out.truncate()
                bad(Fault(str(damage)))
                continue
            if part.documents % _CHECKED_EVERY == 0 and isinstance(document, str):
                checked = document[:_CHECKED_CHARACTERS]
                part.checked_characters += len(checked)
                part.lost_characters += characters_lost(tokenizer, checked)
            lengths.append(length)
            part.documents += 1
            part.bytes += seen["bytes"]
            part.characters += seen["characters"]
            part.tokens += length
            part.fim_documents += middle is not None
    np.save(stem.with_suffix(".npy"), np.array(lengths, np.int32))
    unfinished = stem.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(part)), encoding="utf-8")
    os.replace(unfinished, stem.with_suffix(".json"))
    return part


def document_ids(
    tokenizer: Tokenizer,
    cutter: Cutter,
    document: Document,
    middle: tuple[int, int] | None,
    through: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Iterator[list[int]]:
    """Token ids of one document, its end included, in order and in pieces that bound the memory they take.

    Args:
        middle: where the middle begins and ends if the document is rearranged for fill-in-the-middle.
        through: every text that is encoded goes through it.

    Raises:
        Damaged: a long text cannot be read, or cannot be cut.
    """
    characters = _characters(document)
    if middle is None:
        parts: list[tuple[list[int], Iterable[str]]] = [([], characters())]
    else:
        begin, end = middle
        hole, finish = [tokenizer.special("fim_hole")], [tokenizer.special("fim_end")]
        parts = [([tokenizer.special("fim_begin")], characters(0, begin)), (hole, characters(end))]
        parts.append((finish, characters(begin, end)))
    for mark, texts in parts:
        yield mark
        for text in cutter.pieces(through(texts)):
            yield tokenizer.encode(text)
    yield [tokenizer.eos_id]


def _characters(document: Document) -> Callable[..., Iterable[str]]:
    if not isinstance(document, str):
        return document.characters
    return lambda begin=0, end=None: [document[begin:end]]


def characters_lost(tokenizer: Tokenizer, text: str) -> int:
    """Characters of a text that are not in decode(encode(text)), however often each."""
    back = tokenizer.decode(tokenizer.encode(text))
    return 0 if back == text else (collections.Counter(text) - collections.Counter(back)).total()


def _documents(shard: Shard, work: Work, part: Part) -> Iterator[tuple[Callable[[Fault], None], Document]]:
    """(what takes a fault of it, document)."""
    for piece in shard.pieces:
        line = 0

        def bad(fault: Fault, piece: Piece = piece) -> None:
            part.bad += 1
            part.lost += fault.lost
            if len(part.faults) < FAULTS_LISTED:
                part.faults.append((piece.file.name, line, fault.reason))  # noqa: B023 (the line it is at)

        for line, item in read(piece, work.text_key):  # noqa: B007 (used by `bad`)
            if isinstance(item, Fault):
                bad(item)
            elif item:
                yield bad, item
            elif item is not None:
                part.empty_documents += 1
        part.lines[piece.file.name] = part.lines.get(piece.file.name, 0) + line


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> tuple[Tokenizer, Cutter]:
    tokenizer = Tokenizer.load(path)
    return tokenizer, Cutter(json.loads(tokenizer.files[DEFINITION]))
