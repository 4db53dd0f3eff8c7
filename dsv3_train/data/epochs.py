"""Megatron-core's packed datasets in an order that does not depend on how long the run is."""

from __future__ import annotations

from unittest import mock

import numpy as np
from megatron.core.datasets import gpt_dataset


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
