"""`dsv3 recipes`: its examples run, `--json` prints one object, and nothing heavy is imported for help."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_train.recipe.load import load, values


def dsv3(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("command", ["list", "show", "diff", "schema"])
def test_the_example_of_the_help_runs(command):
    example = re.search(r"Example: dsv3 (.*?)(?: >.*)?$", dsv3("recipes", command, "--help"), re.MULTILINE)
    assert example
    assert dsv3(*shlex.split(example[1].strip()))


def test_list_as_json():
    report = json.loads(dsv3("recipes", "list", "--json"))
    by_name = {recipe["name"]: recipe for recipe in report["recipes"]}
    assert by_name["dsv3_671b_2048xh800"]["world_size"] == 2048


def test_show_as_json_is_the_resolved_recipe():
    report = json.loads(dsv3("recipes", "show", "smoke", "training.seed=7", "--json"))
    assert report == values(load("smoke", ["training.seed=7"]))
    assert report["training"]["seed"] == 7


def test_diff_as_json():
    report = json.loads(dsv3("recipes", "diff", "smoke", "smoke_parallel", "--json"))
    found = {entry["key"]: (entry["a"], entry["b"]) for entry in report["differences"]}
    assert found["parallel.world_size"] == (1, 4)
    assert "model.hidden_size" not in found


def test_tables_show_brackets_as_they_are():
    # rich would read `[layernorm]` as markup and drop it.
    assert "layernorm" in dsv3("recipes", "diff", "smoke", "dsv3_16b")


def test_schema_is_one_object():
    assert json.loads(dsv3("recipes", "schema"))["additionalProperties"] is False


def test_help_imports_neither_yaml_nor_pydantic_nor_torch():
    code = (
        "import sys; from dsv3_cli import main; print([m for m in ('yaml', 'pydantic', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_recipes_and_schedules_need_no_torch():
    code = (
        "import sys; from dsv3_train.recipe.load import load; from dsv3_train.optim.schedules import Schedules; "
        "Schedules(load('dsv3_671b_2048xh800')); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_output_to_a_full_disk_and_to_nobody():
    command = [sys.executable, "-m", "dsv3_cli.main", "recipes", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "a disk: No space left on device; make room, and start again\n")
    closed = subprocess.run(["sh", "-c", f"{' '.join(command)} >&-"], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (closed.returncode, closed.stderr) == (0, "")
