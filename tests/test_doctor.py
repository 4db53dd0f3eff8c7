"""`dsv3 doctor`: it sees what is there, and says what a recipe lacks on machines that are not this one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load
from dsv3_train.runtime import environment
from dsv3_train.runtime.environment import Gpu, Part, Probe
from dsv3_train.runtime.gpu_environment import refuse_other_scales
from dsv3_train.runtime.lacks import lacks

GIB = 2**30
YES = Part(True, "")
GPU_NODE = Probe(
    versions={},
    gpus=[Gpu("NVIDIA H200", 139.0, 138.0, "9.0")] * 8,
    parts=dict.fromkeys(("transformer-engine", "fp8-blockwise", "deepep", "apex", "grouped-gemm"), YES),
    cores=128,
    memory_gib=1024.0,
    free_memory_gib=1000.0,
    launcher={},
)
LAPTOP = replace(
    GPU_NODE, gpus=[], parts={name: Part(False, "not installed") for name in GPU_NODE.parts}, cores=4, free_memory_gib=8
)
STEP = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-255]"}


def without(machine: Probe, *parts: str) -> Probe:
    return replace(machine, parts=machine.parts | {name: Part(False, f"no {name}") for name in parts})


def told(machine: Probe, ref: str, *overrides: str, gib: float = 1.0) -> list[tuple[str, str]]:
    return lacks(load(ref, overrides), machine, int(gib * GIB))


@pytest.fixture
def dsv3(monkeypatch):
    """`dsv3 doctor` on a machine of the test's choosing."""

    def doctor(machine: Probe, *arguments: str):
        monkeypatch.setattr("dsv3_train.runtime.environment.probe", lambda: machine)
        return CliRunner().invoke(main.app, ["doctor", *arguments], catch_exceptions=False)

    return doctor


FP8 = "precision={fp8: blockwise, params: bf16}"


@pytest.mark.parametrize(
    ("machine", "overrides", "gib"),
    [
        (GPU_NODE, ["runtime.device=cuda"], 60.0),
        (
            GPU_NODE,
            [FP8, "parallel.dispatcher=deepep", "runtime.device=cuda"],
            1.0,
        ),
        (without(GPU_NODE, "fp8-blockwise", "deepep", "apex", "grouped-gemm"), ["runtime.device=cuda"], 1.0),
        (LAPTOP, ["runtime.device=cpu"], 1.0),
        (replace(GPU_NODE, launcher={"RANK": "0", "WORLD_SIZE": "1"}), ["runtime.device=cuda"], 1.0),
        (replace(GPU_NODE, launcher={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}), ["runtime.device=cuda"], 1.0),
    ],
)
def test_nothing_lacks(machine, overrides, gib):
    assert told(machine, "smoke", *overrides, gib=gib) == []


@pytest.mark.parametrize(
    ("machine", "overrides", "gib", "severity", "text"),
    [
        (LAPTOP, ["runtime.device=cuda"], 1, "error", "no GPU that torch can use"),
        (LAPTOP, ["runtime.device=auto"], 1, "warning", "would use the CPU"),
        (LAPTOP, ["runtime.device=auto", FP8], 1, "error", "precision.fp8"),
        (LAPTOP, ["runtime.device=auto", "parallel.dispatcher=deepep"], 1, "error", "parallel.dispatcher"),
        (LAPTOP, [], 9, "error", "9.0 GiB, and 8.0 are free"),
        (LAPTOP, ["parallel.world_size=8", "schedule.batch_size=32"], 0.1, "warning", "8 processes share 4 cores"),
        (GPU_NODE, [], 1, "error", "CUDA_VISIBLE_DEVICES="),
        (without(GPU_NODE, "transformer-engine"), ["runtime.device=cuda"], 1, "error", "no transformer-engine"),
        (GPU_NODE, ["runtime.device=cuda", FP8, "precision.fp8=mxfp8"], 1, "error", "mxfp8 needs Blackwell"),
        (
            without(GPU_NODE, "fp8-blockwise"),
            ["runtime.device=cuda", FP8],
            1,
            "error",
            "no fp8-blockwise",
        ),
        (
            without(GPU_NODE, "deepep"),
            ["runtime.device=cuda", "parallel.dispatcher=deepep"],
            1,
            "error",
            "no deepep",
        ),
        (GPU_NODE, ["runtime.device=cuda"], 140, "error", "140.0 GiB per process, of 139.0"),
        (GPU_NODE, ["runtime.device=cuda"], 138.5, "error", "only 138.0 of 139.0 are free"),
        (GPU_NODE, ["runtime.device=cuda"], 100, "warning", "little is left for activations"),
        (
            replace(GPU_NODE, launcher=STEP | {"SLURM_NTASKS": "16"}),
            ["runtime.device=cuda"],
            1,
            "error",
            "16 processes",
        ),
        (replace(GPU_NODE, launcher=STEP), ["runtime.device=cuda"], 1, "error", "SLURM_STEP_NUM_TASKS: not set"),
    ],
)
def test_what_lacks(machine, overrides, gib, severity, text):
    [(found_severity, found_text)] = [lack for lack in told(machine, "smoke", *overrides, gib=gib) if text in lack[1]]
    assert found_severity == severity, found_text


