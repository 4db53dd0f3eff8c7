"""Checkpoints and Hugging Face directories that lie: each is refused in one line, at once, in little memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from fuzz_checkpoints import made, read, there, write

from dsv3_train import whole
from dsv3_train.checkpoint import checksums, common, contents, directory
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import from_hf, origin, published, to_hf
from dsv3_train.checkpoint.hf.files import read_header
from dsv3_train.checkpoint.hf.inspect import inspect
from dsv3_train.checkpoint.hf.verify import open_weights, verify
from dsv3_train.errors import UserError


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made(folder / "hf", True, 2, 0)
    there(folder / "hf", folder / "run")
    return {"hf": folder / "hf", "run": folder / "run"}


@pytest.fixture
def hf(bases, tmp_path) -> Path:
    """FP8, two files."""
    return Path(shutil.copytree(bases["hf"], tmp_path / "hf"))


@pytest.fixture
def run(bases, tmp_path) -> Path:
    return Path(shutil.copytree(bases["run"], tmp_path / "run"))


def export(run: Path) -> None:
    target = run.parent / "out"
    to_hf.convert(to_hf.make_plan(resolve(run), None, None), target, 1, quiet)


def refused(work, *parts: str) -> None:
    def too_long(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        with pytest.raises(UserError) as error:
            work()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert all(part in str(error.value) for part in parts), error.value


def settings(path: Path, **changed: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changed}))


BOMBS = {
    "a memo of 2^31 entries": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "the same in digits": b"\x80\x02Np2000000000\n.",
    "8 GiB of bytes": b"\x80\x05\x96\x00\x00\x00\x00\x02\x00\x00\x00.",
    "code": pickle.dumps(print),
    "more than it lists": b"\x80\x04" + b"]" * (1 << 20) + b".",
    "something else": pickle.dumps({"state_dict_metadata": {}}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_tables_of_contents(run, bomb):
    step = resolve(run)
    (step / ".metadata").write_bytes(BOMBS[bomb])
    (step / "manifest.json").unlink()
    for work in (lambda: contents.read(step), lambda: inspect(run), lambda: export(run)):
        refused(work, ".metadata")


def change_entry(metadata, what: str) -> None:
    key, entry = next(iter(metadata.state_dict_metadata.items()))
    place = next(value for index, value in metadata.storage_data.items() if index.fqn == key)
    if what == "a file elsewhere":
        object.__setattr__(place, "relative_path", "../../recipe.yaml")
    elif what == "beyond the file":
        object.__setattr__(place, "length", 1 << 40)
    elif what == "more values than bytes":
        entry.size = torch.Size((10**9, *entry.size[1:]))
        object.__setattr__(entry.chunks[0], "sizes", entry.size)
    elif what == "a part is missing":
        entry.chunks.clear()
    elif what == "text for a number":
        object.__setattr__(place, "offset", "0")


@pytest.mark.parametrize(
    "what", ["a file elsewhere", "beyond the file", "more values than bytes", "a part is missing", "text for a number"]
)
def test_places(run, what):
    step = resolve(run)
    metadata = contents.read(step)
    change_entry(metadata, what)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(lambda: contents.read(step), "cut short" if what == "beyond the file" else ".metadata")


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_what_is_no_file(bases, tmp_path, kind):
    def put(file: Path) -> None:
        file.unlink()
        if kind == "fifo":
            os.mkfifo(file)
        elif kind == "zero":
            file.symlink_to("/dev/zero")
        else:
            file.mkdir()

    for name in ("config.json", published.INDEX, "model-00002-of-00002.safetensors"):
        hf = Path(shutil.copytree(bases["hf"], tmp_path / f"hf{name}"))
        put(hf / name)
        for work in (
            lambda hf=hf: from_hf.make_plan(hf, None, [], None, None, "x"),
            lambda hf=hf: verify(open_weights(hf), open_weights(hf), 1, quiet),
        ):
            refused(work, name)
    names = (".metadata", "common.pt", "manifest.json", "__0_0.distcp", "hf/tensors.json", "hf/kept.safetensors")
    for name in names:
        run = Path(shutil.copytree(bases["run"], tmp_path / f"run{Path(name).name}"))
        put((run if "/" in name else resolve(run)) / name)
        refused(lambda run=run: export(run), str(run))


@pytest.mark.parametrize("name", ["config.json", published.INDEX])
def test_what_is_read_whole_has_a_bound(hf, name):
    os.truncate(hf / name, 8 << 30)
    refused(lambda: inspect(hf), name, "more than")


WRONG = {
    "position": ({"position": 1}, "position"),
    "step": ({"position": {"step": -1, "consumed_samples": 0, "consumed_tokens": 0}}, "position.step"),
    "tokens": ({"position": {"step": 1, "consumed_samples": 0.5, "consumed_tokens": 0}}, "position.consumed_samples"),
    "nothing": ({}, "position"),
    "losses": ({"guarded": {"losses": "abc"}}, "guarded.losses"),
    "skipped": ({"guarded": {"skipped": [1]}}, "guarded.skipped"),
    "topology": ({"topology": [1]}, "topology"),
    "tokenizer": ({"tokenizer": 5}, "tokenizer"),
    "data": ({"data": {"x": 1}}, "data.x"),
    "a list": ([1], "it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_small_state(run, case):
    step, (changed, key) = resolve(run), WRONG[case]
    small = {**common.read(step), **changed} if isinstance(changed, dict) and changed else changed
    torch.save(small, step / "common.pt")
    refused(lambda: common.read(step), "common.pt", key)


def test_small_state_that_is_packed(run):
    """1 GiB of zeros in 1 MB."""
    import zipfile

    step = resolve(run)
    with zipfile.ZipFile(step / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(OrderedDict()))
        archive.writestr("archive/data/0", bytes(1 << 26))
    refused(lambda: common.read(step), "common.pt", "compressed")


def test_settings_of_optimizers(tmp_path):
    own = {0: {"param_groups": [{"lr": 0.1, "step": 2}, {"lr": 0.1}]}}
    common.refuse_unlike(tmp_path, {0: {"param_groups": [{"lr": 0, "step": 7, "more": 1}, {}]}}, own)
    for saved, key in (
        ({0: {"param_groups": [{}]}}, "optimizer.0.param_groups"),
        ({0: {"param_groups": [{"step": -1}, {}]}}, "optimizer.0.param_groups.0.step"),
        ({0: {"param_groups": [{"lr": float("nan")}, {}]}}, "optimizer.0.param_groups.0.lr"),
        ([], "optimizer"),
    ):
        refused(lambda saved=saved: common.refuse_unlike(tmp_path, saved, own), "common.pt", key)


def test_more_experts_than_the_files_can_hold(hf, run):
    settings(hf, n_routed_experts=10**9)
    for work in (
        lambda: inspect(hf),
        lambda: from_hf.make_plan(hf, None, [], None, None, "x"),
        lambda: open_weights(hf),
    ):
        refused(work, "config.json", "n_routed_experts")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("n_routed_experts: 4", "n_routed_experts: 1000000000"))
    for work in (lambda: inspect(run), lambda: export(run)):
        refused(work, "n_routed_experts")


def test_numbers_of_tensors():
    """Without going through them, as many."""
    from dsv3_train.checkpoint.hf.names import number, weights
    from dsv3_train.recipe.load import load

    for recipe in ("dsv3_tiny", "dsv3_16b"):
        model = load(recipe).model
        for changed in (model, model.model_copy(update={"first_k_dense_replace": model.num_hidden_layers})):
            for mtp in (0, 2):
                assert number(changed, mtp) == len(weights(changed, mtp))


def test_names_of_layers(hf):
    contents_ = read(hf)
    contents_["model.layers." + "9" * 5000 + ".x"] = "F32", (1,), bytes(4)
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    write(hf / "model.safetensors", contents_)
    assert len(inspect(hf)["surplus"]) == 1


HEADERS = {
    "surrogate": '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "true": '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "twice": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "U8", "shape": [4], '
    '"data_offsets": [0, 4]}}',
    "metadata": '{"__metadata__": {"a": 1}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "NaN": '{"__metadata__": {"a": NaN}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "deep": '{"a":' + "[" * 100_000,
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path, case):
    text = HEADERS[case].encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    refused(lambda: read_header(tmp_path / "x.safetensors"), "x.safetensors", "header")


def test_tensors_without_values_may_stand_anywhere(tmp_path):
    """Where the one before ends and the next one begins: the format has no order among them."""
    text = (
        b'{"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    )
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert set(read_header(tmp_path / "x.safetensors")) == {"a", "b"}


@pytest.mark.parametrize("case", ["shape", "scales", "no scales", "type", "scalar"])
def test_verify_of_unlike_shapes(hf, bases, case):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = read(hf)
    kind, shape, data = tensors[name]
    tensors |= {
        "shape": {name: (kind, (len(data),), data)},
        "scales": {f"{name}_scale_inv": ("F32", (2, 2), bytes(16))},
        "no scales": {},
        "type": {name: ("I8", shape, data)},
        "scalar": {"model.norm.weight": ("F32", (), bytes(4))},
    }[case]
    if case == "no scales":
        del tensors[f"{name}_scale_inv"]
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    write(hf / "model.safetensors", tensors)
    for pair in ((hf, bases["hf"]), (bases["hf"], hf), (hf, hf)):
        refused(lambda pair=pair: verify(*map(open_weights, pair), 1, quiet), "model.safetensors")


def test_names_cannot_command_a_terminal(hf, capsys):
    import typer

    from dsv3_cli import convert

    tensors = read(hf)
    tensors["\x1b[2J\x07evil\nproblems: 0"] = "F32", (1,), bytes(4)
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    write(hf / "model.safetensors", tensors)
    with pytest.raises(typer.Exit) if inspect(hf)["problems"] else pytest.MonkeyPatch.context():
        convert.inspect(str(hf), True, False)
    said = capsys.readouterr().out
    assert "\\x1b[2J\\x07evil\\nproblems" in said
    assert "\x1b" not in said


def test_a_folder_of_somebody_else_beside_a_run_stays(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("years of work")

    def renew() -> None:
        with origin.anew(tmp_path):
            pass

    refused(renew, "hf: is in the way")
    begun = tmp_path / "other" / "checkpoints" / "step_00000001"
    begun.mkdir(parents=True)
    refused(lambda: origin.carry(begun, tmp_path), "hf: is in the way")
    assert (tmp_path / "hf" / "thesis.txt").exists()


def test_only_names_of_checkpoints_are_swept(tmp_path):
    for name in ("step_notes.unfinished", "step_1.replaced", "step_00000002.unfinished"):
        (tmp_path / name).mkdir()
    directory.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1.replaced", "step_notes.unfinished"]


@pytest.fixture
def on_disk(monkeypatch) -> list[tuple[str, str]]:
    """What is put on the disk itself, and renamed, in turn."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    for name, plain in (("rename", rename), ("replace", replace)):
        monkeypatch.setattr(
            os, name, lambda one, other, plain=plain: (done.append(("name", str(other))), plain(one, other))
        )
    return done


