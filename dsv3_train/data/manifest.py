"""`PREFIX.manifest.json`: what a dataset holds and how it was made. Written last, it marks the dataset whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Union

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from dsv3_train import regular
from dsv3_train.errors import UserError, on_one_line

LARGEST = 256 << 20
"""Bytes; a million input files take 150 MB."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Settings(_Part):
    """What was asked for."""

    inputs: list[str]
    tokenizer: Union[str, None]
    """sha256 of the tokenizer.json that was given; None: trained on the inputs."""
    vocab_size: Union[int, None]
    """Asked of the trained tokenizer; None: one was given."""
    fim_rate: float = Field(ge=0, le=1)
    seed: int
    text_key: str
    eos_token: Union[str, None] = None
    """That was asked for; None: by the tokenizer's configuration."""


class Counts(_Part):
    """Bytes (UTF-8) and characters are of the documents that were kept."""

    files: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt
    characters: NonNegativeInt
    tokens: NonNegativeInt
    fim_documents: NonNegativeInt
    empty_documents: NonNegativeInt
    """Left out: they have no text."""
    bad: NonNegativeInt
    """Left out: lines or files that could not be read."""


class Bad(_Part):
    """A line (or, with line None, a file) that could not be read."""

    file: str
    line: Union[int, None]
    reason: str


class TokenizerFacts(_Part):
    """The tokenizer in `PREFIX.tokenizer.json`."""

    sha256: str
    vocab_size: PositiveInt
    eos_id: NonNegativeInt
    trained_on_characters: Union[int, None]
    """Characters that the BPE was trained on; None: it was given."""
    training_bound_characters: Union[int, None]
    """At most so many are used, however large the corpus."""


class Source(_Part):
    """One input file."""

    name: str
    bytes: int
    sha256: str


class Manifest(_Part):
    """All of the file."""

    format: int = 1
    settings: Settings
    counts: Counts
    bad: list[Bad]
    """The first ones."""
    tokenizer: TokenizerFacts
    dtype: str
    max_token: NonNegativeInt
    unigram_entropy: float = Field(ge=0)
    """Of the tokens, nats per token: the loss of a model that knows only how frequent each one is."""
    sha256: dict[str, str]
    """Of `bin` and `idx`."""
    blocks: list[str] = []
    """Of parts of the .bin (data/blocks.py): what a run looks at; none in manifests that were written before."""
    inputs: list[Source]
    """In the order of the documents."""
    versions: dict[str, str]


def path_of(prefix: str) -> Path:
    """Where the manifest of the dataset at `prefix` lies."""
    return Path(f"{prefix}.manifest.json")


def load(prefix: str) -> Manifest | None:
    """The manifest of the dataset at `prefix`; None if it has none.

    Raises:
        UserError: it cannot be read.
    """
    path = path_of(prefix)
    try:
        return Manifest.model_validate_json(regular.read(path, LARGEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: not a manifest of this version: {on_one_line(where)}: {first['msg']}; prepare again"
        ) from None


def save(manifest: Manifest, unfinished: Path) -> None:
    """Write to the temporary name `unfinished`."""
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + os.linesep)
