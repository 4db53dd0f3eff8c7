# ruff: noqa: RUF001 (Chinese punctuation is meant)
"""Where a long document may be cut so that its pieces have the token ids of the whole.

A tokenizer divides text by a regular expression and encodes each division by itself. None of the expressions known
here looks behind, so the text after a place where a division ends is divided as if it stood alone. The text before it
is, too, if no match can go on across the place and none that ends there depends on what follows. Both hold

1. between an ASCII letter or a Chinese character and ASCII white space: no match has white space after a letter; and
2. between a line feed and an ASCII letter or a Chinese character, where something other than white space stands before
   the line feed: the line feed ends its match, and as the only white space there it is one division (or the end of the
   punctuation before it) whether text follows or not.

So for the expressions of GPT-2, GPT-4 (Llama 3 and Qwen 2 too), GPT-4o and DeepSeek-V3; tests/test_large_documents.py
compares ids. NFC, the one normalizer that is allowed, joins no letter named above to a character before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from dsv3_train.data.compression import Damaged

PIECE = 1 << 18
"""Characters that are encoded at once; tokenizers take 125 to 550 bytes of memory for each."""
LONGEST = 1 << 22
"""Characters that are encoded at once where there is no place to cut."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_ENDS = {_GPT2, _GPT4 % r"\p{N}", _GPT4 % r"\p{N}{1,3}", _GPT4O, _DEEPSEEK_V3}
"""Expressions after which a division ends at the places above."""
_NEUTRAL = {r"\p{N}", r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+"}
"""Expressions that match nothing across them."""
_CUT = re.compile(
    "(?<=[A-Za-z一-龥])(?=[ \t\r\n])|(?<=[A-Za-z0-9一-龥.,;:!?)\"'。，！？；：」』）”]\n)(?=[A-Za-z一-龥])"
)


class Cutter:
    """Divides documents for one tokenizer."""

    def __init__(self, definition: dict[str, Any]) -> None:
        """Args: the contents of its tokenizer.json, parsed."""
        added = definition.get("added_tokens") or []
        spelled = [re.escape(token["content"]) for token in added if len(token["content"]) > 1]
        self._added = re.compile("|".join(spelled)) if spelled else None
        self._reach = max([1, *(len(token["content"]) for token in added)])
        reaching = any(token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word"))
        self.proven = not reaching and _local_normalizer(definition) and _known_divisions(definition)
        """Whether the places above hold for it."""

    def pieces(self, texts: Iterable[str]) -> Iterator[str]:
        """A document, given as texts that follow one another, in pieces whose ids are those of the whole.

        Raises:
            Damaged: it is longer than `LONGEST` and has no place to cut.
        """
        held = ""
        for text in texts:
            for start in range(0, len(text), PIECE):
                held += text[start : start + PIECE]
                if len(held) > PIECE and (place := self._place(held)):
                    yield held[:place]
                    held = held[place:]
                if len(held) > LONGEST:
                    raise Damaged(self._too_long())
        if held:
            yield held

    def _too_long(self) -> str:
        if self.proven:
            return f"has {LONGEST:,} characters without a place to cut (a space after a letter will do); divide it"
        return (
            f"has over {LONGEST:,} characters, and for this tokenizer it is not proven that pieces have the token ids "
            "of the whole; divide it into several documents"
        )

    def _place(self, text: str) -> int:
        """The last place to cut, 0 for none."""
        if not self.proven:
            return 0
        end = len(text) - self._reach
        # From near the end backwards, so that a long text is not searched as a whole.
        for begin in (end - 4096, 1):
            for place in reversed([found.start() for found in _CUT.finditer(text, max(begin, 1), max(end, 1))]):
                if not self._in_added(text, place):
                    return place
        return 0

    def _in_added(self, text: str, place: int) -> bool:
        """Whether a token that is found before the text is divided might lie across a place."""
        around = text[max(place - self._reach, 0) : place + self._reach]
        return self._added is not None and self._added.search(around) is not None


def _local_normalizer(definition: dict[str, Any]) -> bool:
    return all(part.get("type") == "NFC" for part in _parts(definition.get("normalizer"), "normalizers"))


def _known_divisions(definition: dict[str, Any]) -> bool:
    """Whether every step of the pre-tokenizer is known, and one of them ends a division at each place."""
    ends = False
    for part in _parts(definition.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "ByteLevel":
            if part.get("add_prefix_space", True):
                return False
            expression = _GPT2 if part.get("use_regex", True) else None
        elif part.get("type") == "Digits":
            expression = None
        elif part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            pattern = part.get("pattern")  # the library reads other spellings than a mapping too
            written = str(pattern.get("Regex", "")) if isinstance(pattern, dict) else ""
            expression = written.replace("\r", r"\r").replace("\n", r"\n")
            if expression not in _ENDS | _NEUTRAL:
                return False
        else:
            return False
        ends = ends or expression in _ENDS
    return ends


def _parts(step: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step; `{}` for one in another of the spellings that the library reads."""
    if not step:
        return []
    if not isinstance(step, dict) or step.get("type") != "Sequence":
        return [step if isinstance(step, dict) else {}]
    within = step.get(name)
    return [one for part in within for one in _parts(part, name)] if isinstance(within, list) else [{}]
