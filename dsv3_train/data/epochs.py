"""Megatron-core's packed datasets in an order that does not depend on how long the run is, and its caches on disk."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from megatron.core.datasets import blended_dataset, gpt_dataset

from dsv3_train import whole
from dsv3_train.data import blocks
from dsv3_train.errors import UserError

_COMPLETE = "complete"
"""File of a cache that lists the others: sizes and blocks (data/blocks.py). Written last."""


class EpochDataset(gpt_dataset.GPTDataset):
    """Every epoch shuffled by itself, its documents and then its samples, with `data.seed` + its number.

    Megatron-core's own shuffles over all epochs that the samples take: a run that goes on for longer than it was
    begun for would find other text under the numbers of samples that it has trained on, or was told to pass over.
    The first epoch is Megatron-core's own of a run of one epoch. A sample that begins in one epoch and ends in the
    next counts to the next.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        states: list[np.random.RandomState] = []

        def documents(given: np.ndarray, epochs: int, *_unused: object) -> np.ndarray:
            shuffled = np.tile(np.asarray(given, dtype=np.int32), (epochs, 1))
            for epoch, row in enumerate(shuffled):
                states.append(np.random.RandomState(self.config.random_seed + epoch))
                states[-1].shuffle(row)
            return shuffled.reshape(-1)

        def samples(_sans_final: int, total: int, *_unused: object) -> np.ndarray:
            tokens, length = self._get_num_tokens_per_epoch(), self.config.sequence_length
            shuffled = np.arange(total, dtype=np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64)
            extra = int(self.config.add_extra_token_to_sequence)
            ends = [((epoch + 1) * tokens - extra) // length for epoch in range(len(states))]
            for state, begin, end in zip(states, [0, *ends], ends, strict=False):
                state.shuffle(shuffled[begin:end])
            return shuffled

        # What shuffles are functions of that module; what surrounds them (tables, caches) is worth keeping.
        with mock.patch.multiple(gpt_dataset, _build_document_index=documents, _build_shuffle_index=samples):
            return super()._build_document_sample_shuffle_indices()


class _WithoutPickle(ModuleType):
    """numpy for Megatron-core's datasets, but for the one function that would run what a pickle says."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def load(path: str, **_unused: object) -> np.ndarray:
        """An array in numpy's own format, mapped.

        Raises:
            UserError: the file holds something else.
        """
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except ValueError as error:
            raise UserError(f"{path}: no array of numbers ({error}); remove its folder, and start again") from None


@contextlib.contextmanager
def without_pickle() -> Iterator[None]:
    """Let Megatron-core read its caches as plain arrays: it allows pickle, which runs what whoever made it wants."""
    plain = _WithoutPickle("numpy")
    with mock.patch.object(gpt_dataset, "numpy", plain), mock.patch.object(blended_dataset, "numpy", plain):
        yield


def sound(cache: Path) -> bool:
    """Whether a cache is whole and what was written, as far as blocks of its files tell."""
    try:
        return bool(json.loads((cache / _COMPLETE).read_bytes()) == _contents(cache))
    except (OSError, ValueError, RecursionError):
        return False


def remove(cache: Path) -> None:
    """Remove what is not sound, so that it is built again: Megatron-core would load it."""
    if cache.is_symlink():
        cache.unlink()
    shutil.rmtree(cache, ignore_errors=True)


def seal(cache: Path) -> None:
    """Mark a cache whole.

    Raises:
        UserError: it cannot be written.
    """
    whole.write(cache / _COMPLETE, json.dumps(_contents(cache)))


def _contents(cache: Path) -> dict[str, list]:
    files = sorted(path for path in cache.iterdir() if path.suffix == ".npy" and path.is_file())
    return {path.name: [path.stat().st_size, blocks.digests(path)] for path in files}
