# ruff: noqa: RUF001 (the published tokenizer spells its special tokens with full-width bars)
"""A tokenizer: a byte-level BPE trained here, or any `tokenizer.json`, and the special tokens of its configuration."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from dsv3_train import regular
from dsv3_train.data import special_tokens
from dsv3_train.data.sets import train_sets
from dsv3_train.data.special_tokens import DEFINITION, Files
from dsv3_train.errors import UserError, on_one_line

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
_BOS = "<｜begin▁of▁sentence｜>"
_READ_BY_CODE = ("tiktoken.model", "tokenizer.model", "vocab.json")
"""Vocabularies of repositories without a tokenizer.json."""


class Tokenizer:
    """Text to token ids and back, without loss.

    `encode` takes every character as text: a document that spells a special token does not become one.
    """

    def __init__(self, definition: bytes, name: str, files: Files | None = None, eos_token: str | None = None) -> None:
        """Args:
            definition: the contents of a `tokenizer.json`.
            name: what to call it in errors.
            files: its configuration (`special_tokens.FILES`), which names the tokens that begin and end a document.
            eos_token: the one that ends a document, whatever the configuration says.

        Raises:
            UserError: no tokenizer, or a damaged configuration.
        """
        try:
            raw = json.loads(definition)
            added = {token["content"]: token for token in raw["added_tokens"]}
            if not all(isinstance(spelling, str) for spelling in added):
                raise TypeError("the content of an added token is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{name}: not a tokenizer.json ({error}); give the file that `tokenizers` saves") from None
        self.name = name
        self.sha256 = hashlib.sha256(definition).hexdigest()
        self.files: Files = {**(files or {}), DEFINITION: definition}
        named = {role: special_tokens.spelling(self.files, role, name) for role in ("eos", "bos", "pad")}
        named["eos"] = eos_token or named["eos"]
        # Only what is marked special is kept out of ordinary text below; published files leave some unmarked.
        for spelling, token in added.items():
            marked = token.get("special", False) or spelling.startswith(("<|", "<｜"))
            token["special"] = marked or spelling in named.values()
        with self._told():
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = sorted(spelling for spelling, token in added.items() if token["special"])
        self._spellings = {
            role: spelling for role, spellings in SPELLINGS.items() for spelling in spellings if spelling in added
        }
        if _BOS in added:
            self._spellings["bos"] = _BOS
        if named["eos"] is not None:
            self._spellings["eos"] = named["eos"]
        for role in ("bos", "pad"):  # transformers would give one that is not there an id beyond the vocabulary
            spelling = named[role]
            if spelling is not None and self._tokenizer.token_to_id(spelling) is not None:
                self._spellings[role] = spelling
        with self._told():
            self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size == 0:
            raise UserError(f"{name}: a tokenizer without a token; give another")
        """Every id is below it."""

    @classmethod
    def load(cls, path: str | Path, eos_token: str | None = None) -> Tokenizer:
        """The tokenizer in the file `path`, or in `path`/tokenizer.json, with the configuration beside it.

        Raises:
            UserError: the file is missing or holds no tokenizer, or see `__init__`.
        """
        path = Path(path)
        if path.is_dir():
            code = next((name for name in _READ_BY_CODE if (path / name).is_file()), None)
            if code and not (path / DEFINITION).exists():
                raise UserError(
                    f"{path}: has {code}, which is read by code that is never run here, and no tokenizer.json; give a "
                    "tokenizer.json of the same vocabulary"
                )
            path /= DEFINITION
        return cls(read_definition(path), str(path), special_tokens.beside(path), eos_token)

    def special(self, role: str) -> int:
        """Id of the special token `role`: a key of SPELLINGS, `bos` or `pad`; of the last two, `eos` where there is
        none.

        Raises:
            UserError: the tokenizer has none.
        """
        spelling = self.spelling(role)
        found = self._tokenizer.token_to_id(spelling)
        if found is None:
            raise UserError(
                f"{self.name}: has no token {spelling}, which eos_token (of the recipe, or of the configuration beside "
                f"it) says ends a document; name one that it has{self._candidates()}"
            )
        return found

    def spelling(self, role: str) -> str:
        """How `special` of a role is spelled; same errors."""
        if role in ("bos", "pad") and role not in self._spellings:
            role = "eos"
        if role not in self._spellings:
            first, second = SPELLINGS[role]
            remedy = "add it to added_tokens, or set the FIM rate to 0"
            if role == "eos":
                remedy = (
                    "name the token that ends a document: --eos-token, or the recipe's key eos_token beside tokenizer"
                    f"{self._candidates()}"
                )
            raise UserError(f"{self.name}: has no special token {first} (or {second}); {remedy}")
        return self._spellings[role]

    def _candidates(self) -> str:
        return f" (its special tokens: {', '.join(self._special[:8])})" if self._special else ""

    @functools.cached_property
    def eos_id(self) -> int:
        """Of the token that ends a document.

        Raises:
            UserError: it is not known.
        """
        return self.special("eos")

    @property
    def ends_with(self) -> int | None:
        """`eos_id`; None where it is not known."""
        return self.eos_id if "eos" in self._spellings else None

    @property
    def stops(self) -> set[int]:
        """Ids that end a text that is generated, as far as they are known."""
        found = special_tokens.stops(self.files, self.name)
        return found if self.ends_with is None else found | {self.ends_with}

    def complete(self) -> dict[str, bytes]:
        """All its files, with what transformers needs of them.

        Raises:
            UserError: the token that ends a document is not known.
        """
        roles = ("bos", "eos", "pad")
        return special_tokens.complete(
            self.files, {role: (self.spelling(role), self.special(role)) for role in roles}, self.name
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        with self._told():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        with self._told():
            return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What the library raises, as a `UserError`: it has no narrower type, and its panics are no `Exception`."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            told = on_one_line(str(error))[:300]
            raise UserError(
                f"{self.name}: not a tokenizer.json that works ({told}); give the file that `tokenizers` saves"
            ) from None


def read_definition(path: Path) -> bytes:
    """A tokenizer.json as it is.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return regular.read(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the tokenizer.json to use") from None


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


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer, with its configuration and the recipe's own end of a document.

    Raises:
        UserError: there is none, or see `Tokenizer`.
    """
    return Tokenizer.load(tokenizer_path(recipe), recipe.data.eos_token)


def tokenizer_path(recipe: Recipe) -> Path:
    """The recipe's tokenizer.json: `data.tokenizer`, else PREFIX.tokenizer.json of the first training dataset.

    Raises:
        UserError: there is no such file.
    """
    path = Path(recipe.data.tokenizer or f"{train_sets(recipe)[0].path}.tokenizer.json")
    path = path / DEFINITION if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; set data.tokenizer to the one that the data was made with")
    return path
