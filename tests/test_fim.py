"""Fill-in-the-middle: nothing of a document is lost, and what is chosen depends on nothing else."""

import json
import random
import string

import pytest

from dsv3_train.data import fim
from dsv3_train.data.cutting import Cutter
from dsv3_train.data.shard import document_ids
from dsv3_train.data.tokenizer import SPELLINGS, Tokenizer, train

RANDOM = random.Random(0)
DOCUMENTS = ["".join(RANDOM.choices(string.printable + "äßé漢字🙂", k=RANDOM.randrange(1, 80))) for _ in range(4000)]


def cut(text: str, rate: float, seed: int) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) of a document that is chosen."""
    if (middle := fim.cuts([text], rate, seed)) is None:
        return None
    begin, end = middle
    return text[:begin], text[begin:end], text[end:]


def ids_of(tokenizer: Tokenizer, text: str, middle: tuple[int, int] | None) -> list[int]:
    cutter = Cutter(json.loads(train([], 300)))
    return [one for ids in document_ids(tokenizer, cutter, text, middle) for one in ids]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train(DOCUMENTS[:500], 300), "trained")


def test_rate_is_the_share_of_documents():
    chosen = sum(cut(text, 0.1, seed=1) is not None for text in DOCUMENTS)
    assert abs(chosen - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5  # four standard deviations
    assert all(cut(text, 0.0, seed=1) is None for text in DOCUMENTS)
    assert all(cut(text, 1.0, seed=1) is not None for text in DOCUMENTS)


def test_parts_are_the_document():
    cuts = [cut(text, 1.0, seed=1) for text in DOCUMENTS]
    assert all("".join(cut) == text for cut, text in zip(cuts, DOCUMENTS, strict=True))
    # Cuts are uniform: on average a third of a document is in each part.
    characters = sum(map(len, DOCUMENTS))
    for part in range(3):
        assert sum(len(cut[part]) for cut in cuts) / characters == pytest.approx(1 / 3, abs=0.02)


def test_choice_depends_on_seed_and_text_alone():
    forwards = {text: cut(text, 0.5, seed=1) for text in DOCUMENTS}
    backwards = {text: cut(text, 0.5, seed=1) for text in reversed(DOCUMENTS)}
    assert forwards == backwards
    assert forwards != {text: cut(text, 0.5, seed=2) for text in DOCUMENTS}


def test_layout_is_prefix_suffix_middle(tokenizer):
    begin, hole, end = (tokenizer.special(role) for role in ("fim_begin", "fim_hole", "fim_end"))
    ids = ids_of(tokenizer, "abcdef", (2, 4))
    assert ids == [
        begin,
        *tokenizer.encode("ab"),
        hole,
        *tokenizer.encode("ef"),
        end,
        *tokenizer.encode("cd"),
        tokenizer.eos_id,
    ]
    assert tokenizer.decode(ids) == "<|fim_begin|>ab<|fim_hole|>ef<|fim_end|>cd<|eos_token|>"
    assert ids_of(tokenizer, "abcdef", None) == [*tokenizer.encode("abcdef"), tokenizer.eos_id]


def test_no_document_makes_a_special_token(tokenizer):
    special = {tokenizer.special(role) for role in SPELLINGS}
    text = "a" + "".join(spelling for pair in SPELLINGS.values() for spelling in pair) + "<|eos_token|>\n"
    ids = tokenizer.encode(text)
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text


def test_every_character_survives(tokenizer):
    for text in DOCUMENTS[:200]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
