"""The datasets of a recipe: documents packed into sequences, blended by weight, by Megatron-core's own classes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_train.data import index, manifest
from dsv3_train.data.check import check
from dsv3_train.data.sets import first_valid, train_sets
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Dataset, Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["build", "check"]


class _NoTokenizer:
    """What Megatron-core's dataset configuration demands of a tokenizer; the data is tokenised already.

    `pad` is an id that no dataset can hold: Megatron takes the loss off every label that equals it. `eod` is used
    by the resets and masks that are off below.
    """

    pad = -1
    eod = None
    vocab_size = None
    unique_identifiers = {"class": "none"}  # noqa: RUF012 (part of the cache's key, by this name)


def build(
    recipe: Recipe, cache_dir: Path, train_samples: int, valid_samples: int
) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]:
    """Training and validation samples. Collective: rank 0 builds the indices, the others then load them.

    A sample is a dict of tokens, labels, position_ids (int64 [s]) and loss_mask (float32 [s], all ones). Documents
    follow one another without masks between them (technical report, section 4.2). Order depends on `data.seed`
    alone: asked for more samples, the first ones stay what they are (data/epochs.py).

    Args:
        cache_dir: where the indices go; all ranks have to see it.
        train_samples: at least as many are there, over several epochs if need be.
        valid_samples: the same; 0 for none.

    Returns:
        (training, validation); the latter None if the recipe sets aside no documents or less than one sequence.

    Raises:
        UserError: see `check`; or this rank does not see what rank 0 wrote.
    """
    check(recipe)
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from dsv3_train.data import epochs

    data = recipe.data
    train = train_sets(recipe)
    blends: dict = {}
    with_valid = valid_samples > 0 and _enough_to_validate(recipe)
    if data.valid:
        blends["blend_per_split"] = [_blend(train), _blend(data.valid) if with_valid else None, None]
    else:
        blends["blend"], blends["split"] = _blend(train), "1"
    cache = cache_dir / _fingerprint(recipe, train_samples, valid_samples)
    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=recipe.training.sequence_length,
        path_to_cache=str(cache),
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blends,
    )
    if not data.valid:
        # The very documents that `check` looked at: Megatron's notation for splits is rounded, and knows no 1e-05.
        share = 1 - data.valid_fraction
        config.split_matrix = [(0.0, share), (share, 1.0) if with_valid else None, None]
    with _process_group(), epochs.without_pickle():
        leader = torch.distributed.get_rank() == 0
        there = leader and epochs.sound(cache)
        if leader and not there:
            epochs.remove(cache)
        try:
            built = BlendedMegatronDatasetBuilder(
                epochs.EpochDataset, [train_samples, valid_samples, 0], lambda: True, config
            ).build()
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: rank 0 wrote it, but this rank does not see it; "
                "runtime.run_dir must be on a file system that all nodes share"
            ) from None
        if leader and not there:
            epochs.seal(cache)
    return built[0], built[1]


def _blend(datasets: list[Dataset]) -> tuple[list[str], list[float] | None]:
    # One dataset with a weight would be wrapped in a blend of one.
    weights = [dataset.weight for dataset in datasets] if len(datasets) > 1 else None
    return [dataset.path for dataset in datasets], weights


def _enough_to_validate(recipe: Recipe) -> bool:
    """Whether every dataset has a validation sequence. (Megatron never returns from a split without tokens.)"""
    if recipe.data.valid:
        return True
    for dataset in train_sets(recipe):
        found = index.read(dataset.path)
        held_out = found.tokens_from(first_valid(recipe, len(found.lengths)))
        if held_out <= recipe.training.sequence_length:
            return False
    return True


def _fingerprint(recipe: Recipe, *samples: int) -> str:
    """Names the cache by the contents of the data too: Megatron's own key knows paths and settings only."""
    digest = hashlib.sha256(repr((samples, recipe.data.seed, recipe.training.sequence_length)).encode())
    digest.update(f"{recipe.data.valid_fraction}".encode())
    for dataset in [*train_sets(recipe), *recipe.data.valid]:
        found = index.read(dataset.path)
        digest.update(repr((dataset.path, dataset.weight, len(found.lengths), found.tokens)).encode())
        digest.update(found.lengths[:65536].tobytes())
        known = manifest.load(dataset.path)
        digest.update(known.sha256.get("idx", "").encode() if known else b"")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """Megatron-core 0.16 asks for its rank when it blends: outside a run, a group of this process alone."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
