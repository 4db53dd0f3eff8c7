# ruff: noqa: RUF001 (Chinese punctuation is meant)
"""A document of any length: bounded memory, and the token ids that it would have as a whole."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from dsv3_train.data import cutting, documents, fim
from dsv3_train.data.compression import Damaged
from dsv3_train.data.cutting import Cutter
from dsv3_train.data.prepare import prepare
from dsv3_train.data.tokenizer import SPELLINGS, Tokenizer
from dsv3_train.recipe.schema import Prepare

ATOMS = [
    *"abzAZ019",
    *" \n\t\r'\".,;:!?()[]{}<>|/\\_-",
    *"  \n\n ",
    *[
        "\r\n",
        "\n\n",
        "'s",
        "'re ",
        "I'm",
        "don't",
        "123456",
        "   ",
        " \n ",
        "the ",
        " of",
        "e\n",
        ".\nThe ",
        "<think>",
    ],
    *["漢", "字", "。", "，", "。\n漢", "一 ", "ー", "・", "゠", "ひ", "カ", "한", "é", "é", "ß", "Ω", "א", "ا"],
    *["\u0301", "\u200d", "🙂", "\u00a0", "\u2028", "\x85", "\x1c", "\x00", "½", "²", "Ⅷ", "’s", "\u3000", "ſ", "K"],
]


def text_of(seed: int, atoms: int) -> str:
    draw = random.Random(seed)
    some = draw.sample(ATOMS, 12)  # a few at a time, so that rare neighbours meet
    return "".join(draw.choice(some if draw.random() < 0.7 else ATOMS) for _ in range(atoms))


def byte_level(*expressions: str, added: tuple[str, ...] = ("<think>",), normalizer=None) -> bytes:
    """A trained byte-level BPE that divides text by these expressions, one after the other; none: by GPT-2's."""
    bpe = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(one), "isolated") for one in expressions]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expressions)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    bpe.decoder = decoders.ByteLevel()
    if normalizer:
        bpe.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[first for first, _ in SPELLINGS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text_of(seed, 400) for seed in range(1000, 1050)], trainer)
    bpe.add_tokens([tokenizers.AddedToken(one, special=False, normalized=False) for one in added])
    return bpe.to_str().encode()


DEEPSEEK = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", cutting._DEEPSEEK_V3)
KINDS = {
    "GPT-2": lambda: byte_level(),
    "GPT-4": lambda: byte_level(cutting._GPT4 % r"\p{N}{1,3}"),
    "Qwen 2": lambda: byte_level(cutting._GPT4 % r"\p{N}", normalizer=normalizers.NFC()),
    "GPT-4o": lambda: byte_level(cutting._GPT4O),
    "DeepSeek-V3": lambda: byte_level(*DEEPSEEK),
    "added words": lambda: byte_level(*DEEPSEEK, added=("<think>", "e t", "of\nThe", "z ", "a\n")),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_pieces_have_the_ids_of_the_whole(make, monkeypatch):
    """Everywhere: cut at each place that the rules allow, in texts of what could contradict them."""
    definition = make()
    tokenizer, cutter = Tokenizer(definition, "made"), Cutter(json.loads(definition))
    assert cutter.proven
    monkeypatch.setattr(cutting, "PIECE", 24)
    pieces = 0
    for seed in range(1500):
        text = text_of(seed, 80)
        parts = list(cutter.pieces([text[:17], text[17:]]))
        assert "".join(parts) == text
        pieces += len(parts)
        assert [one for part in parts for one in tokenizer.encode(part)] == tokenizer.encode(text), (seed, parts)
    assert pieces > 4000


def test_every_place_is_one(monkeypatch):
    """Not only the last one of a piece."""
    definition = byte_level(*DEEPSEEK)
    tokenizer, cutter = Tokenizer(definition, "made"), Cutter(json.loads(definition))
    for seed in range(300):
        text = text_of(seed, 40)
        for found in cutting._CUT.finditer(text):
            place = found.start()
            if not cutter._in_added(text, place):
                assert tokenizer.encode(text[:place]) + tokenizer.encode(text[place:]) == tokenizer.encode(text)


def edited(**changes) -> dict:
    return {**json.loads(byte_level()), **changes}


UNPROVEN = {
    "prefix space": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    "sentencepiece": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
    "no division": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
    "other expression": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(?s).{7}"}, "behavior": "Isolated", "invert": False}
    },
    "lower case": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "greedy token": {"added_tokens": [{"id": 1, "content": "<x>", "rstrip": True}]},
}


