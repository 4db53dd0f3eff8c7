"""What a dataset is: its index read whole, its tokens in blocks, so that damage is met before it is trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Union

import numpy as np

from dsv3_train.data import blocks, index, manifest
from dsv3_train.data.manifest import Manifest
from dsv3_train.errors import UserError

_ENDS_SEEN, _ENDS_EXPECTED = 1000, 0.9
_HASHED = 1 << 28
"""Bytes of tokens that are hashed as a whole where their manifest has no hashes of blocks."""
_FILES = ("bin", "idx", "tokenizer.json")


@dataclass(frozen=True)
class Identity:
    """A dataset, so that another one under its name is told from it."""

    documents: int
    tokens: int
    dtype: str
    index: str
    """sha256 of the .idx."""
    blocks: str
    """sha256 over the hashes of the .bin's blocks (data/blocks.py)."""
    tokenizer: Union[str, None]
    """sha256 of the tokenizer it was made with; None: not known."""

    def unlike(self, other: Identity) -> list[str]:
        """How another one differs, in words."""
        before, now = asdict(self), asdict(other)
        told = [
            f"{key} {before[key]:,}, now {now[key]:,}" for key in ("documents", "tokens") if before[key] != now[key]
        ]
        return told + [f"another {key}" for key in ("dtype", "index", "blocks", "tokenizer") if before[key] != now[key]]


@dataclass(frozen=True)
class Met:
    """A dataset that was looked at."""

    identity: Identity
    notes: tuple[str, ...]
    """What a run should say of it."""
    state: list[list[int]]
    """Size, times of change in nanoseconds of its files: while they stay, it need not be looked at again."""


def state(prefix: str) -> list[list[int]]:
    """See `Met.state`; zeros for a file that is not there."""
    found = []
    for end in _FILES:
        try:
            stat = os.stat(f"{prefix}.{end}")
            found.append([stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
        except OSError:
            found.append([0, 0, 0])
    return found


_met: dict[str, tuple[int, Met]] = {}
"""What this process has looked at, by prefix, with the vocabulary it was looked at for."""


def meet(prefix: str, vocab_size: int) -> Met:
    """Look at a dataset: the index in whole; of the tokens as many bytes as `blocks` reads, whatever their number.

    Raises:
        UserError: it is damaged, is not what its manifest says, or holds tokens that the model lacks.
    """
    now = state(prefix)
    if prefix in _met and _met[prefix][0] == vocab_size and _met[prefix][1].state == now:
        return _met[prefix][1]
    found = index.read(prefix)
    index.verify(prefix, found)
    known = manifest.load(prefix)
    identity = Identity(
        documents=len(found.lengths),
        tokens=found.tokens,
        dtype=found.dtype.name,
        index=_compare_hash(prefix, known, "idx"),
        blocks=_blocks(prefix, found, known, vocab_size),
        tokenizer=known.tokenizer.sha256 if known else _tokenizer_hash(prefix),
    )
    met = Met(identity, tuple(_without_ends(prefix, found, known)), now)
    _met[prefix] = vocab_size, met
    return met


def compare_whole(prefix: str, known: Manifest | None) -> None:
    """Read the whole dataset and compare it with the hashes of its manifest.

    Raises:
        UserError: they differ, or there is no manifest.
    """
    if known is None:
        raise UserError(f"{manifest.path_of(prefix)}: missing, so --verify has nothing to compare {prefix} with")
    for end in ("idx", "bin"):
        _compare_hash(prefix, known, end)


def _compare_hash(prefix: str, known: Manifest | None, end: str) -> str:
    """The sha256 of a file, which is the manifest's if there is one."""
    found = _sha256(f"{prefix}.{end}")
    if known and known.sha256.get(end) != found:
        raise UserError(
            f"{prefix}.{end}: is not what {manifest.path_of(prefix)} says (its sha256 differs): damaged, or of another "
            "dataset; copy all its files or prepare it again"
        )
    return found


def _blocks(prefix: str, found: index.Index, known: Manifest | None, vocab_size: int) -> str:
    seen: list[str] = []
    expected = known.blocks if known else []
    if known and not expected and os.path.getsize(f"{prefix}.bin") <= _HASHED:
        _compare_hash(prefix, known, "bin")  # of a manifest from before it listed blocks
    for number, (start, block) in enumerate(blocks.read(f"{prefix}.bin")):
        seen.append(blocks.digest(block))
        if number < len(expected) and seen[-1] != expected[number]:
            raise UserError(
                f"{prefix}.bin: damaged in bytes {start} to {start + len(block) - 1}: their hash is not that of "
                f"{manifest.path_of(prefix)}; copy or prepare it again"
            )
        tokens = np.frombuffer(block, found.dtype)
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
            token = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise UserError(
                f"{prefix}: holds token {token}, but model.vocab_size is {vocab_size}; "
                "prepare it with the tokenizer of this model"
            )
    return hashlib.sha256("".join(seen).encode()).hexdigest()


def _without_ends(prefix: str, found: index.Index, known: Manifest | None) -> Iterator[str]:
    """A note if many documents do not end with the same token, the tokenizer's end where that is known."""
    count = len(found.lengths)
    numbers = np.unique(np.linspace(0, count - 1, min(count, _ENDS_SEEN)).astype(np.int64))
    tokens = np.memmap(f"{prefix}.bin", found.dtype, "r") if found.tokens else np.zeros(0, found.dtype)
    ends = [
        int(tokens[int(found.offsets[number]) // found.dtype.itemsize + int(found.lengths[number]) - 1])
        for number in numbers
        if found.lengths[number] > 0
    ]
    if not ends or (known is None and len(ends) < 2):
        return
    end = known.tokenizer.eos_id if known else max(set(ends), key=ends.count)
    if ends.count(end) < _ENDS_EXPECTED * len(ends):
        what = f"token {end}, the end of a document" if known else "a token that they share"
        yield (
            f"{prefix}: {len(ends) - ends.count(end)} of {len(ends)} documents looked at do not end with {what}: "
            "a model learns no end from them, and runs documents together; `dsv3 data prepare` writes ends"
        )


def _tokenizer_hash(prefix: str) -> str | None:
    path = Path(f"{prefix}.tokenizer.json")
    return _sha256(path) if path.is_file() else None


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
