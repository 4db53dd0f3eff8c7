# ruff: noqa: RUF001 (the published tokenizer spells its special tokens with full-width bars)
"""Which tokens begin and end a document: by the recipe, by a tokenizer's configuration, by the report's spelling."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import tokenizers

from dsv3_train import regular
from dsv3_train.data import index, manifest
from dsv3_train.data.prepare import prepare
from dsv3_train.data.show import show
from dsv3_train.data.tokenizer import Tokenizer, train
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare


def definition(*special: str) -> bytes:
    """A tokenizer.json of bytes whose special tokens have the ids from 0 on."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["some text to merge a few pairs of"], trainer)
    return bpe.to_str().encode()


def roles(definition: bytes, eos_token: str | None = None, **files: object) -> tuple[int, int, int]:
    tokenizer = Tokenizer(
        definition, "t", {f"{name}.json": json.dumps(it).encode() for name, it in files.items()}, eos_token
    )
    return tuple(tokenizer.special(role) for role in ("bos", "eos", "pad"))


V3 = definition("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
KIMI = definition("[BOS]", "[EOS]", "<|im_end|>", "[PAD]")


def token(spelling: str) -> dict:
    """As V3's and R1's tokenizer_config.json have it."""
    return {"__type": "AddedToken", "content": spelling, "lstrip": False, "normalized": True}


def test_where_the_roles_are_from():
    """Published tokenizer_config.json: V3 (pad is eos, though there is a pad), Kimi-K2 (strings)."""
    end, begin = "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"
    v3 = {"bos_token": token(begin), "eos_token": token(end), "pad_token": token(end), "unk_token": None}
    kimi = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    assert roles(V3) == roles(V3, tokenizer_config=v3) == (0, 1, 1)
    assert roles(KIMI, tokenizer_config=kimi) == roles(KIMI, special_tokens_map=kimi) == (0, 1, 3)
    assert roles(KIMI, "<|im_end|>", tokenizer_config=kimi) == (0, 2, 3)
    assert roles(KIMI, "[EOS]") == (1, 1, 1)
    assert roles(train(["x"], 300)) == (0, 0, 0)
    # A token that the vocabulary lacks would have an id beyond it.
    assert roles(KIMI, tokenizer_config={"eos_token": "[EOS]", "bos_token": "<s>", "pad_token": "<pad>"}) == (1, 1, 1)
    for given, files in [("</s>", {}), (None, {"tokenizer_config": {"eos_token": "</s>"}})]:
        with pytest.raises(UserError, match=r"t: has no token </s>, .* \(its special tokens: .*\[EOS\]"):
            roles(KIMI, given, **files)
    with pytest.raises(UserError, match=r"--eos-token.*\[BOS\], \[EOS\]"):
        roles(KIMI)
    with pytest.raises(UserError, match=r"t: tokenizer_config.json is damaged"):
        roles(KIMI, tokenizer_config=[])


def test_generation_ends_where_the_model_ends_a_turn():
    """Kimi-K2's generation_config.json has another eos than its tokenizer; GLM's has three."""
    for listed, expected in [(2, {1, 2}), ([2, 3], {1, 2, 3}), (None, {1})]:
        files = {"generation_config.json": json.dumps({"eos_token_id": listed}).encode()}
        assert Tokenizer(KIMI, "t", files, "[EOS]").stops == expected


def test_text_that_spells_the_end_is_text():
    tokenizer = Tokenizer(KIMI.replace(b'"special":true', b'"special":false'), "t", {}, "[EOS]")
    assert tokenizer.eos_id not in tokenizer.encode("a [EOS] b")
    assert tokenizer.decode(tokenizer.encode("a [EOS] b")) == "a [EOS] b"


@pytest.mark.parametrize("how", ["option", "configuration", "directory"])
def test_prepare_with_another_end(tmp_path, how):
    """The issue's [EOS]: by `eos_token` or tokenizer_config.json; what the dataset says of it serves a run."""
    (tmp_path / "x.txt").write_text("hello [EOS] there")
    (tmp_path / "tokenizer.json").write_bytes(KIMI)
    chosen = {"option": {"eos_token": "[EOS]"}}.get(how, {})
    if not chosen:
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[EOS]"}')
    given = tmp_path if how == "directory" else tmp_path / "tokenizer.json"
    settings = Prepare(inputs=[str(tmp_path / "x.txt")], output=str(tmp_path / "out"), tokenizer=str(given), **chosen)
    made = prepare(settings, workers=1)
    ids = np.fromfile(tmp_path / "out.bin", np.uint16).tolist()
    assert (ids[-1], ids.count(1), made.tokenizer.eos_id) == (1, 1, 1)
    assert manifest.load(str(tmp_path / "out")).settings.eos_token == chosen.get("eos_token")
    kept = Tokenizer.load(tmp_path / "out.tokenizer.json")
    assert (kept.eos_id, kept.special("bos"), kept.sha256) == (1, 1, made.tokenizer.sha256)
    assert show(str(tmp_path / "out"), 0).document.text == "hello [EOS] there[EOS]"
    assert index.read(str(tmp_path / "out")).tokens == len(ids)
    assert prepare(settings, workers=1) == made
    if how != "option":
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    other = settings.model_copy(update={"eos_token": "<|im_end|>"} if chosen else {})
    with pytest.raises(UserError, match=r"prepared with eos_token|documents end with token 1, not 2"):
        prepare(other, workers=1)


def test_prepare_refuses(tmp_path):
    def message(tokenizer: str | None, **changes: object) -> str:
        given = {"inputs": [str(tmp_path / "x.txt")], "output": str(tmp_path / "out"), "tokenizer": tokenizer}
        with pytest.raises(UserError) as error:
            prepare(Prepare(**given, **changes), workers=1)
        return str(error.value)

    (tmp_path / "x.txt").write_text("hello")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "hello": 1, "<unk>": 2}, "<unk>"))
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "words.json"))
    assert "reads the text </s> inside a document as its end" in message(str(tmp_path / "words.json"), eos_token="</s>")
    assert message(None, eos_token="</s>").startswith("eos_token: ")
    (tmp_path / "moonlight").mkdir()
    (tmp_path / "moonlight" / "tiktoken.model").write_bytes(b"IQ== 0\n")
    assert "has tiktoken.model, which is read by code that is never run" in message(str(tmp_path / "moonlight"))
    assert not list(tmp_path.glob("out*"))


def test_links(tmp_path):
    """Followed within a directory and from a snapshot of Hugging Face's cache to its own blobs; never elsewhere."""
    cache = tmp_path / "models--a--b"
    snapshot, blobs, other = cache / "snapshots" / "0123", cache / "blobs", tmp_path / "models--c--d" / "blobs"
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
        (folder / ".hidden").write_text("secret")
    links = {
        "blob": "../../blobs/file",
        "beside": "file",
        "twice": "beside",
        "elsewhere": str(other / "file"),
        "up": "../../../models--a--b/snapshots/file",
        "hidden": ".hidden",
        "environment": "/proc/self/environ",
        "nowhere": "gone",
        "itself": "itself",
        "device": "/dev/zero",
    }
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    assert [regular.contents(snapshot / name) for name in ("blob", "beside", "twice")] == [b"blobs", b"0123", b"0123"]
    for name in list(links)[3:]:
        with pytest.raises(UserError, match=f"{name}: "):
            regular.contents(snapshot / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        regular.contents(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(regular.LARGEST + 1)
    with pytest.raises(UserError, match="more than"):
        regular.contents(tmp_path / "large")
