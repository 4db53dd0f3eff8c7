"""Where a sample comes from: the documents that it was packed of."""

from __future__ import annotations

from typing import Any

import numpy as np


def outside(dataset: Any, sample: int, vocab_size: int) -> str:
    """Name the first token of a sample that a model of so many has not, its dataset and its document.

    Args:
        dataset: as `datasets.build` returns it: Megatron-core's blend, or one dataset.
    """
    inner, number = dataset, sample
    while hasattr(inner, "dataset_sample_index"):
        inner, number = (
            inner.datasets[int(inner.dataset_index[number])],
            int(inner.dataset_sample_index[number]),
        )
    ids, documents = inner._query_document_sample_shuffle_indices(number)
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if not wrong.size:
        return f"sample {sample} of {inner.dataset_path} had a token outside the vocabulary, and has none any more"
    place = int(wrong[0])
    _, begin = inner.sample_index[inner.shuffle_index[number]]
    lengths = inner.dataset.sequence_lengths[documents].astype(np.int64)
    lengths[0] -= int(begin)
    part = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
    return (
        f"sample {sample} holds token {int(ids[place])}, of document {int(documents[part])} of {inner.dataset_path}, "
        f"but model.vocab_size is {vocab_size}"
    )
