"""The run directory: what it records, and what may change between the runs that share it."""

from __future__ import annotations

import json
import os
from importlib.metadata import version

import pytest
import yaml

from dsv3_train.checkpoint import directory
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import dump, load
from dsv3_train.training import rundir
from dsv3_train.training.rundir import open_run_dir


def test_a_refused_command_leaves_nothing(tmp_path):
    """The directory that it made, with what is in it; but nothing that was trained, or was there before."""
    new = tmp_path / "runs" / "deep" / "one"
    for trained in (False, True):
        made = rundir.missing(new)
        rundir.hold(new)
        (new / "cache").mkdir()
        (new / "metrics.jsonl").write_text("{}\n" if trained else "")
        rundir.undo(made)
        assert (tmp_path / "runs").exists() == trained
    rundir.undo(rundir.missing(new))
    assert (new / "metrics.jsonl").is_file()
    rundir._let_go()


def open_with(run_dir, *overrides: str) -> list[str]:
    recipe = load("smoke", overrides)
    return open_run_dir(run_dir, recipe, dump(recipe), {"world_size": 1})


def snapshot(run_dir) -> dict[str, str]:
    return {path.name: path.read_text() for path in run_dir.iterdir()}


def test_a_new_directory_holds_recipe_environment_and_topology(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_MAX_CTAS", "20")
    run_dir = tmp_path / "runs" / "new"
    assert open_with(run_dir) == []
    files = ["environment.json", "lock", "recipe.yaml", "topology.json"]
    assert sorted(path.name for path in run_dir.iterdir()) == files
    assert load(str(run_dir / "recipe.yaml")) == load("smoke")
    assert json.loads((run_dir / "topology.json").read_text()) == {"world_size": 1}
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["versions"]["megatron-core"] == version("megatron-core")
    assert environment["versions"]["torch"]
    assert environment["versions"]["python"].startswith("3.")
    assert all(environment[key] for key in ("host", "cpu", "command"))
    assert environment["variables"]["NCCL_MAX_CTAS"] == "20"
    assert "causal" in environment["speed_convention"]


def test_the_same_recipe_again_changes_nothing(tmp_path):
    open_with(tmp_path)
    before = (tmp_path / "recipe.yaml").read_text()
    assert open_with(tmp_path) == []
    assert (tmp_path / "recipe.yaml").read_text() == before
    assert not list(tmp_path.glob("recipe-before-*"))


def test_another_model_is_refused_and_nothing_is_written(tmp_path):
    open_with(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as refused:
        open_with(tmp_path, "model.hidden_size=256", "model.kv_lora_rank=64", "training.seed=7")
    assert snapshot(tmp_path) == before
    message = str(refused.value)
    assert str(tmp_path / "recipe.yaml") in message
    assert "(model.hidden_size, model.kv_lora_rank)" in message
    assert "runtime.run_dir" in message


def test_other_changes_are_told_and_the_recipe_before_is_kept(tmp_path):
    open_with(tmp_path)
    done = tmp_path / "checkpoints" / "step_00000200"
    done.mkdir(parents=True)
    (done / "metadata.json").touch()
    notes = open_with(tmp_path, "training.duration=500 steps", "training.micro_batch_size=2")
    assert sorted(notes) == [
        "recipe changed: training.duration was 400 steps, is 500 steps",
        "recipe changed: training.micro_batch_size was 4, is 2",
    ]
    kept = tmp_path / "recipe-before-step_00000200.yaml"
    assert load(str(kept)) == load("smoke")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["training"]["micro_batch_size"] == 2

    # A third recipe from the same checkpoint: the first is still the one that led there.
    open_with(tmp_path, "training.seed=9")
    assert load(str(kept)) == load("smoke")
    assert load(str(tmp_path / "recipe.yaml")).training.seed == 9


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"runtime\.run_dir: .*taken cannot be written"):
        open_with(tmp_path / "taken")


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    open_with(tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text())["commit"] is None


def test_what_was_cut_short_is_swept(tmp_path):
    """A save or a deletion under a KILL: no later save could ever need its space."""
    for name in ("step_00000010", "step_00000015.unfinished", "step_00000020", "step_00000020.damaged"):
        (tmp_path / name).mkdir()
    for step in (10, 20):
        (directory.step_path(tmp_path, step) / "metadata.json").touch()
    directory.prune(tmp_path, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000020.damaged"]


def test_of_damaged_checkpoints_the_newest_two_stay(tmp_path):
    """A disk that damages one after the other is not filled by what was set aside."""
    for step in (10, 30, 20, 40):
        path = directory.step_path(tmp_path, step)
        path.mkdir()
        directory.set_aside(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000030.damaged", "step_00000040.damaged"]
