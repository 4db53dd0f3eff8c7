# ruff: noqa: RUF001 (the published tokenizer spells its special tokens with full-width bars)
"""Structures as published, with tiny random weights: in, logits, three steps trained, out, generated from.

tests/published/README.md says where each file is from. Not found, and here by the nearest: the config.json of V3-Base
(V3's first release), V3.1-Terminus (V3.1's, norms in FP32), R1-0528 (R1's) and Moonlight's base model (Instruct's);
the types of V3's and V3.1's tensors (R1's) and of Moonlight's (V2-Lite's); every tokenizer.json (bytes, with the
published special tokens). Sizes are smaller; numbers of layers, experts and tokens with them.

DSV3_TRANSFORMERS4 names a further interpreter, one with transformers 4.57, which then has to find the same.
"""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_models
import published_models
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import from_hf, to_hf
from dsv3_train.checkpoint.hf.logits import _ours
from dsv3_train.checkpoint.hf.sharded import Checkpoint
from dsv3_train.checkpoint.hf.verify import open_weights
from dsv3_train.data import index, special_tokens
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import dump, load
from dsv3_train.recipe.ready import refuse_unready
from dsv3_train.runtime import distributed
from parity import in_processes
from published_models import FAMILIES, UNUSED_EXPERT

pytest.importorskip("transformers")

TOOL = Path(__file__).parents[1] / "tools" / "exported.py"
sys.path.insert(0, str(TOOL.parent))
V2 = "DeepSeek-V2-Lite"
SLOW = ("DeepSeek-V3-Base", "DeepSeek-V3.1-Terminus", "DeepSeek-R1-0528")
"""Put together from what was found of their relatives."""


def families(*names: str) -> list:
    """Parameters `name`; what only slow tests ask for is not made for the others."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


TRAINED = [name for name in FAMILIES if name != V2]
WITH_TOKENIZER = [name for name, family in FAMILIES.items() if family.tokenizer and "Kimi" not in name]
SEEN = 128
"""Ids below this, and the end of a document, are in the data."""


def quiet(*_: object) -> None:
    pass


def out(run: Path, target: Path, dtype: str | None = None) -> None:
    to_hf.convert(to_hf.make_plan(resolve(run), dtype, None), target, 1, quiet)


def work(where: Path, name: str, queue: Path) -> None:
    """Convert one family there and back, train it and convert that: in a process of its own."""
    from exported import tokens

    source, run = where / "hf" / name, where / "run" / name
    report = from_hf.convert(from_hf.make_plan(source, None, [], None, None, name), run, 1, quiet)
    out(run, where / "back" / name)
    vocabulary = load(str(run / "recipe.yaml")).model.vocab_size
    found = {"report": report, "logits": _ours(open_weights(run), tokens(vocabulary))}
    last = run
    if name != V2:
        last = where / "trained" / name
        train(run, last, where)
        out(last, where / "after" / name)
        found["trained"] = _ours(open_weights(last), tokens(vocabulary))
    out(last, where / "wide" / name, "fp32")
    torch.save(found, queue / f"{name}.pt")


def train(begin: Path, run_dir: Path, where: Path) -> None:
    """Three steps of a run as `dsv3 train` starts it."""
    from dsv3_train.training.run import Run
    from dsv3_train.training.startup import Startup

    recipe = load(
        str(begin / "recipe.yaml"),
        [
            f"checkpoint.load={begin}",
            f"runtime={{device: cpu, run_dir: {run_dir}}}",
            f"data={{train: [{{path: {where / 'tokens'}}}], workers: 0}}",
            "training={duration: 3 steps, sequence_length: 32}",
            "parallel={world_size: 1, zero1: false}",
            "precision={params: fp32, adam_moments: fp32}",
            "schedule.lr=1e-3",
            "schedule.batch_size=2",
            "optim.weight_decay=0",
            "logging.tensorboard=false",
        ],
    )
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump(recipe))
    distributed.start(recipe, "cpu")
    Run(recipe, run_dir, "cpu", Startup()).train()
    distributed.stop()


@pytest.fixture(scope="module")
def wanted(request) -> list[str]:
    """Families that the tests of this session ask for."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = {item.callspec.params.get("name") for item in items}
    return [name for name in FAMILIES if name in asked]