def test_a_file_is_on_the_disk_before_its_name(tmp_path, on_disk):
    whole.write(tmp_path / "x", "words")
    assert on_disk == [("sync", f"{tmp_path}/x.unfinished"), ("name", f"{tmp_path}/x"), ("sync", str(tmp_path))]


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_conversion_is_on_the_disk_before_its_name(bases, tmp_path, on_disk, way):
    target = tmp_path / "target"
    if way == "in":
        there(bases["hf"], target)
    else:
        to_hf.convert(to_hf.make_plan(resolve(bases["run"]), None, None), target, 1, quiet)
    at = on_disk.index(("name", str(target)))
    before = {path for what, path in on_disk[:at] if what == "sync"}
    for path in (target, *target.rglob("*")):
        assert str(path).replace(str(target), f"{target}.unfinished", 1) in before
    assert ("sync", str(tmp_path)) in on_disk[at:]


def test_a_checkpoint_is_on_the_disk_before_its_name(tmp_path, on_disk):
    unfinished, final = tmp_path / "step_00000001.unfinished", tmp_path / "step_00000001"
    for folder in (unfinished, final):
        folder.mkdir()
    directory.finish(unfinished, final)
    at = on_disk.index(("name", str(final)))
    assert ("sync", str(unfinished)) in on_disk[:at]
    assert ("sync", str(tmp_path)) in on_disk[at:]


def test_converted_checkpoints_have_checksums(run):
    assert checksums.fault(resolve(run), demanded=True) is None
    names = {path.name for path in resolve(run).iterdir()}
    assert set(checksums.read(resolve(run)) or {}) == names - {"manifest.json"}
