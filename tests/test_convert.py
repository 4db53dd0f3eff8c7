"""`dsv3 convert`: there and back bit for bit, in every type, with and without MTP; what it says in JSON."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import fp8, from_hf, inspect, to_hf, verify
from dsv3_train.checkpoint.hf.sharded import Checkpoint
from dsv3_train.recipe.load import load

pytest.importorskip("transformers")

WIDE = {"hidden_size": 192, "moe_intermediate_size": 136, "kv_lora_rank": 160, "qk_rope_head_dim": 40}
"""Several FP8 blocks in each direction, cut at the border."""


def quiet(*_: object) -> None:
    pass


def convert_in(source: Path, target: Path, **options) -> dict:
    plan = from_hf.make_plan(source, None, [], options.get("mtp"), options.get("dtype"), "small")
    return from_hf.convert(plan, target, options.get("workers", 1), quiet)


def convert_out(run: Path, target: Path, dtype=None, mtp=None, workers=1) -> dict:
    return to_hf.convert(to_hf.make_plan(resolve(run), dtype, mtp), target, workers, quiet)


def assert_same_files(one: Path, other: Path) -> None:
    """Every file of the two directories, byte for byte: tensors, index, config.json, tokenizer."""
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)] == []


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """A directory of each type; FP8's with MTP."""
    where = tmp_path_factory.mktemp("hf")
    hf_models.save(where / "fp32", **WIDE)
    hf_models.save(where / "bf16", dtype=torch.bfloat16, shard="100MB", **WIDE)
    hf_models.save(where / "fp8", **WIDE)
    hf_models.add_mtp(where / "fp8")
    hf_models.to_fp8(where / "fp8")
    return {name: where / name for name in ("fp32", "bf16", "fp8")}


@pytest.fixture(scope="module")
def runs(directories, tmp_path_factory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("runs")
    for name, source in directories.items():
        convert_in(source, where / name)
    return {name: where / name for name in directories}


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_there_and_back(directories, runs, tmp_path, name):
    convert_out(runs[name], tmp_path / "back")
    assert_same_files(directories[name], tmp_path / "back")


def test_routing_biases_that_came_in_bf16(tmp_path):
    """A directory saved in one type throughout (Moonlight's): FP32 in the checkpoint, and back as it was."""
    hf_models.save(tmp_path / "hf")
    contents = {name: tensor.bfloat16() for name, tensor in hf_models.tensors(tmp_path / "hf").items()}
    hf_models.rewrite(tmp_path / "hf", contents, dtype="bfloat16")
    report = convert_in(tmp_path / "hf", tmp_path / "run")
    assert any("routing biases are BF16" in note for note in report["notes"])
    found = Checkpoint(resolve(tmp_path / "run")).tensors
    assert {found[key].dtype for key in found if key.endswith("expert_bias")} == {"F32"}
    convert_out(tmp_path / "run", tmp_path / "back")
    assert_same_files(tmp_path / "hf", tmp_path / "back")


def test_experts_of_several_types(directories, tmp_path):
    """Some linear layers left in BF16, as `modules_to_not_convert` does, one of them a part of a larger tensor."""
    source = hf_models.copy(directories["fp8"], tmp_path / "hf")
    contents = hf_models.tensors(source)
    for name in ("model.layers.1.mlp.experts.2.gate_proj.weight", "model.layers.2.self_attn.o_proj.weight"):
        contents[name] = fp8.dequantise(contents[name], contents.pop(f"{name}_scale_inv")).bfloat16()
    hf_models.rewrite(source, contents, 2)
    convert_in(source, tmp_path / "run")
    convert_out(tmp_path / "run", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_two_workers_write_the_same(directories, runs, tmp_path):
    convert_in(directories["fp8"], tmp_path / "run", workers=2)
    convert_out(tmp_path / "run", tmp_path / "back", workers=2)
    assert_same_files(directories["fp8"], tmp_path / "back")


def test_types_within_the_checkpoint(runs):
    """FP8 is kept as FP32, all else as it came; routing biases are FP32 always."""
    tensors = Checkpoint(resolve(runs["fp8"])).tensors
    assert tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].dtype == "F32"
    assert tensors["decoder.final_layernorm.weight"].dtype == "BF16"
    for name in runs:
        found = Checkpoint(resolve(runs[name])).tensors
        assert {found[key].dtype for key in found if key.endswith("expert_bias")} == {"F32"}


def test_fp8_values(directories, runs):
    """Codes x scales, element by element."""
    stored = hf_models.tensors(directories["fp8"])
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 200 rows: 128 and 72
    codes, scales = stored[name], stored[f"{name}_scale_inv"]
    assert scales.shape == (2, 2)
    got = Checkpoint(resolve(runs["fp8"])).read(
        "decoder.layers.0.self_attention.linear_kv_down_proj.weight", (0, 0), codes.shape
    )
    spread = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :192]
    assert torch.equal(got, codes.float() * spread)