@pytest.mark.parametrize("changes", UNPROVEN.values(), ids=UNPROVEN)
def test_what_is_not_proven_is_encoded_whole_or_refused(changes, monkeypatch):
    cutter = Cutter(edited(**changes))
    assert not cutter.proven
    monkeypatch.setattr(cutting, "PIECE", 10)
    monkeypatch.setattr(cutting, "LONGEST", 100)
    assert list(cutter.pieces(["a b c d " * 12])) == ["a b c d " * 12]
    with pytest.raises(Damaged, match="over 100 characters, and for this tokenizer it is not proven"):
        list(cutter.pieces(["a b c d " * 13]))


def test_a_text_without_a_place_to_cut(monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", 10)
    monkeypatch.setattr(cutting, "LONGEST", 100)
    with pytest.raises(Damaged, match="100 characters without a place to cut"):
        list(Cutter(edited()).pieces(["1" * 101]))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_text_file_that_is_not_held_in_memory(tmp_path, monkeypatch, suffix, rate):
    """Same files whether it is read as a whole or piece by piece; also one that turns out not to be UTF-8."""
    write = gzip.compress if suffix else bytes
    for number in range(6):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(write(b"\xef\xbb\xbf" + text_of(number, 3000).encode()))
    (tmp_path / f"bad.txt{suffix}").write_bytes(write("ä".encode() * 5000 + b"\xff"))
    given = tmp_path / "given" / "t.json"
    given.parent.mkdir()
    given.write_bytes(byte_level(*DEEPSEEK))
    made = []
    for held in (documents._HELD, 100):
        monkeypatch.setattr(documents, "_HELD", held)
        out = tmp_path / "out" / str(held)
        settings = Prepare(
            inputs=[str(tmp_path / "*.txt*")], output=str(out), tokenizer=str(given), fim_rate=rate, max_bad=0.2
        )
        made.append(prepare(settings, workers=1))
        monkeypatch.setattr(cutting, "PIECE", 50)
    assert made[0].sha256 == made[1].sha256
    assert made[0].counts == made[1].counts
    assert (made[0].counts.documents, made[0].counts.fim_documents) == (6, 6 * int(rate))
    assert [bad.reason for bad in made[1].bad] == ["not UTF-8 at byte 10000"] == [bad.reason for bad in made[0].bad]


def test_cuts_of_a_document_in_pieces_are_those_of_the_whole():
    for seed in range(200):
        text = text_of(seed, 30)
        assert fim.cuts([text], 0.5, 7) == fim.cuts([text[:9], text[9:]], 0.5, 7)


CHILD = """
import sys
from dsv3_train.data.prepare import prepare
from dsv3_train.recipe.schema import Prepare
made = prepare(Prepare(inputs=sys.argv[1:2], output=sys.argv[2], tokenizer=sys.argv[3]), workers=1)
# Not ru_maxrss, in which the process that started this one counts too.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(made.counts.tokens, peak // 1024)
"""


def test_memory_does_not_grow_with_the_document(tmp_path):
    """4 MB of text in one JSON line, of which encoded as a whole each byte takes 550 bytes with this tokenizer."""
    (tmp_path / "t.json").write_bytes(byte_level(*DEEPSEEK))
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "many different words 0123 " * 160_000}))
    arguments = [sys.executable, "-c", CHILD, tmp_path / "x.jsonl", tmp_path / "out", tmp_path / "t.json"]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=True)
    tokens, mebibytes = map(int, done.stdout.split())
    assert mebibytes < 500
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    once = tokenizer.encode("many different words 0123 many")
    assert tokens > 160_000 * 5
    assert np.fromfile(tmp_path / "out.bin", np.uint16, 9).tolist() == once[:9]


def test_a_tokenizer_trained_on_pieces_is_that_of_the_whole(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(text_of(number, 2000))
    made = []
    for piece in (cutting.PIECE, 50):
        monkeypatch.setattr(cutting, "PIECE", piece)
        out = str(tmp_path / "out" / str(piece))
        made.append(prepare(Prepare(inputs=[str(tmp_path / "*.txt")], output=out, vocab_size=600), workers=1))
    assert made[0].tokenizer == made[1].tokenizer
    assert made[0].sha256 == made[1].sha256
