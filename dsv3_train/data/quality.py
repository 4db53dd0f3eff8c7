"""How much of a corpus may be lost before it is refused: unreadable documents, characters that no token has."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsv3_train.data.documents import Fault, LongText, Piece, read
from dsv3_train.data.inputs import InputFile
from dsv3_train.data.shard import Part, characters_lost
from dsv3_train.data.tokenizer import Tokenizer
from dsv3_train.errors import UserError

MAX_CHARACTERS_LOST = 0.001
"""Share of characters that encoding and decoding may lose: a stray normalisation, not a script."""
_PLACES, _PLACES_OF_A_FILE, _DOCUMENTS, _CHARACTERS = 256, 32, 4, 1 << 12
"""Looked at beforehand: places of the corpus and of one file, documents from each, characters of each document."""
_PLACE = 1 << 20
"""Bytes of a place."""


@dataclass
class Look:
    """What a look into a corpus found."""

    texts: list[str]
    bad: int = 0
    first: str = ""
    """Place and reason of the first fault."""


def look(files: list[InputFile], text_key: str) -> Look:
    """The beginnings of some documents, from places that lie evenly over all files."""
    found = Look([])
    for piece in _places(files):
        for number, (line, item) in enumerate(read(piece, text_key)):
            if isinstance(item, Fault):
                found.bad += 1
                place = f"{piece.file.name}:{line}" if line and not piece.start else piece.file.name
                found.first = found.first or f"{place}: {item.reason}"
            elif isinstance(item, LongText):
                text = ""
                for part in item.characters(0, _CHARACTERS):
                    text += part
                found.texts.append(text)
            elif item:
                found.texts.append(item[:_CHARACTERS])
            if number + 1 >= _DOCUMENTS:
                break
    return found


def _places(files: list[InputFile]) -> Iterator[Piece]:
    if len(files) > _PLACES:
        files = [files[i * len(files) // _PLACES] for i in range(_PLACES)]
    draw = random.Random(0)
    each = min(_PLACES // max(len(files), 1), _PLACES_OF_A_FILE)
    for file in files:
        yield Piece(file, 0, file.size)
        if file.format.kind == "lines" and not file.format.compression and file.size > _PLACE:
            for start in sorted(draw.randrange(file.size) for _ in range(each - 1)):
                yield Piece(file, start, min(start + _PLACE, file.size))


def refuse_unreadable(found: Look, max_bad: float, names: str) -> None:
    """Refuse a corpus that is mostly unreadable, before anything is made of it.

    Raises:
        UserError: it is.
    """
    seen = found.bad + len(found.texts)
    if seen and found.bad / seen > max(max_bad, 0.5):
        raise UserError(_too_bad(f"{found.bad} of {seen} documents looked at", names, found.first, max_bad))


def refuse_lossy(found: Look, tokenizer: Tokenizer, names: str) -> None:
    """Refuse a corpus that the tokenizer cannot spell.

    Raises:
        UserError: it loses more than `MAX_CHARACTERS_LOST`.
    """
    lost = sum(characters_lost(tokenizer, text) for text in found.texts)
    _refuse_loss(tokenizer, lost, sum(map(len, found.texts)), names)


def refuse(results: Iterable[Part], files: int, first: str, tokenizer: Tokenizer, max_bad: float, names: str) -> None:
    """Refuse a corpus of which too much was lost on the way to its parts.

    Raises:
        UserError: documents, files or characters.
    """
    results = list(results)
    documents, bad = sum(part.documents for part in results), sum(part.bad for part in results)
    lost = sum(part.lost for part in results)
    if bad and bad / (documents + bad) > max_bad:
        raise UserError(_too_bad(f"{bad} of {documents + bad} documents", names, first, max_bad))
    if lost / files > max_bad:
        raise UserError(_too_bad(f"{lost} of {files} files to their end", names, first, max_bad))
    _refuse_loss(
        tokenizer,
        sum(part.lost_characters for part in results),
        sum(part.checked_characters for part in results),
        names,
    )


def _too_bad(what: str, names: str, first: str, max_bad: float) -> str:
    return (
        f"{names}: cannot read {what}, more than the allowed share of {max_bad:.3g}; {first}; correct the inputs, or "
        "raise --max-bad (data.prepare.max_bad)"
    )


def _refuse_loss(tokenizer: Tokenizer, lost: int, characters: int, names: str) -> None:
    if lost > MAX_CHARACTERS_LOST * characters:
        raise UserError(
            f"{tokenizer.name}: loses {lost} of {characters} characters of {names}, because it changes letters or has "
            "no tokens for them; give one without loss, such as byte-level BPE"
        )