def test_to_fp8_as_a_plain_quantiser_does(directories, runs, tmp_path):
    convert_out(runs["bf16"], tmp_path / "fp8", "fp8")
    got, source = hf_models.tensors(tmp_path / "fp8"), hf_models.tensors(directories["bf16"])
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert {name for name in got if not name.endswith("_scale_inv")} == source.keys()
    quantised = [name for name in source if f"{name}_scale_inv" in got]
    assert all("proj" in name for name in quantised)
    assert len(quantised) == sum("proj" in name for name in source)
    for name in quantised:
        codes, scales = hf_models.quantise(source[name].float())
        assert torch.equal(bits(got[name]), bits(codes))
        assert torch.equal(got[f"{name}_scale_inv"], scales)
    for name in source.keys() - set(quantised):
        assert torch.equal(got[name], source[name])
        assert got[name].dtype == source[name].dtype


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_out_of_fp8(directories, runs, tmp_path, dtype):
    convert_out(runs["fp8"], tmp_path / "out", dtype)
    stored, got = hf_models.tensors(directories["fp8"]), hf_models.tensors(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    for name, tensor in got.items():
        values = stored[name]
        if f"{name}_scale_inv" in stored:
            values = fp8.dequantise(values, stored[f"{name}_scale_inv"])
        assert tensor.dtype == (torch.float32 if name.endswith("bias") else kind)
        assert torch.equal(tensor, values.to(tensor.dtype))


def test_drop_mtp(directories, tmp_path):
    report = convert_in(directories["fp8"], tmp_path / "run", mtp="drop")
    assert report["mtp"] == 0
    assert all(name.startswith("model.layers.4.") for name in report["left_out"])
    assert load(str(tmp_path / "run" / "recipe.yaml")).model.num_nextn_predict_layers == 0
    convert_out(tmp_path / "run", tmp_path / "back")
    stored, got = hf_models.tensors(directories["fp8"]), hf_models.tensors(tmp_path / "back")
    assert got.keys() == {name for name in stored if ".layers.4." not in name}
    assert all(torch.equal(bits(got[name]), bits(stored[name])) for name in got)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_drop_mtp_on_the_way_out(directories, runs, tmp_path):
    convert_out(runs["fp8"], tmp_path / "back", mtp="drop")
    assert not [name for name in hf_models.tensors(tmp_path / "back") if ".layers.4." in name]
    assert inspect.inspect(tmp_path / "back")["missing"] == []


LOADED = """
import sys, torch, transformers
load = transformers.DeepseekV3ForCausalLM.from_pretrained
model, info = load(sys.argv[1], output_loading_info=True, torch_dtype=torch.float32, attn_implementation="eager")
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
tokens = torch.randint(0, 160, (1, 32), generator=torch.Generator().manual_seed(0))
torch.save(model(tokens).logits.detach(), sys.argv[2])
"""


def test_transformers_loads_what_comes_out(runs, tmp_path):
    """No missing or unexpected key; its logits are those of the model before. In a process without our patches."""
    convert_out(runs["fp32"], tmp_path / "back")
    arguments = [sys.executable, "-c", LOADED, str(tmp_path / "back"), str(tmp_path / "logits.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = torch.randint(0, 160, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf_models.reference(**WIDE)(tokens).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_a_run_that_came_from_nowhere(runs, tmp_path):
    """Without files that it came from, a checkpoint makes its own config.json, one that derives the same model."""
    import shutil

    shutil.copytree(runs["fp32"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    report = convert_out(tmp_path / "run", tmp_path / "out")
    assert any("made anew" in note for note in report["notes"])
    assert any("no tokenizer is known" in note for note in report["notes"])
    assert not {"bos_token_id", "eos_token_id"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    plan = from_hf.make_plan(tmp_path / "out", None, [], None, None, "small")
    assert plan.recipe.model == load(str(runs["fp32"] / "recipe.yaml")).model.model_copy(
        update={"initializer_range": 0.02}
    )
    found = verify.verify(verify.open_weights(tmp_path / "out"), verify.open_weights(runs["fp32"]), 1, quiet)
    assert found["identical"] == found["tensors"]


def test_tokens_come_from_the_tokenizer(runs, tmp_path):
    """Trained here, `<|eos_token|>` is 0; with files that a model came from, what they say stays (bos 0, eos 1)."""
    import shutil

    from dsv3_train.data import tokenizer

    recipe = (runs["bf16"] / "recipe.yaml").read_text()
    shutil.copytree(runs["bf16"], tmp_path / "run")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.train(["def f(x): return x"] * 9, 300))
    line = next(line for line in recipe.splitlines() if line.startswith("  tokenizer:"))
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace(line, f"  tokenizer: {tmp_path / 'tokenizer.json'}"))
    for name, expected in (("kept", (0, 1)), ("fresh", (0, 0))):
        convert_out(tmp_path / "run", tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == expected
        shutil.rmtree(tmp_path / "run" / "hf", ignore_errors=True)
    assert filecmp.cmp(tmp_path / "fresh" / "tokenizer.json", tmp_path / "tokenizer.json", shallow=False)


def test_transformers_runs_a_model_without_shared_experts(tmp_path):
    """Its own has some of width 0, which no file of ours holds."""
    from dsv3_train.checkpoint.hf.logits import _transformers

    model = hf_models.save(tmp_path / "hf", n_shared_experts=0)
    contents = {name: tensor for name, tensor in hf_models.tensors(tmp_path / "hf").items() if tensor.numel()}
    hf_models.rewrite(tmp_path / "hf", contents)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    assert torch.equal(_transformers(verify.open_weights(tmp_path / "hf"))(tokens), expected)


def dsv3(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dsv3_cli.main", "convert", *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_command(directories, tmp_path):
    """from-hf, verify, inspect and to-hf as a user runs them; one JSON object each."""
    source = directories["fp32"]
    done = dsv3("from-hf", str(source), "run", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert "converted without MTP" in done.stderr  # transformers leaves it out, and num_nextn_predict_layers in
    count = len(hf_models.tensors(source))
    assert (report["weights"], report["scales"], report["dtypes"]) == (count, 0, {"F32": count})
    done = dsv3("verify", str(source), "run", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, found["tensors"], found["identical"]) == (0, count, count)
    assert (found["max_abs_difference"], found["missing"], found["surplus"]) == (0.0, [], [])
    assert found["logits"]["by"] == ["transformers", "dsv3-train"]
    assert found["logits"]["relative_difference"] < 1e-5
    looked = json.loads(dsv3("inspect", "run", "--json", cwd=tmp_path).stdout)
    theirs = json.loads(dsv3("inspect", str(source), "--json", cwd=tmp_path).stdout)
    assert looked["values"] == theirs["values"] == sum(tensor.numel() for tensor in hf_models.tensors(source).values())
    assert (theirs["weights"], theirs["scales"], theirs["missing"], theirs["surplus"]) == (count, 0, [], [])
    assert (looked["missing"], looked["surplus"]) == ([], [])
    assert dsv3("to-hf", "run", "back", cwd=tmp_path).returncode == 0
    assert_same_files(source, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "run"]


def test_verify_sees_a_difference(directories, tmp_path):
    other = hf_models.copy(directories["fp32"], tmp_path / "other")
    contents = hf_models.tensors(other)
    contents["model.layers.2.mlp.experts.3.up_proj.weight"][5, 7] += 0.25
    del contents["model.layers.2.mlp.experts.4.up_proj.weight"]
    hf_models.rewrite(other, contents)
    done = dsv3("verify", str(directories["fp32"]), str(other), "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["identical"] == found["tensors"] - 1 == len(contents) - 1
    assert found["max_abs_difference"] == pytest.approx(0.25)
    assert found["different"] == ["model.layers.2.mlp.experts.3.up_proj.weight"]
    assert found["missing"] == ["model.layers.2.mlp.experts.4.up_proj.weight"]
    assert inspect.inspect(other)["missing"] == found["missing"]


def test_generate_from_a_converted_model(tmp_path):
    """The tokenizer comes along, and the recipe is enough to run it."""
    from dsv3_train.data import tokenizer

    hf_models.save(tmp_path / "hf", vocab_size=320)
    (tmp_path / "hf" / "tokenizer.json").write_bytes(tokenizer.train(["def f(x): return x"] * 9, 300))
    convert_in(tmp_path / "hf", tmp_path / "run")
    command = [
        sys.executable,
        "-m",
        "dsv3_cli.main",
        "generate",
        "run",
        "--prompt",
        "def ",
        "--max-tokens",
        "3",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "def "
