"""What conversion says to bad files: one line that names the file or tensor, and no target, not even a part of one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import checks, from_hf, inspect, sharded, to_hf, verify, work
from dsv3_train.errors import UserError

pytest.importorskip("transformers")

EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """FP8 with MTP, in three files."""
    path = tmp_path_factory.mktemp("good") / "hf"
    hf_models.save(path)
    hf_models.add_mtp(path)
    hf_models.to_fp8(path)
    return path


def convert(source: Path, target: Path, recipe: str | None = None, overrides: tuple[str, ...] = (), **options) -> None:
    plan = from_hf.make_plan(source, recipe, overrides, options.get("mtp"), None, "small")
    from_hf.convert(plan, target, 1, quiet)


def refused(source: Path, target: Path, *parts: str, **options) -> str:
    """One line that names the parts; nothing is left."""
    with pytest.raises(UserError) as error:
        convert(source, target, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert not target.exists()
    assert not target.with_name(target.name + ".unfinished").exists()
    return message


def change(path: Path, **changed: torch.Tensor | None) -> None:
    contents = {**hf_models.tensors(path), **{name: tensor for name, tensor in changed.items() if tensor is not None}}
    hf_models.rewrite(path, {name: tensor for name, tensor in contents.items() if changed.get(name, 0) is not None}, 3)


def with_value(name: str, value: float):
    def damage(path: Path) -> None:
        tensor = hf_models.tensors(path)[name].clone()
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).view(-1)[5] = 0x7F  # E4M3's NaN
        else:
            tensor.view(-1)[5] = value
        change(path, **{name: tensor})

    return damage


def without(name: str):
    return lambda path: change(path, **{name: None})


def as_type(name: str, dtype: torch.dtype):
    return lambda path: change(path, **{name: hf_models.tensors(path)[name].to(dtype)})


def settings(**changed):
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changed}))

    return damage


def shard(path: Path, number: int = 2) -> Path:
    return path / f"model-0000{number}-of-000003.safetensors"


def cut(path: Path) -> None:
    os.truncate(shard(path), shard(path).stat().st_size - 100)


def index(path: Path, text: str) -> None:
    (path / "model.safetensors.index.json").write_text(text)


TENSORS = {
    "truncated shard": (cut, ["model-00002-of-000003.safetensors: cut short", "fetch it again"]),
    "truncated header": (lambda path: os.truncate(shard(path), 40), ["model-00002-of-000003.safetensors"]),
    "no safetensors": (lambda path: shard(path).write_bytes(b"\xff" * 999), ["model-00002-of-000003.safetensors"]),
    "missing shard": (lambda path: shard(path).unlink(), ["model-00002-of-000003.safetensors: missing", "tensors"]),
    "missing weight": (without(EXPERT), [EXPERT, "missing"]),
    "missing scale": (without(f"{EXPERT}_scale_inv"), [f"{EXPERT}_scale_inv", "missing", "scales"]),
    "extra tensor": (lambda path: change(path, extra=torch.ones(3)), ["extra", "no tensor of this model"]),
    "extra layer": (
        lambda path: change(path, **{"model.layers.7.input_layernorm.weight": torch.ones(64)}),
        ["model.layers.7.input_layernorm.weight", "no tensor of this model"],
    ),
    "part of MTP": (without("model.layers.4.enorm.weight"), ["model.layers.4.enorm.weight", "missing"]),
    "wrong shape": (
        lambda path: change(path, **{"model.norm.weight": torch.ones(65, dtype=torch.bfloat16)}),
        ["model.norm.weight is [65]", "[64]"],
    ),
    "scale of another shape": (
        lambda path: change(path, **{f"{EXPERT}_scale_inv": torch.ones(2, 1)}),
        [f"{EXPERT}_scale_inv is F32 [2, 1], not F32 [1, 1]"],
    ),
    "NaN": (with_value("model.norm.weight", float("nan")), ["model.norm.weight", "not finite"]),
    "infinity": (with_value("lm_head.weight", float("inf")), ["lm_head.weight", "not finite"]),
    "NaN in FP8": (with_value(EXPERT, 0), [EXPERT, "not finite"]),
    "integers": (as_type("model.norm.weight", torch.int32), ["model.norm.weight is I32"]),
    "half precision": (as_type("lm_head.weight", torch.float16), ["lm_head.weight is F16", "BF16"]),
    "FP8 of another kind": (as_type(EXPERT, torch.float8_e5m2), [f"{EXPERT} is F8_E5M2"]),
    "FP8 norm": (as_type("model.norm.weight", torch.float8_e4m3fn), ["model.norm.weight"]),
    "rounded routing bias": (as_type(BIAS, torch.bfloat16), [f"{BIAS} is BF16, not F32", "routing"]),
    "MTP with another embedding": (
        with_value("model.layers.4.embed_tokens.weight", 3.0),
        ["model.layers.4.embed_tokens.weight differs from model.embed_tokens.weight", "--mtp drop"],
    ),
    "index of nothing": (lambda path: index(path, "[]"), ["model.safetensors.index.json"]),
    "index out of the directory": (
        lambda path: index(path, json.dumps({"weight_map": {"a": "../../etc/passwd"}})),
        ["model.safetensors.index.json", "../../etc/passwd"],
    ),
    "no config": (lambda path: (path / "config.json").unlink(), ["config.json"]),
    "config of nothing": (lambda path: (path / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "another model": (settings(model_type="llama"), ["config.json: model_type: 'llama' is not supported"]),
    "tied embeddings": (settings(tie_word_embeddings=True), ["config.json: tie_word_embeddings: True"]),
    "another activation": (settings(hidden_act="gelu"), ["hidden_act: 'gelu'"]),
    "V2's groups": (
        settings(
            model_type="deepseek_v2", rope_interleave=True, topk_method="group_limited_greedy", norm_topk_prob=False
        ),
        ["topk_method: 'group_limited_greedy'"],
    ),
    "one expert per token": (settings(num_experts_per_tok=1), ["num_experts_per_tok: 1 is not supported"]),
    "other RoPE": (settings(rope_parameters={"rope_type": "longrope", "factor": 4.0}), ["rope_parameters", "longrope"]),
    "other quantisation": (settings(quantization_config={"quant_method": "awq"}), ["quantization_config"]),
    "text for a number": (settings(hidden_size="64"), ["config.json: hidden_size: must be an integer"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_refused(good, tmp_path, case):
    damage, parts = TENSORS[case]
    source = hf_models.copy(good, tmp_path / "hf")
    damage(source)
    refused(source, tmp_path / "run", *parts)


@pytest.mark.parametrize("value", [{"model.hidden_size": 32}, {"model.rope_theta": 5e5, "model.topk_group": 1}])
def test_a_recipe_that_contradicts(good, tmp_path, value):
    convert(good, tmp_path / "run")
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    for key, number in value.items():
        name = key.split(".")[1]
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{name}:"))
        text = text.replace(line, f"  {name}: {number}")
    other = tmp_path / "other.yaml"
    other.write_text(text)
    with pytest.raises(UserError) as error:
        convert(good, tmp_path / "again", str(other))
    lines = str(error.value).splitlines()
    assert len(lines) == len(value)
    for key in value:
        assert any(f"{key}: " in line and "in the recipe" in line and "in config.json" in line for line in lines)
    # What the command line says itself holds, where the tensors allow it.
    if "model.rope_theta" in value:
        convert(good, tmp_path / "again", str(other), ("model.rope_theta=5e5", "model.topk_group=1"))


def test_mtp_that_is_not_there(good, tmp_path):
    hf_models.save(tmp_path / "hf")
    refused(tmp_path / "hf", tmp_path / "run", "no MTP to keep", "nothing of layer 4", mtp="keep")
    convert(tmp_path / "hf", tmp_path / "run", mtp="drop")


def test_a_target_that_is_there(good, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="exists; remove it"):
        convert(good, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_command(good, tmp_path):
    """Exit code 2, one line, no traceback; `inspect` still says all that it can."""
    source = hf_models.copy(good, tmp_path / "hf")
    cut(source)
    command = [sys.executable, "-m", "dsv3_cli.main", "convert"]
    done = subprocess.run([*command, "from-hf", "hf", "run"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "cut short" in done.stderr
    looked = inspect.inspect(source)
    assert "cut short" in looked["problems"][0]
    assert set(looked["missing"]) < set(hf_models.tensors(good))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# A damaged checkpoint


@pytest.fixture
def run(good, tmp_path, monkeypatch) -> Path:
    """A converted checkpoint of several files."""
    monkeypatch.setattr(from_hf, "_SMALLEST_FILE", 1 << 17)
    convert(good, tmp_path / "run")
    return tmp_path / "run"


def test_damaged_checkpoints(run, tmp_path):
    file = resolve(run) / "__2_0.distcp"
    whole = file.read_bytes()
    flipped = whole[:3000] + bytes([whole[3000] ^ 0x40]) + whole[3001:]
    for data, part in ((whole[:-10], "cut short"), (flipped, "its SHA-256 is not the one"), (None, "missing")):
        file.unlink()
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(UserError) as error:
            to_hf.convert(to_hf.make_plan(resolve(run), None, None), tmp_path / "out", 1, quiet)
        assert "__2_0.distcp" in str(error.value)
        assert part in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        sharded._open.cache_clear()


def test_without_checksums(run, tmp_path):
    """Of a checkpoint that was written before there were any, what is no archive any more is seen; the rest is said."""
    file = resolve(run) / "__2_0.distcp"
    (resolve(run) / "manifest.json").unlink()
    assert "manifest.json, so values that have changed" in to_hf.make_plan(resolve(run), None, None).notes[-1]
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="damaged at byte"):
        to_hf.convert(to_hf.make_plan(resolve(run), None, None), tmp_path / "out", 1, quiet)


def test_a_bit_that_changed_is_seen_by_all(run, good, tmp_path):
    """Values that are still numbers: by an export, a comparison and a look at the checkpoint; by no look at headers."""
    file = resolve(run) / "__2_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x55
    file.write_bytes(data)
    said = "__2_0.distcp: its SHA-256 is not the one of what was written"
    with pytest.raises(UserError, match=said):
        to_hf.convert(to_hf.make_plan(resolve(run), None, None), tmp_path / "out", 1, quiet)
    assert not (tmp_path / "out").exists()
    for pair in ((run, good), (good, run), (run, run)):
        with pytest.raises(UserError, match=said):
            verify.verify(*map(verify.open_weights, pair), 1, quiet)
    assert inspect.inspect(run)["problems"] == [said]
    assert inspect.inspect(run, checksums=False)["problems"] == []


def test_each_file_is_read_once_for_its_checksum(run, tmp_path, monkeypatch):
    """And before the first file that is made of it."""
    read: list[str] = []
    plain = checks.check
    monkeypatch.setattr(
        checks, "check", lambda where, file, *entry: read.append(Path(file).name) or plain("", file, *entry)
    )
    to_hf.convert(to_hf.make_plan(resolve(run), None, None), tmp_path / "out", 1, quiet)
    names = {file.name for file in resolve(run).iterdir()} - {"manifest.json"}
    assert sorted(read) == sorted(names)


def test_nan_in_a_checkpoint(run, tmp_path):
    from dsv3_train.checkpoint.hf.sharded import Checkpoint, _mapped

    tensor = Checkpoint(resolve(run)).tensors["decoder.final_layernorm.weight"]
    values = _mapped(tensor.chunks[0], tensor.dtype).clone()
    file = Path(tensor.chunks[0].file)
    data = file.read_bytes()
    place = data.index(values.view(torch.uint8).numpy().tobytes(), tensor.chunks[0].begin)
    values[3] = float("nan")
    (resolve(run) / "manifest.json").unlink()  # as one that was written before there were any
    file.write_bytes(data[:place] + values.view(torch.uint8).numpy().tobytes() + data[place + values.nbytes :])
    with pytest.raises(UserError, match=r"decoder\.final_layernorm\.weight: has values that are not finite"):
        to_hf.convert(to_hf.make_plan(resolve(run), None, None), tmp_path / "out", 1, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# Cut short


def test_full_disk(good, tmp_path, monkeypatch):
    """The third file meets a full disk: what is whole stays, and the next run ends the work."""
    monkeypatch.setattr(from_hf, "_SMALLEST_FILE", 1 << 17)
    checkpoint = tmp_path / "run.unfinished" / "checkpoints" / "step_00000000"
    with full_at(2, from_hf), pytest.raises(UserError, match="run again, it goes on") as error:
        convert(good, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    first = (checkpoint / "__0_0.distcp").stat().st_mtime_ns
    convert(good, tmp_path / "run")
    assert (resolve(tmp_path / "run") / "__0_0.distcp").stat().st_mtime_ns == first
    assert not checkpoint.exists()
    plan = to_hf.make_plan(resolve(tmp_path / "run"), None, None)
    with full_at(1, to_hf), pytest.raises(UserError, match="run again, it goes on"):
        to_hf.convert(plan, tmp_path / "out", 1, quiet)
    to_hf.convert(plan, tmp_path / "out", 1, quiet)
    assert hf_models.tensors(tmp_path / "out").keys() == hf_models.tensors(good).keys()


@contextlib.contextmanager
def full_at(number: int, module) -> Iterator[None]:
    """The disk is full when a conversion writes its file `number`."""
    plain, written = module.write_file, []

    def write_file(*task):
        if len(written) == number:
            Path("/dev/full").write_text("x")
        written.append(task)
        return plain(*task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_file", write_file)
        yield


@pytest.mark.parametrize("what", ["notes.txt", "checkpoints/notes.txt", "a link to a directory"])
@pytest.mark.parametrize("ours", [True, False])
def test_what_is_not_ours_stays(good, tmp_path, monkeypatch, what, ours):
    """In TARGET.unfinished: neither taken into the target, nor deleted after a fault of the input."""
    unfinished, elsewhere = tmp_path / "run.unfinished", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("years of work")
    if ours:
        monkeypatch.setattr(from_hf, "_SMALLEST_FILE", 1 << 17)
        killed_at(2, from_hf, good, tmp_path / "run")
    if "link" in what:
        if ours:
            unfinished.rename(tmp_path / "there")
        unfinished.symlink_to(tmp_path / "there" if ours else elsewhere)
    else:
        (unfinished / what).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / what).write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="move it away, or choose another target"):
        convert(good, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_room(good, tmp_path, monkeypatch):
    """Known before anything is written."""
    import shutil

    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    refused(good, tmp_path / "run", "bytes to write, and 1,000 are free")


def killed_at(number: int, module, source: Path, target: Path) -> None:
    """In a process of its own: convert, and die by SIGKILL as file `number` is written."""

    def work_until_killed() -> None:
        plain = module.write_file

        def write_file(where, *task):
            if work_until_killed.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            work_until_killed.left -= 1
            return plain(where, *task)

        work_until_killed.left = number
        module.write_file = write_file
        if module is from_hf:
            convert(source, target)
        else:
            to_hf.convert(to_hf.make_plan(resolve(source), None, None), target, 1, quiet)

    process = multiprocessing.get_context("fork").Process(target=work_until_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not target.exists()


def test_killed(good, tmp_path, monkeypatch):
    """kill -9 in the middle, both ways: no target; the next run goes on and ends with the same files."""
    monkeypatch.setattr(from_hf, "_SMALLEST_FILE", 1 << 17)
    killed_at(3, from_hf, good, tmp_path / "run")
    checkpoint = tmp_path / "run.unfinished" / "checkpoints" / "step_00000000"
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert len(before) == 3
    convert(good, tmp_path / "run")
    after = {file.name: file.stat().st_mtime_ns for file in resolve(tmp_path / "run").iterdir()}
    assert before.items() < after.items()
    killed_at(1, to_hf, tmp_path / "run", tmp_path / "out")
    to_hf.convert(to_hf.make_plan(resolve(tmp_path / "run"), None, None), tmp_path / "out", 1, quiet)
    assert all((tmp_path / "out" / file.name).read_bytes() == file.read_bytes() for file in good.iterdir())


def test_what_another_conversion_left(good, tmp_path, monkeypatch):
    monkeypatch.setattr(from_hf, "_SMALLEST_FILE", 1 << 17)
    killed_at(2, from_hf, good, tmp_path / "run")
    with pytest.raises(UserError, match=r"left by a conversion of other files or options; remove it"):
        convert(good, tmp_path / "run", mtp="drop")


def die(where: str, number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker(tmp_path):
    units = [work.Unit(i, 1, die, (i,)) for i in range(2)]
    with (
        pytest.raises(UserError, match="a worker was killed"),
        work.unfinished(tmp_path / "run", "plan", lambda _: True) as where,
    ):
        work.run(where, units, 2, quiet, "converting")
    assert not (tmp_path / "run").exists()


def test_full_disk_at_the_very_end(good, tmp_path, monkeypatch):
    """All files are there but the table of contents: it goes on from there."""
    plain = from_hf.finish
    monkeypatch.setattr(from_hf, "finish", lambda *_: Path("/dev/full").write_text("x"))
    with pytest.raises(UserError, match="run again, it goes on"):
        convert(good, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(from_hf, "finish", plain)
    convert(good, tmp_path / "run")
    assert inspect.inspect(tmp_path / "run")["missing"] == []
