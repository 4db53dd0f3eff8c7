"""The data of a recipe, looked at before anything is built: quickly, and without torch."""

from __future__ import annotations

import os
from pathlib import Path

from dsv3_train.data import index, manifest
from dsv3_train.data.sets import first_valid, train_sets
from dsv3_train.data.tokenizer import recipe_tokenizer, tokenizer_path
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Dataset, Recipe


def check(recipe: Recipe) -> None:
    """Look at every dataset of the recipe and at its tokenizer.

    Raises:
        UserError: one line per fault: files that are missing, truncated or of another format, a vocabulary that the
            model lacks, datasets of different tokenizers, too little data for one sequence, validation
            on training data.
    """
    train = train_sets(recipe)
    faults: list[str] = []
    tokenizer_hash = None
    try:
        tokenizer_hash = _check_tokenizer(recipe, train)
    except UserError as error:
        faults.append(str(error))
    named = [(f"data.train[{i}]", dataset) for i, dataset in enumerate(train)]
    named += [(f"data.valid[{i}]", dataset) for i, dataset in enumerate(recipe.data.valid)]
    for key, dataset in named:
        try:
            _check_dataset(recipe, key, dataset.path, tokenizer_hash)
        except UserError as error:
            faults.append(f"{key}: {error}")
    trained_on = {os.path.realpath(dataset.path): key for key, dataset in named[: len(train)]}
    for key, dataset in named[len(train) :]:
        if both := trained_on.get(os.path.realpath(dataset.path)):
            faults.append(
                f"{key}: {dataset.path} is {both} too, and a loss on what is trained on validates nothing; name other "
                "data, or leave data.valid out and set data.valid_fraction"
            )
    if faults:
        raise UserError("\n".join(faults))


def _check_tokenizer(recipe: Recipe, train: list[Dataset]) -> str | None:
    """Its sha256; None if the recipe names none and the first dataset brings none (training itself needs none)."""
    if recipe.data.tokenizer is None and not Path(f"{train[0].path}.tokenizer.json").is_file():
        return None
    tokenizer = recipe_tokenizer(recipe)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"{tokenizer.name}: has {tokenizer.vocab_size} tokens, but model.vocab_size is {recipe.model.vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or prepare the data with a smaller vocabulary"
        )
    return tokenizer.sha256


def _check_dataset(recipe: Recipe, key: str, path: str, tokenizer_hash: str | None) -> None:
    found = index.read(path)
    known = manifest.load(path)
    vocabulary = recipe.model.vocab_size
    if known:
        if known.max_token >= vocabulary:
            raise UserError(
                f"{path}: holds token {known.max_token}, but model.vocab_size is {vocabulary}; "
                "prepare it with the tokenizer of this model"
            )
        if tokenizer_hash not in (None, known.tokenizer.sha256):
            raise UserError(
                f"{path}: was made with another tokenizer than the recipe's {tokenizer_path(recipe)}; "
                f"set data.tokenizer to {path}.tokenizer.json, or prepare all datasets with one tokenizer"
            )
        if known.counts.tokens != found.tokens:
            raise UserError(
                f"{path}.bin: holds {found.tokens} tokens, its manifest says {known.counts.tokens}; prepare it again"
            )
    # Inputs and labels are one token apart, so a sample takes one more.
    needed = recipe.training.sequence_length + 1
    documents = len(found.lengths)
    held_out = 0
    if key.startswith("data.train"):
        held_out = found.tokens_from(first_valid(recipe, documents))
        if recipe.training.eval_interval and recipe.data.valid_fraction and not recipe.data.valid and held_out < needed:
            raise UserError(
                f"{path}: the last {recipe.data.valid_fraction:g} of its documents are {held_out} tokens, a validation "
                f"sequence takes {needed}; raise data.valid_fraction, or set training.eval_interval to 0"
            )
    if found.tokens - held_out < needed:
        raise UserError(
            f"{path}: {found.tokens - held_out} tokens, one sequence takes {needed} (training.sequence_length + 1); "
            "prepare more text, or shorten the sequence"
        )
