"""A look into an indexed dataset: whole or not, and how its documents begin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np

from dsv3_train.data import identity, index, manifest
from dsv3_train.data.tokenizer import Tokenizer
from dsv3_train.errors import UserError

_TOKENS_SHOWN = 100


@dataclass(frozen=True)
class Document:
    """The beginning of one document."""

    number: int
    tokens: int
    """Of the whole document."""
    first_ids: list[int]
    text: Union[str, None]
    """Of `first_ids`, special tokens spelled out; None without a tokenizer beside the dataset."""


@dataclass(frozen=True)
class Contents:
    """What is at a prefix."""

    documents: int
    tokens: int
    dtype: str
    manifest: Union[manifest.Manifest, None]
    """None: not made by `dsv3 data prepare`."""
    document: Document


def show(prefix: str, number: int, verify: bool = False) -> Contents:
    """Verify the whole index of the dataset at `prefix` and open its document `number` (from 0).

    Args:
        verify: read all tokens too and compare their hash with the manifest's.

    Raises:
        UserError: the dataset is not whole, contradicts its manifest, or has no such document.
    """
    found = index.read(prefix)
    index.verify(prefix, found)
    known = manifest.load(prefix)
    if verify:
        identity.compare_whole(prefix, known)
    if known and (known.counts.tokens, known.counts.documents) != (found.tokens, len(found.lengths)):
        raise UserError(
            f"{manifest.path_of(prefix)}: {known.counts.documents} documents and {known.counts.tokens} tokens, but in "
            f"{prefix}.idx {len(found.lengths)} and {found.tokens}; prepare again"
        )
    if not 0 <= number < len(found.lengths):
        raise UserError(f"--document: {prefix} has documents 0 to {len(found.lengths) - 1}, not {number}")
    length = int(found.lengths[number])
    count = min(length, _TOKENS_SHOWN)
    ids = np.fromfile(f"{prefix}.bin", found.dtype, count, offset=int(found.offsets[number])).tolist()
    tokenizer_file = Path(f"{prefix}.tokenizer.json")
    text = Tokenizer.load(tokenizer_file).decode(ids) if tokenizer_file.is_file() else None
    return Contents(
        documents=len(found.lengths),
        tokens=found.tokens,
        dtype=found.dtype.name,
        manifest=known,
        document=Document(number, length, ids, text),
    )
