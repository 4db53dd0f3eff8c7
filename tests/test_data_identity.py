"""Which data a run is trained on: looked at when it is met, remembered, and not changed under the run."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_cli import main
from dsv3_train.data import blocks, identity, index, manifest
from dsv3_train.data.prepare import prepare
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare, Recipe
from dsv3_train.training import data_identity, indices
from parity import tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def made(root: Path, name: str, first: int = 0) -> str:
    (root / f"{name}.jsonl").write_text(
        "".join(json.dumps({"text": f"{first + i:04d} {TEXT}"}) + "\n" for i in range(300))
    )
    settings = Prepare(inputs=[str(root / f"{name}.jsonl")], output=str(root / name), vocab_size=300)
    prepare(settings, workers=1)
    return settings.output


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("data")
    return made(root, "one"), made(root, "two", 5000)


@pytest.fixture
def data(both, tmp_path) -> str:
    copy(both[0], str(tmp_path / "data"))
    return str(tmp_path / "data")


def copy(source: str, target: str) -> None:
    for end in ("bin", "idx", "manifest.json", "tokenizer.json"):
        shutil.copyfile(f"{source}.{end}", f"{target}.{end}")


def recipe(prefix: str, run_dir: Path) -> Recipe:
    return tiny(
        model={"vocab_size": 300},
        training={"sequence_length": 32},
        data={"train": [{"path": prefix}]},
        runtime={"run_dir": str(run_dir)},
    )


def trained(run_dir: Path, step: int) -> None:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "metadata.json").touch()


def entry(kind: str, number: int, value: int):
    """One number of the index changed; kinds are lengths and offsets."""

    def damage(prefix: str) -> None:
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(34 + (4 * number if kind == "i" else 4 * 300 + 8 * number))
            file.write(struct.pack(f"<{kind}", value))

    return damage


def offsets_of_zero(prefix: str) -> None:
    for number in range(150):
        entry("q", number, 0)(prefix)


def flipped(prefix: str) -> None:
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(3_001)
        byte = file.read(1)[0]
        file.seek(3_001)
        file.write(bytes([byte ^ 1]))


def other_index(prefix: str) -> None:
    """Sound by itself: two documents of other lengths."""
    lengths = np.array(index.read(prefix).lengths)
    lengths[4] += 1
    lengths[5] -= 1
    index.write(Path(f"{prefix}.idx"), np.dtype(np.uint16), lengths)


DAMAGE = {
    "half of the offsets are 0": (offsets_of_zero, ".idx: damaged, lengths and offsets contradict"),
    "a length too long": (entry("i", 7, 5000), ".idx: damaged"),
    "a length below 0": (entry("i", 7, -5), ".idx: damaged"),
    "the least length": (entry("i", 7, -(2**31)), ".idx: damaged"),
    "the largest length": (entry("i", 7, 2**31 - 1), ".idx: damaged"),
    "an offset beyond": (entry("q", 7, 2**40), ".idx: damaged"),
    "an offset below 0": (entry("q", 7, -(2**40)), ".idx: damaged"),
    "another index": (other_index, ".idx: is not what "),
    "a bit of the tokens": (flipped, ".bin: damaged in bytes 0 to "),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_met_before_a_run(data, tmp_path, damage, message):
    indices.ready_data(recipe(data, tmp_path / "run"))
    damage(data)
    with pytest.raises(UserError) as error:
        indices.ready_data(recipe(data, tmp_path / "run"))
    assert str(error.value).startswith(f"{data}{message}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_damage_under_a_manifest_from_before(data, tmp_path):
    """It lists no blocks, and nothing but the hash of all tokens tells."""
    path = Path(f"{data}.manifest.json")
    before = json.loads(path.read_text())
    del before["blocks"]
    path.write_text(json.dumps(before))
    indices.ready_data(recipe(data, tmp_path / "run"))
    flipped(data)
    with pytest.raises(UserError, match=r"data\.bin: is not what .*manifest\.json says"):
        indices.ready_data(recipe(data, tmp_path / "run"))


def test_large_files_are_looked_at_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "SIZE", 16)
    monkeypatch.setattr(blocks, "COUNT", 5)
    content = bytes(range(256)) * 4 + b"end"
    (tmp_path / "x").write_bytes(content)
    found = list(blocks.read(tmp_path / "x"))
    assert [start for start, _ in found] == [0, 256, 512, 768, 1024]
    assert all(block == content[start : start + 16] for start, block in found)
    assert found[-1][1] == b"end"
    (tmp_path / "x").write_bytes(content[:40])
    assert b"".join(block for _, block in blocks.read(tmp_path / "x")) == content[:40]


def test_all_of_the_tokens_are_compared_on_request(data, monkeypatch, capsys):
    def show(*options: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["dsv3", "data", "show", data, *options])
        with pytest.raises(SystemExit) as stop:
            main.run()
        return stop.value.code, capsys.readouterr().err

    assert not show("--verify")[0]
    flipped(data)
    assert not show()[0]
    code, told = show("--verify")
    assert code == 2
    assert told.startswith(f"{data}.bin: is not what {data}.manifest.json says")
    os.remove(f"{data}.manifest.json")
    assert "manifest.json: missing, so --verify has nothing to compare" in show("--verify")[1]


def test_what_was_looked_at_is_not_looked_at_again(data, tmp_path, monkeypatch):
    settings = recipe(data, tmp_path / "run")
    data_identity.keep(settings, tmp_path / "run")
    monkeypatch.setattr(identity, "_met", {})
    monkeypatch.setattr(data_identity, "meet", None)
    data_identity.refuse_other(settings, tmp_path / "run")
    os.utime(f"{data}.bin")
    with pytest.raises(TypeError):
        data_identity.refuse_other(settings, tmp_path / "run")


@pytest.mark.parametrize("known", [True, False], ids=["with manifest", "without"])
def test_other_data_under_a_run(both, data, tmp_path, known):
    run_dir = tmp_path / "run"
    if not known:
        os.remove(f"{data}.manifest.json")
    assert data_identity.keep(recipe(data, run_dir), run_dir) == []
    identity_before = data_identity.of_run(recipe(data, run_dir), run_dir)
    copy(both[1], data)
    if not known:
        os.remove(f"{data}.manifest.json")
    data_identity.keep(recipe(data, run_dir), run_dir)  # nothing was trained on the first
    copy(both[0], data)
    if not known:
        os.remove(f"{data}.manifest.json")
    data_identity.keep(recipe(data, run_dir), run_dir)
    assert data_identity.of_run(recipe(data, run_dir), run_dir) == identity_before

    trained(run_dir, 20)
    assert data_identity.keep(recipe(data, run_dir), run_dir) == []
    record = (run_dir / "data.json").read_bytes()
    copy(both[1], data)
    if not known:
        os.remove(f"{data}.manifest.json")
    with pytest.raises(UserError) as error:
        indices.ready_data(recipe(data, run_dir))
    message = str(error.value)
    assert message.startswith(f"{data}: is not the data that {run_dir} was trained on up to step_00000020 (")
    assert "another blocks" in message
    assert f"remove {run_dir / 'data.json'}" in message
    assert (run_dir / "data.json").read_bytes() == record

    # As the line says; what the checkpoint says is left, and told.
    os.remove(run_dir / "data.json")
    (note,) = data_identity.keep(recipe(data, run_dir), run_dir)
    assert "records from now on which data this run is trained on" in note
    now = data_identity.of_run(recipe(data, run_dir), run_dir)
    (note,) = data_identity.unlike(Path("step"), identity_before, now)
    assert note.startswith(f"step was trained on other data than {data} is now (")
    assert data_identity.unlike(Path("step"), now, now) == [] == data_identity.unlike(Path("step"), {}, now)


def test_the_same_data_at_another_place_or_time(both, data, tmp_path):
    run_dir = tmp_path / "run"
    data_identity.keep(recipe(data, run_dir), run_dir)
    trained(run_dir, 20)
    copy(both[0], data)
    assert data_identity.keep(recipe(data, run_dir), run_dir) == []
    assert data_identity.keep(recipe(both[0], run_dir), run_dir) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', '{"x": {"identity": {}, "notes": [], "state": []}}'])
def test_a_record_that_is_damaged(data, tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=r"data\.json: not a record of a run's data: .*remove it"):
        data_identity.refuse_other(recipe(data, tmp_path), tmp_path)


def test_an_index_with_modes(data, tmp_path):
    with open(f"{data}.idx", "ab") as file:
        file.write(bytes(300))
    with pytest.raises(UserError, match=r"data\.idx: has a mode for each sequence \(a multimodal dataset\)"):
        index.read(data)


def test_documents_without_ends(tmp_path):
    """Told, with a manifest and without; where every document ends with the same token nothing is said."""
    lengths = np.full(50, 9, np.int32)
    tokens = np.random.RandomState(0).randint(0, 200, 450).astype(np.uint16)
    index.write(tmp_path / "a.idx", np.dtype(np.uint16), lengths)
    tokens.tofile(tmp_path / "a.bin")
    (note,) = data_identity.keep(recipe(str(tmp_path / "a"), tmp_path / "run"), tmp_path / "run")
    assert "of 50 documents looked at do not end with a token that they share" in note
    tokens[8::9] = 7
    tokens.tofile(tmp_path / "a.bin")
    assert data_identity.keep(recipe(str(tmp_path / "a"), tmp_path / "run"), tmp_path / "run") == []


def test_tokens_of_another_model_are_met_at_the_start(tmp_path):
    index.write(tmp_path / "a.idx", np.dtype(np.int32), np.array([200], np.int32))
    np.array([*range(199), -3], np.int32).tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="holds token -3, but"):
        indices.ready_data(recipe(str(tmp_path / "a"), tmp_path / "run"))


def test_a_manifest_without_hashes(data, tmp_path):
    path = manifest.path_of(data)
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "sha256": {}}))
    with pytest.raises(UserError, match="is not what"):
        indices.ready_data(recipe(data, tmp_path / "run"))
