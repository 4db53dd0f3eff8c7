"""Training that begins from Hugging Face's files, or from what was made of them, and goes back."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import from_hf, to_hf
from dsv3_train.checkpoint.hf.sharded import Checkpoint
from dsv3_train.data import special_tokens
from dsv3_train.data.prepare import prepare
from dsv3_train.recipe.load import dump, load
from dsv3_train.recipe.schema import Prepare
from dsv3_train.runtime import distributed
from parity import in_processes

pytest.importorskip("transformers")

LAYOUTS = {
    "one": ["parallel.zero1=false"],
    "pp2_ep2": ["parallel.world_size=4", "parallel.pipeline=2", "parallel.expert=2", "pipeline.layout=Ettt|tmL"],
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Path, str]:
    """A directory with MTP, the run that was made of it, and a dataset."""
    where = tmp_path_factory.mktemp("begun")
    hf_models.save(where / "hf", vocab_size=512)
    hf_models.add_mtp(where / "hf", shards=2)
    from_hf.convert(from_hf.make_plan(where / "hf", None, [], None, None, "small"), where / "run", 1, lambda *_: None)
    sources = str(Path(__file__).parents[2] / "dsv3_train" / "recipe")
    prepare(Prepare(inputs=[sources], output=str(where / "data"), vocab_size=512), workers=1)
    distributed.prepare_import("cpu")
    import dsv3_train.training.run  # noqa: F401  once, before forking

    return where / "hf", where / "run", str(where / "data")


def train(recipe, run_dir: Path) -> None:
    """A run as `dsv3 train` starts it, its recipe beside it."""

    def on_rank() -> None:
        from dsv3_train.training.run import Run
        from dsv3_train.training.startup import Startup

        distributed.start(recipe, "cpu")
        Run(recipe, run_dir, "cpu", Startup()).train()
        distributed.stop()

    run_dir.mkdir()
    in_processes(on_rank, recipe.parallel.world_size)
    (run_dir / "recipe.yaml").write_text(dump(recipe))


def changed(before: Path, after: Path) -> list[str]:
    """Files that are not as they were; the tokenizer of the data, which these directories lack, comes along."""
    names = {file.name for file in before.iterdir()}
    assert {file.name for file in after.iterdir()} <= names | set(special_tokens.FILES)
    return [name for name in names if not filecmp.cmp(before / name, after / name, shallow=False)]


@pytest.mark.parametrize(("source", "layout"), [("hf", "pp2_ep2"), ("run", "one")])
def test_begin(begun, tmp_path, source, layout):
    """One step with learning rate 0: the log says what began afresh, averages are the weights, the files come back."""
    files, run, data = begun
    load_from = f"hf:{files}" if source == "hf" else str(run)
    recipe = load(
        str(run / "recipe.yaml"),
        [
            *LAYOUTS[layout],
            f"checkpoint.load={load_from}",
            f"runtime={{device: cpu, run_dir: {tmp_path / 'trained'}}}",
            f"data={{train: [{{path: {data}}}], workers: 0}}",
            "training={duration: 1 steps, sequence_length: 32}",
            "schedule.lr=0",
            "optim.ema_decay=0.9",
            "logging.tensorboard=false",
        ],
    )

    train(recipe, tmp_path / "trained")
    log = (tmp_path / "trained" / "log.txt").read_text()
    assert "optimizer and schedules begin afresh" in log
    assert str(files if source == "hf" else run) in log
    saved = Checkpoint(resolve(tmp_path / "trained"))
    averages = [key for key in saved.tensors if key.startswith("ema.")]
    assert len(averages) > 50
    for key in averages:
        shape = saved.tensors[key].shape
        weight, average = (saved.read(name, [0] * len(shape), shape) for name in (key.removeprefix("ema."), key))
        assert torch.equal(weight, average), key
    plan = to_hf.make_plan(resolve(tmp_path / "trained"), None, None)
    to_hf.convert(plan, tmp_path / "back", 1, lambda *_: None)
    assert changed(files, tmp_path / "back") == []


@pytest.mark.parametrize(("source", "layout"), [("hf", "pp2_ep2"), ("run", "one")])
def test_fp8_comes_back_with_its_source_gone(begun, tmp_path, source, layout):
    """Trained in BF16 with learning rate 0, in two runs, one begun from the other: as it was, norms in FP32 too."""
    hf_models.plain(tmp_path / "hf", mtp=1, vocab_size=512, num_hidden_layers=4, n_routed_experts=16)
    hf_models.to_fp8(tmp_path / "hf", scale=lambda block, name: 1.3 * block.abs().max() / 448)
    contents = hf_models.tensors(tmp_path / "hf")
    for name in contents:
        if "norm" in name:
            contents[name] = contents[name].float() + 1e-4
        if contents[name].dtype == torch.float8_e4m3fn:  # an update by 0 takes -0 to 0, an equal value of another code
            contents[name] = (contents[name].float() + 0.0).to(torch.float8_e4m3fn)
    contents["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    hf_models.rewrite(tmp_path / "hf", contents, 2)
    hf_models.copy(tmp_path / "hf", tmp_path / "kept")
    plan = from_hf.make_plan(tmp_path / "hf", None, [], None, None, "small")
    from_hf.convert(plan, tmp_path / "run", 1, lambda *_: None)
    load_from = f"hf:{tmp_path / 'hf'}" if source == "hf" else str(tmp_path / "run")
    settings = [
        *LAYOUTS[layout],
        "runtime={device: cpu}",
        f"data={{train: [{{path: {begun[2]}}}], workers: 0}}",
        "schedule.lr=0",
        "logging.tensorboard=false",
    ]
    for steps, name, begin in ((1, "first", load_from), (2, "second", str(tmp_path / "first"))):
        duration = f"training={{duration: {steps} steps, sequence_length: 32}}"
        overrides = [*settings, duration, f"checkpoint.load={begin}", f"runtime.run_dir={tmp_path / name}"]
        train(load(str(tmp_path / "run" / "recipe.yaml"), overrides), tmp_path / name)
    log = (tmp_path / "first" / "log.txt").read_text()
    assert ("1 frequencies of RoPE" in log and "FP8 scales are kept" in log) == (source == "hf")
    for gone in ("hf", "run", "first"):
        shutil.rmtree(tmp_path / gone)
    saved = Checkpoint(resolve(tmp_path / "second"))
    assert saved.tensors["decoder.final_layernorm.weight"].dtype == "BF16"
    to_hf.convert(to_hf.make_plan(resolve(tmp_path / "second"), None, None), tmp_path / "back", 1, lambda *_: None)
    assert changed(tmp_path / "kept", tmp_path / "back") == []


def test_files_that_contradict_the_recipe(begun, tmp_path):
    """Named key by key before anything runs; a stretched RoPE is a note, for a context extension changes it."""
    from dsv3_train.checkpoint.hf.fill import load_published
    from dsv3_train.errors import UserError

    files, run, _ = begun
    recipe = load(
        str(run / "recipe.yaml"), ["model.topk_group=1", "model.intermediate_size=160", "model.rope_theta=5e5"]
    )
    with pytest.raises(UserError) as error:
        load_published(files, recipe, [])
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "model.intermediate_size: 160 in the recipe, 144 in config.json" in lines[0]
    assert "model.topk_group: 1 in the recipe, 2 in config.json" in lines[1]
    assert load_published(files, load(str(run / "recipe.yaml"), ["model.rope_theta=5e5"]), []) == [
        "model.rope_theta: 500000.0 in the recipe, 10000.0 in config.json"
    ]
    hf_models.plain(tmp_path / "uncounted", mtp=1)
    hf_models.rewrite(tmp_path / "uncounted", hf_models.tensors(tmp_path / "uncounted"), num_nextn_predict_layers=0)
    with pytest.raises(
        UserError, match=r"config\.json: num_nextn_predict_layers: 0, but the files have MTP in layer 2"
    ):
        load_published(tmp_path / "uncounted", load(str(run / "recipe.yaml")), [])
