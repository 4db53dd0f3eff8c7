# ruff: noqa: RUF001 (the published tokenizer spells its special tokens with full-width bars)
"""The byte-level BPE tokenizer: trained here, or any `tokenizer.json` that has the special tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from dsv3_train.data.sets import train_sets
from dsv3_train.errors import UserError

if TYPE_CHECKING:
    from dsv3_train.recipe.schema import Recipe

# Technical report, section 4.1, writes them in the first spelling; the published tokenizer has the second.
SPELLINGS = {
    "eos": ("<|eos_token|>", "<｜end▁of▁sentence｜>"),
    "fim_begin": ("<|fim_begin|>", "<｜fim▁begin｜>"),
    "fim_hole": ("<|fim_hole|>", "<｜fim▁hole｜>"),
    "fim_end": ("<|fim_end|>", "<｜fim▁end｜>"),
}
SMALLEST_VOCABULARY = 256 + len(SPELLINGS)
"""Every byte and the special tokens."""


class Tokenizer:
    """Text to token ids and back, without loss.

    `encode` takes every character as text: a document that spells a special token does not become one.
    """

    def __init__(self, definition: bytes, name: str) -> None:
        """Args: the contents of a `tokenizer.json`; what to call it in errors.

        Raises:
            UserError: no tokenizer, or none with an end-of-document token.
        """
        try:
            raw = json.loads(definition)
            added = {token["content"]: token for token in raw["added_tokens"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{name}: not a tokenizer.json ({error}); give the file that `tokenizers` saves") from None
        self.name = name
        self.sha256 = hashlib.sha256(definition).hexdigest()
        self._ids = {
            role: added[spelling]["id"]
            for role, spellings in SPELLINGS.items()
            for spelling in spellings
            if spelling in added
        }
        # Only what is marked special is kept out of ordinary text below; published files leave some unmarked.
        for spelling, token in added.items():
            token["special"] = token.get("special", False) or spelling.startswith(("<|", "<｜"))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"{name}: not a tokenizer.json ({error}); give the file that `tokenizers` saves") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = self.special("eos")
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        """Every id is below it."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in the file `path`.

        Raises:
            UserError: the file is missing or holds no tokenizer with an end-of-document token.
        """
        try:
            definition = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give the tokenizer.json to use") from None
        return cls(definition, str(path))

    def special(self, role: str) -> int:
        """Id of the special token `role` (a key of SPELLINGS).

        Raises:
            UserError: the tokenizer has none.
        """
        if role not in self._ids:
            first, second = SPELLINGS[role]
            remedy = "" if role == "eos" else ", or set the FIM rate to 0"
            raise UserError(f"{self.name}: has no special token {first} (or {second}); add it to added_tokens{remedy}")
        return self._ids[role]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE; the contents of its `tokenizer.json`.

    The vocabulary is smaller than `vocab_size` where the texts have too few pairs to merge.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[first for first, _ in SPELLINGS.values()],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe.to_str(pretty=True).encode()


def tokenizer_path(recipe: Recipe) -> Path:
    """The recipe's tokenizer file: `data.tokenizer`, else PREFIX.tokenizer.json of the first training dataset.

    Raises:
        UserError: there is no such file.
    """
    path = Path(recipe.data.tokenizer or f"{train_sets(recipe)[0].path}.tokenizer.json")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; set data.tokenizer to the one that the data was made with")
    return path
