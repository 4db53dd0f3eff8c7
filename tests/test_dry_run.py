"""The report's 2048-GPU run, worked out on a CPU, through the command."""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys

import pytest

DSV3 = [sys.executable, "-m", "dsv3_cli.main"]


MEASURED = """
import atexit, sys
from dsv3_cli.main import run
def tell():  # not ru_maxrss, in which the process that started this one counts too
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
atexit.register(tell)
run()
"""


@pytest.fixture(scope="module")
def published() -> dict:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", MEASURED, "train", "dsv3_671b_2048xh800", "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report["peak_bytes"] = int(done.stderr.splitlines()[-1]) * 1024
    return report


def test_every_parameter(published):
    """Totals of the published index, routing biases (256 in each of 58 + 1 MoE layers) included."""
    assert published["parameters"]["main"] == 671_026_419_200
    assert published["parameters"]["mtp"] == 11_610_068_224
    assert round(published["parameters"]["active"] / 1e9, 2) == 37.55
    assert sum(stage["parameters"] for stage in published["stages"]) == 671_026_419_200 + 11_610_068_224


def test_stages(published):
    layers = [stage["layers"] for stage in published["stages"]]
    assert len(layers) == 16
    assert layers[0] == "Etttt"
    assert set(layers[1:15]) == {"tttt"}
    assert layers[15] == "tmL"
    # A MoE layer is 11.507B; one rank of EP64 holds 4 of its 256 experts.
    assert {round(stage["parameters"] / 4e9, 3) for stage in published["stages"][1:15]} == {11.507}
    held = 187_107_328 + 2 * 7168 + 256 * 7168 + 256 + (4 + 1) * 3 * 7168 * 2048
    assert {stage["parameters_per_rank"] for stage in published["stages"][1:15]} == {4 * held}


def test_run(published):
    assert published["world_size"] == 2048
    assert published["total_tokens"] == 14_800_000_000_000
    assert published["total_steps"] * 15360 * 4096 > 14_800_000_000_000  # the ramp takes more, smaller steps
    first, *_, last = published["schedule"]
    assert (first["batch_size"], first["mtp_weight"], first["bias_update_speed"]) == (3072, 0.3, 0.001)
    assert (last["batch_size"], last["lr"], last["mtp_weight"], last["bias_update_speed"]) == (15360, 7.3e-6, 0.1, 0)


def test_bounds(published):
    assert published["cpu_seconds"] < 60  # of one core: what it takes where nothing else runs
    assert published["peak_bytes"] < 8e9


def test_a_run_on_a_machine_that_cannot_is_refused(tmp_path):
    """Before its 2048 processes are started."""
    done = subprocess.run([*DSV3, "train", "dsv3_671b_2048xh800"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for line, said in zip(done.stderr.splitlines(), ("precision.fp8: blockwise needs a GPU", "memory: "), strict=True):
        assert line.startswith(said)
    assert not list(tmp_path.iterdir())


def test_context_parallelism_is_refused():
    two = ["parallel.context=2", "parallel.world_size=16"]
    done = subprocess.run([*DSV3, "train", "dsv3_16b", *two, "--dry-run"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("parallel.context: context parallelism cannot run yet; set ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("recipe", ["smoke_parallel", "dsv3_16b"])
def test_other_recipes(recipe):
    done = subprocess.run([*DSV3, "train", recipe, "--dry-run", "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert sum(stage["parameters"] for stage in report["stages"]) == sum(
        report["parameters"][k] for k in ("main", "mtp")
    )
    if recipe == "dsv3_16b":
        assert round(report["parameters"]["main"] / 1e9, 1) == 15.7
        assert round(report["parameters"]["active"] / 1e9, 1) == 2.7  # 2.4B without the embedding


def test_the_command_to_run_it_can_be_pasted():
    """Brackets, spaces and bars of overrides included."""
    overrides = ["training.recompute=[full]", "training.duration=40 steps", "runtime.run_dir=runs/[/b] |x"]
    done = subprocess.run([*DSV3, "train", "smoke", "--dry-run", *overrides], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("To run it: ")]
    assert shlex.split(line.removeprefix("To run it: ")) == ["dsv3", "train", "smoke", *overrides]