def test_a_cluster_recipe_wants_one_machines_share_under_a_launcher():
    alone = told(GPU_NODE, "dsv3_671b_2048xh800")
    assert alone == [
        ("error", "parallel.world_size: 2048 GPUs, and 8 here; start it on 256 machines of 8 with srun or torchrun")
    ]
    assert told(replace(GPU_NODE, launcher=STEP | {"SLURM_NTASKS": "2048"}), "dsv3_671b_2048xh800") == []


def test_exit_codes_and_json(dsv3):
    for machine, arguments, code in (
        (LAPTOP, [], 0),  # what a machine lacks by itself is no fault
        (LAPTOP, ["smoke"], 0),
        (LAPTOP, ["smoke", FP8, "runtime.device=auto"], 1),
        (GPU_NODE, ["dsv3_671b_2048xh800"], 1),
        (without(GPU_NODE, "transformer-engine"), ["smoke", "runtime.device=auto"], 1),
    ):
        assert dsv3(machine, *arguments).exit_code == code
        result = dsv3(machine, *arguments, "--json")
        assert result.exit_code == code
        report = json.loads(result.stdout)
        assert report["machine"]["cores"] == machine.cores
        if arguments:
            assert report["recipe"] == arguments[0]
            assert report["can_run"] == (code == 0)
            assert ("error" in {lack["severity"] for lack in report["lacks"]}) == (code == 1)
        else:
            assert "lacks" not in report


def test_what_training_itself_refuses_is_told(dsv3, monkeypatch):
    def refuse(recipe):
        raise UserError("pipeline.schedule: not yet\nparallel.context: not yet")

    monkeypatch.setattr("dsv3_train.recipe.ready.refuse_unready", refuse)
    result = dsv3(LAPTOP, "smoke", "--json")
    assert result.exit_code == 1
    assert [lack["text"] for lack in json.loads(result.stdout)["lacks"]] == [
        "pipeline.schedule: not yet",
        "parallel.context: not yet",
    ]


@pytest.mark.parametrize(
    ("value", "key", "agree"), [(1, True, False), (0, True, True), (0, False, False), (1, False, True)]
)
def test_the_shell_does_not_choose_the_scales_of_fp8(monkeypatch, value, key, agree):
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", str(value))
    recipe = load("dsv3_671b_8xh200", [f"precision.power_of_2_scales={str(key).lower()}"])
    expected = contextlib.nullcontext() if agree else pytest.raises(UserError, match=f"FP32_SCALES={value} in the env")
    with expected:
        refuse_other_scales(recipe)
    refuse_other_scales(load("dsv3_tiny"))  # without FP8


def test_the_table_shows_all_that_was_found(dsv3):
    missing = replace(
        GPU_NODE,
        versions={"torch": "2.13.0", "nccl": None},
        parts=GPU_NODE.parts | {"transformer-engine": Part(False, "pip install 'dsv3-train[gpu]'")},
        launcher={"RANK": "3"},
    )
    shown = dsv3(missing).stdout
    for text in ("2.13.0", "NVIDIA H200", "dsv3-train[gpu]", "RANK=3", "128", "GPU 7"):
        assert text in shown


def test_an_unknown_recipe_is_a_fault_of_the_input(dsv3):
    with pytest.raises(UserError, match="no shipped recipe"):
        dsv3(LAPTOP, "nope")


def test_gpus_are_read_in_gib(monkeypatch):
    import torch

    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    for name, value in (
        ("is_available", True),
        ("device_count", 2),
        ("get_device_properties", properties),
        ("mem_get_info", (100 * GIB, 139 * GIB)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *index, value=value: value)
    assert environment.gpus() == [Gpu("NVIDIA H200", memory_gib=139.0, free_gib=100.0, capability="9.0")] * 2


@pytest.mark.parametrize(
    "kernel_module",
    ["NVIDIA UNIX x86_64 Kernel Module", "NVIDIA UNIX Open Kernel Module for x86_64"],
)
def test_driver_version(tmp_path, kernel_module):
    told = tmp_path / "version"
    told.write_text(f"NVRM version: {kernel_module}  570.124.06  Release Build\nGCC version:  gcc version 12.3.0\n")
    assert environment._driver(told) == "570.124.06"
    assert environment._driver(tmp_path / "missing") is None


def test_packages_that_are_broken_or_another_project(tmp_path):
    """The real look at this machine: what is on the path but does not work is told with its reason."""
    for name, code in (
        ("apex", ""),  # as PyPI's apex: a package of that name without NVIDIA's optimizers
        ("transformer_engine", "raise OSError('libcublas.so.13: cannot open shared object file')"),
        ("deep_ep", "print('loading kernels'); __version__ = '1.2'"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_cli.main", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    machine = json.loads(done.stdout)["machine"]
    assert machine["versions"]["megatron-core"] == version("megatron-core")
    assert machine["cores"] >= 1
    assert 0 < machine["free_memory_gib"] <= machine["memory_gib"]
    parts = machine["parts"]
    assert parts["apex"]["works"] is False
    assert "another project" in parts["apex"]["note"]
    assert "github.com/NVIDIA/apex" in parts["apex"]["note"]
    assert "libcublas.so.13" in parts["transformer-engine"]["note"]
    assert parts["fp8-blockwise"]["works"] is False
    assert parts["deepep"] == {"works": True, "note": "1.2"}
