"""Reading recipes: values, bases, overrides, variables, and writing them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dsv3_train.errors import UserError
from dsv3_train.recipe.compose import shipped
from dsv3_train.recipe.load import diff, dump, load, schema
from dsv3_train.recipe.quantity import Steps
from dsv3_train.recipe.schema import NO_FP8, Precision

TINY = Path(__file__).parent / "recipes" / "tiny.yaml"


@pytest.fixture
def write(tmp_path):
    """Write a recipe file built on the tiny one; its path as `load` takes it."""

    def to(text: str, name: str = "mine.yaml", base: str | Path = TINY) -> str:
        (tmp_path / name).write_text(f"base: {base}\n{text}", encoding="utf-8")
        return str(tmp_path / name)

    return to


def tiny(*overrides: str):
    return load(str(TINY), overrides)


def fault(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        tiny(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", list(shipped()))
def test_every_shipped_recipe_is_valid_and_named_like_its_file(name):
    recipe = load(name)
    assert recipe.name == name
    assert recipe.description


def test_there_is_a_recipe_for_every_scale():
    assert {
        "smoke",
        "smoke_parallel",
        "dsv3_tiny",
        "dsv3_100m",
        "dsv3_16b",
        "dsv3_671b_2048xh800",
        "dsv3_671b_8xh200",
    } <= set(shipped())


@pytest.mark.parametrize("name", [*shipped(), str(TINY)])
def test_the_resolved_recipe_loads_as_an_equal_one(name, tmp_path):
    recipe = load(name)
    (tmp_path / "resolved.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(str(tmp_path / "resolved.yaml")) == recipe


@pytest.mark.parametrize("text", ["1e-4", "yes", "null", "${env:HOME}", "$${x}", "a: b # c", "12", "0x1f", "é\n", "-"])
def test_any_text_survives_writing_and_reading(text, tmp_path):
    recipe = tiny().model_copy(update={"description": text})
    (tmp_path / "resolved.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(str(tmp_path / "resolved.yaml")).description == text


def test_a_dumped_piece_has_only_its_own_keys():
    schedule = yaml.safe_load(dump(tiny()))["schedule"]
    assert schedule["lr"] == [{"linear": [0, 0.001], "until": "10 steps"}, {"constant": 0.001}]
    assert schedule["batch_size"] == 8


# --- scalars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "+1e-4"])
def test_numbers_that_yaml_1_1_takes_for_text(written):
    assert tiny(f"schedule.lr={written}").schedule.lr[0].constant == 1e-4


@pytest.mark.parametrize("written", ["on", "off", "yes", "no", "2001-01-01", "1:30", "014x"])
def test_words_that_yaml_1_1_takes_for_something_else(write, written):
    assert load(write(f"description: {written}\n")).description == written


def test_leading_zeros_are_not_octal():
    assert tiny("training.seed=010").training.seed == 10


def test_quantities():
    assert tiny("training.duration=14.8T").training.duration == 14_800_000_000_000
    steps = tiny("training.duration=40 steps").training.duration
    assert steps == 40
    assert isinstance(steps, Steps)


# --- base ------------------------------------------------------------------------------------------------------


def test_sections_merge_and_lists_and_schedules_are_replaced(write):
    middle = write("training: {recompute: [mlp, moe]}\noptim: {eps: 1e-6}\n", "middle.yaml")
    recipe = load(write("training: {recompute: [moe_act]}\nschedule: {lr: 0.5}\n", base=Path(middle).name))
    assert recipe.training.recompute == ["moe_act"]
    assert [piece.constant for piece in recipe.schedule.lr] == [0.5]
    assert recipe.training.sequence_length == 32  # two levels down
    assert recipe.optim.eps == 1e-6


def test_a_base_by_name(write):
    recipe = load(write("training: {seed: 99}\n", base="smoke"))
    assert recipe.model == load("smoke").model
    assert recipe.training.seed == 99


def test_null_removes_an_optional_section_of_the_base(write):
    middle = write("model: {rope_scaling: {factor: 40}}\n", "middle.yaml")
    assert load(middle).model.rope_scaling.factor == 40
    assert load(write("model: {rope_scaling: null}\n", base=middle)).model.rope_scaling is None


def test_the_name_is_the_files_own(write):
    # Two recipes of one name would share a run directory.
    assert load(write("", "other.yaml")).name == "other"


def test_a_fault_of_the_base_names_the_bases_line(write, tmp_path):
    middle = write("optim:\n  eps: small\n", "middle.yaml")
    with pytest.raises(UserError, match=r"middle\.yaml:3: optim\.eps: must be a number") as caught:
        load(write("training: {seed: x}\n", base=middle))
    assert "mine.yaml:2: training.seed: must be an integer" in str(caught.value)


# --- variables -------------------------------------------------------------------------------------------------


def test_variables(write, monkeypatch):
    monkeypatch.setenv("DSV3_TEST_DIR", "/data/2024")
    monkeypatch.delenv("DSV3_TEST_NOT", raising=False)
    recipe = load(
        write(
            "runtime: {run_dir: '${env:DSV3_TEST_DIR}/runs'}\n"
            "data:\n  train:\n    - path: ${env:DSV3_TEST_NOT:data/pretrain}\n"
            "description: $${env:DSV3_TEST_DIR}\n"
        )
    )
    assert recipe.runtime.run_dir == "/data/2024/runs"
    assert recipe.data.train[0].path == "data/pretrain"
    assert recipe.description == "${env:DSV3_TEST_DIR}"


def test_a_variable_has_the_type_that_the_key_wants(write, monkeypatch):
    monkeypatch.setenv("DSV3_TEST_N", "3")
    recipe = load(write("training:\n  seed: ${env:DSV3_TEST_N}\ndescription: ${env:DSV3_TEST_N}\n"))
    assert recipe.training.seed == 3
    assert recipe.description == "3"


# --- overrides -------------------------------------------------------------------------------------------------


def test_overrides_reach_everything():
    recipe = tiny(
        "name=2024",
        "data.train.0.path=a",
        "data.train.1={path: b, weight: 2}",
        "data.train.0.weight=0.5",
        "model.rope_scaling.factor=40",
        "schedule.lr=[{linear: [0, 1], until: 5 steps}, {constant: 1}]",
        "schedule.lr.1.constant=2",
        "training.recompute=[moe_act]",
        "optim.ema_decay=0.9",
        "optim.ema_decay=null",
        "checkpoint.load=1e-4",
    )
    assert recipe.name == "2024"
    assert [(data.path, data.weight) for data in recipe.data.train] == [("a", 0.5), ("b", 2.0)]
    assert recipe.model.rope_scaling.factor == 40
    assert recipe.schedule.lr[0].linear == (0, 1)
    assert recipe.schedule.lr[1].constant == 2
    assert recipe.training.recompute == ["moe_act"]
    assert recipe.optim.ema_decay is None
    assert recipe.checkpoint.load == "1e-4"


def test_an_override_replaces_a_whole_section():
    four = ("parallel={world_size: 4, pipeline: 2}", "pipeline.layout=Ettt|tmL")
    assert tiny(*four).parallel.pipeline == 2
    assert tiny(*four, "parallel={}", "pipeline={}").parallel.pipeline == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.sequence_lenght=3", "training.sequence_lenght: unknown key; did you mean 'sequence_length'?"),
        ("modle.hidden_size=3", "modle: unknown key; did you mean 'model'?"),
        ("hidden_size=4", "hidden_size: unknown key here; it belongs at model.hidden_size"),
        ("training.bogus=4", "training.bogus: unknown key; valid here: duration, sequence_length, "),
        ("training.duration.x=3", "training.duration: a single value"),
        ("data.train.1.path=x", "data.train is a list of 0 entries; write 0 to add an entry"),
        ("training.seed=abc", 'training.seed: must be an integer, got "abc"'),
        ('training.seed="3"', 'training.seed: must be an integer, got "3"; remove the quotes'),
        ("training.seed=3.0", "training.seed: must be an integer, got 3.0"),
        ("training.seed=true", "training.seed: must be an integer, got true"),
        ("parallel.zero1=yes", 'parallel.zero1: must be true or false, got "yes"; write true'),
        ("optim.eps=0", "optim.eps: must be at least 1e-30, got 0"),
        ("precision.params=bf61", "did you mean 'bf16'?"),
        ("schedule.lr=.nan", "schedule.lr: must be a number or a list of pieces"),
        ("schedule.lr=1e999", "schedule.lr: must be a number or a list of pieces"),
        ("training.duration=40 stepz", "training.duration: '40 stepz' is no extent"),
        ("training.duration=[", "training.duration: not valid YAML"),
        ("training.duration", "write it as key=value"),
        ("base=smoke", "base: a recipe's base stands in its file"),
        ("description=${env:DSV3_TEST_NOT}", "description: the environment variable DSV3_TEST_NOT is not set"),
    ],
)
def test_a_wrong_override_says_so_in_one_line(override, message):
    lines = fault(override).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"override '{override}': ")
    assert message in lines[0]


def test_all_faults_come_together(write):
    path = write("optim: {eps: small}\nmodle: {}\n")
    with pytest.raises(UserError) as caught:
        load(path, ["training.seed=x"])
    keys = [line.removeprefix(f"{path}:").split(": ")[1] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["modle", "optim.eps", "training.seed"]


# --- diff and schema -------------------------------------------------------------------------------------------


def test_diff_lists_what_differs_and_nothing_else():
    changed = tiny("training.seed=5", "schedule.lr=0.5", "model.rope_scaling.factor=2.0")
    found = {key: (a, b) for key, a, b in diff(tiny(), changed)}
    assert found.pop("training.seed") == (1234, 5)
    assert found.pop("schedule.lr")[1] == 0.5
    assert found.pop("model.rope_scaling.factor") == (None, 2.0)
    assert all(key.startswith("model.rope_scaling") for key in found)
    assert diff(tiny(), tiny()) == []


def test_the_schema_describes_every_key_and_lets_a_number_be_a_schedule():
    described = json.loads(json.dumps(schema()))
    assert set(described["properties"]) == {"base", *type(tiny()).model_fields}
    sections = described["$defs"]
    assert sections["Training"]["additionalProperties"] is False
    assert "required" not in sections["Model"]  # a base may give the rest
    assert {"type": "number"} in sections["Schedule"]["properties"]["lr"]["anyOf"]
    assert "Tokens per sequence." in sections["Training"]["properties"]["sequence_length"]["description"]


def test_no_fp8_is_all_of_it():
    """Whatever the recipe keeps, sends or multiplies in few bits, also where recomputation is off."""
    plain = load("dsv3_671b_2048xh800", [*NO_FP8, "training.recompute=[]", "data.train=[{path: unused}]"]).precision
    default = Precision()
    differ = {name for name in Precision.model_fields if getattr(plain, name) != getattr(default, name)}
    assert differ == set()