@pytest.fixture(scope="module")
def made(wanted, tmp_path_factory) -> Path:
    """The wanted families: hf, run, back, trained, after and wide (what was trained, or converted, in FP32) by name."""
    where = tmp_path_factory.mktemp("published")
    for folder in ("hf", "run", "back", "after", "wide", "ours", "plain"):
        (where / folder).mkdir()
    ids = np.random.default_rng(0).integers(3, SEEN, 64 * 40).astype(np.uint16)
    ids.tofile(where / "tokens.bin")
    index.write(where / "tokens.idx", np.dtype(np.uint16), np.full(40, 64, np.int32))
    for name in wanted:
        published_models.make(where / "hf" / name, name)
        published_models.plain(where / "hf" / name, where / "plain" / name)
    distributed.prepare_import("cpu")
    import dsv3_train.training.run  # noqa: F401  once, before forking

    for name in wanted:
        in_processes(lambda name=name: work(where, name, where / "ours"), 1)
    return where


INTERPRETERS = [sys.executable, *filter(None, [os.environ.get("DSV3_TRANSFORMERS4")])]


@pytest.fixture(scope="module", params=INTERPRETERS)
def theirs(made, wanted, request) -> tuple[Path, Path]:
    """What transformers makes of the families' plain and wide directories."""
    where = made / f"theirs{INTERPRETERS.index(request.param)}"
    for folder in ("plain", "wide"):
        paths = [str(made / folder / name) for name in wanted]
        done = subprocess.run(
            [request.param, str(TOOL), str(where / folder), *paths], capture_output=True, text=True, cwd=made
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return made, where


def other_files(path: Path) -> set[str]:
    return {file.name for file in path.iterdir() if file.suffix != ".safetensors"}


@pytest.mark.parametrize("name", families(*FAMILIES))
def test_there_and_back(made, name):
    """Every file byte for byte."""
    source, back = made / "hf" / name, made / "back" / name
    names = sorted(file.name for file in source.iterdir())
    assert names == sorted(file.name for file in back.iterdir())
    assert [file for file in names if not filecmp.cmp(source / file, back / file, shallow=False)] == []
    report = torch.load(made / "ours" / f"{name}.pt", weights_only=False)["report"]
    assert report["bytes_change"] == []


@pytest.mark.parametrize("name", families(*TRAINED))
def test_three_steps_and_out(made, name):
    """What training has not changed comes back byte for byte; types, shapes, names and the other files are the same."""
    source, after = made / "hf" / name, made / "after" / name
    lines = (made / "trained" / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(losses) == 3
    assert all(np.isfinite(losses))
    assert other_files(source) == other_files(after)
    assert [n for n in other_files(source) if not filecmp.cmp(source / n, after / n, shallow=False)] == []
    before, now = hf_models.tensors(source), hf_models.tensors(after)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in now.items()}
    same = {n for n in before if torch.equal(before[n].view(torch.uint8), now[n].view(torch.uint8))}
    unused = {n for n in before if f".experts.{UNUSED_EXPERT}." in n or "inv_freq" in n or "bias" in n or "vision" in n}
    assert unused <= same
    assert len([n for n in unused if "experts" in n]) >= 6
    used = {n for n in before if n.endswith("layernorm.weight") or n.endswith("o_proj.weight") or "lm_head" in n}
    assert not used & same
    prefix = "language_model." if name == "Kimi-VL" else ""
    embedding = f"{prefix}model.embed_tokens.weight"
    assert torch.equal(before[embedding][SEEN:], now[embedding][SEEN:])
    assert not torch.equal(before[embedding][:SEEN], now[embedding][:SEEN])
    for copy, original in (("embed_tokens", embedding), ("shared_head.head", f"{prefix}lm_head.weight")):
        assert all(torch.equal(now[n], now[original]) for n in now if f".4.{copy}." in n)


@pytest.mark.parametrize("name", [V2])
def test_v2_lite_is_not_trained(made, name):
    with pytest.raises(UserError, match=r"model\.scoring_func: softmax cannot train yet"):
        refuse_unready(load(str(made / "run" / name / "recipe.yaml"), ["runtime.device=cpu"]))


BESIDE = {"Moonlight-16B-A3B": 3, "Kimi-K2": 3, "Kimi-VL": 3 + len(published_models.VISION)}
"""Frequencies of RoPE in each layer; a vision tower."""


@pytest.mark.parametrize("name", families(*FAMILIES))
def test_what_is_left_out(made, name):
    report = torch.load(made / "ours" / f"{name}.pt", weights_only=False)["report"]
    assert len(report["left_out"]) == BESIDE.get(name, 0)
    has_mtp = "V3" in name or "R1" in name
    assert (report["copies"], report["mtp"]) == (2 * has_mtp, int(has_mtp))
    norm = Checkpoint(resolve(made / "run" / name)).tensors["decoder.final_layernorm.weight"]
    assert norm.dtype == ("F32" if name == "DeepSeek-V3.1-Terminus" else "BF16")


@pytest.mark.parametrize("name", ["Kimi-K2"])
def test_a_turn_ends_otherwise_than_a_document(made, name):
    """generation_config.json and tokenizer_config.json have another eos each; both end what is generated."""
    files = special_tokens.read(made / "run" / name / "tokenizer")
    assert special_tokens.stops(files, name) == {769, 770}


@pytest.mark.parametrize("name", families(*FAMILIES))
def test_logits(theirs, name):
    """Ours of what was converted against transformers' of the source; and the same after training, of the export."""
    made, where = theirs
    ours = torch.load(made / "ours" / f"{name}.pt", weights_only=False)
    plain = torch.load(where / "plain" / f"{name}.pt", weights_only=False)
    if name == V2 and plain["version"].startswith("4."):
        pytest.skip("transformers 4 leaves out YaRN's softmax scale")
    torch.testing.assert_close(ours["logits"], plain["logits"], rtol=1e-5, atol=1e-5)
    if name != V2:
        wide = torch.load(where / "wide" / f"{name}.pt", weights_only=False)
        torch.testing.assert_close(ours["trained"], wide["logits"], rtol=1e-5, atol=1e-5)
        assert (ours["trained"] - ours["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", families(*FAMILIES))
def test_generated(theirs, name):
    """The first token is the likeliest by our logits of the same weights."""
    made, where = theirs
    found = torch.load(where / "wide" / f"{name}.pt", weights_only=False)
    ours = torch.load(made / "ours" / f"{name}.pt", weights_only=False)
    assert 4 < found["generated"].size(1) <= 12
    if not (name == V2 and found["version"].startswith("4.")):  # see test_logits
        assert found["generated"][0, 4] == ours.get("trained", ours["logits"])[0, 3].argmax()
    assert ("rendered" in found) == (name in WITH_TOKENIZER)


RENDERED = {
    "V3": "<｜begin▁of▁sentence｜><｜User｜>Say it again.<｜Assistant｜>",
    "V3.1": "<｜begin▁of▁sentence｜><｜User｜>Say it again.<｜Assistant｜></think>",
    "R1": "<｜begin▁of▁sentence｜><｜User｜>Say it again.<｜Assistant｜><think>\n",
}


@pytest.mark.parametrize("name", families(*WITH_TOKENIZER))
def test_through_the_tokenizer(theirs, name):
    """The published template and special tokens, through AutoTokenizer."""
    _, where = theirs
    found = torch.load(where / "wide" / f"{name}.pt", weights_only=False)
    tokenizer = FAMILIES[name].tokenizer
    assert found["rendered"] == RENDERED[tokenizer.removeprefix("DeepSeek-")]
    assert found["special"] == [0, 1, 1]
    special = json.loads((published_models.DATA / tokenizer / "special_tokens.json").read_text())
    assert found["ids"][:2] == [0, special["<｜User｜>"]]
    assert len(found["ids"]) < len(found["rendered"])
    assert found["text"] == found["rendered"]
    assert found["continued"].size(1) > len(found["ids"])
