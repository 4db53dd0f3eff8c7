"""The table of names and the FP8 blocks, against what is published and against plain arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.checkpoint.hf import config, config_out, fp8, from_hf, inspect, names, to_hf
from dsv3_train.data import tokenizer
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import build, dump, load

TOOL = Path(__file__).parents[1] / "tools" / "synthetic_hf.py"
sys.path.insert(0, str(TOOL.parent))

from synthetic_hf import CONFIG  # noqa: E402


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Every name of the 671B model at its true shape, by the tool's own loops; sparse files."""
    path = tmp_path_factory.mktemp("published") / "hf"
    done = subprocess.run([sys.executable, str(TOOL), str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("91,991 tensors")
    assert sum(file.stat().st_blocks * 512 for file in path.iterdir()) < 100e6
    return path


def dsv3(*arguments: str) -> dict:
    command = [sys.executable, "-m", "dsv3_cli.main", "convert", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_inspect_the_published_model(published):
    found = dsv3("inspect", str(published))
    assert (found["weights"], found["scales"], found["values"]) == (46_183, 45_808, 684_489_845_504)
    assert found["dtypes"] == {"F8_E4M3": 45_808, "F32": 45_808 + 59, "BF16": 46_183 - 45_808 - 59}
    assert (found["missing"], found["surplus"], found["problems"], found["mtp"]) == ([], [], [], 1)


def test_plan_the_published_model(published, tmp_path):
    """Every tensor accounted for; with the shipped recipe too, once it stretches RoPE as config.json does."""
    found = dsv3("from-hf", str(published), str(tmp_path / "run"), "--dry-run")
    assert (found["weights"], found["scales"], found["values"]) == (46_183, 45_808, 684_489_845_504)
    assert found["copies"] == 2  # of embedding and head
    assert list(tmp_path.iterdir()) == []
    yarn = "model.rope_scaling={factor: 40, mscale: 1.0, mscale_all_dim: 1.0}"
    plan = from_hf.make_plan(published, "dsv3_671b_2048xh800", [yarn], "keep", None, "v3").report()
    assert {**plan, "source": None} == {**found, "source": None}
    dropped = from_hf.make_plan(published, None, [], "drop", None, "v3").report()
    assert dropped["weights"] + len([name for name in dropped["left_out"] if "scale" not in name]) == 46_183
    assert dropped["values"] == 671_026_419_200


def test_a_recipe_without_the_files_rope_is_refused(published):
    with pytest.raises(UserError, match=r"^dsv3_671b_2048xh800: model\.rope_scaling: null in the recipe, .* in config"):
        from_hf.make_plan(published, "dsv3_671b_2048xh800", [], None, None, "v3")


def test_every_value_of_megatrons_tensors_has_one_place():
    """The regions of the table fill each tensor and do not overlap."""
    model = load("smoke").model
    filled: dict[str, torch.Tensor] = {}
    for weight in names.weights(model, 1):
        if weight.copy:
            continue
        whole = filled.setdefault(weight.key, torch.zeros(weight.key_shape, dtype=torch.int8))
        whole[tuple(slice(a, a + n) for a, n in zip(weight.offset, weight.extent, strict=True))] += 1
    assert all(bool((whole == 1).all()) for whole in filled.values())


@pytest.mark.parametrize("shape", [(576, 300), (128, 128), (5, 7), (1, 129)])
@pytest.mark.parametrize("seed", range(3))
def test_fp8_comes_back(shape, seed):
    """Of a quantiser's own scales, and of any scale at all: a ninth of them are not 448 x scale / 448."""
    generator = torch.Generator().manual_seed(seed)
    blocks = tuple(-(-size // 128) for size in shape)
    codes = (torch.randn(shape, generator=generator) * 100).clamp(-447, 447)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            codes[128 * i, 128 * j] = 448
    codes = codes.to(torch.float8_e4m3fn)
    scales = torch.rand(blocks, generator=generator) * 1e-3 + 1e-6
    back, again = fp8.quantise(fp8.dequantise(codes, scales))
    if codes.numel() > 1000:  # few values leave the scale open
        assert torch.equal(again, scales)
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


def test_fp8_scales():
    """amax / 448, 1 for zeros; the next power of two where the files have those."""
    weight = torch.zeros(256, 128)
    weight[128:] = torch.linspace(-3, 5, 128)
    _, scales = fp8.quantise(weight)
    assert scales.tolist() == [[1.0], [float(torch.tensor(5.0) / 448)]]
    powers = fp8.Rule(mantissa=0.5)
    _, scales = fp8.quantise(weight, powers)
    assert scales.tolist() == [[1.0], [2.0**-6]]
    codes, again = fp8.quantise(fp8.dequantise(*fp8.quantise(weight, powers)), powers)
    assert torch.equal(again, scales)
    assert float(fp8.dequantise(codes, again)[200, 127]) == 5.0


def test_config_and_recipe():
    """The published config.json gives the shipped recipe's architecture, and a model's own config.json itself."""
    derived = build(config.derive(CONFIG, "v3", 1, "F8_E4M3"), "config.json")
    shipped = load("dsv3_671b_2048xh800")
    changed = {"rope_scaling": derived.model.rope_scaling, "initializer_range": 0.02}
    assert derived.model == shipped.model.model_copy(update=changed)
    assert derived.model.rope_scaling.factor == 40
    again = build(config.derive(config_out.config_of(derived.model, 1, 4096), "v3", 1, "BF16"), "config.json")
    assert again.model == derived.model
    assert [line.split(":")[0] for line in config.contradictions(shipped, CONFIG, 1)] == ["model.rope_scaling"]


YARN = CONFIG["rope_scaling"]
MALFORMED = {
    "text for quantisation": (
        {"quantization_config": "fp8"},
        'quantization_config: must be an object or null, got "fp8"',
    ),
    "a list for quantisation": ({"quantization_config": ["fp8"]}, "quantization_config: must be an object or null"),
    "no theta": ({"rope_theta": None}, "rope_theta: must be a number, got null"),
    "text for theta": ({"rope_theta": "x"}, 'rope_theta: must be a number, got "x"'),
    "text for a factor": ({"rope_scaling": {**YARN, "factor": "abc"}}, "rope_scaling.factor: must be a number"),
    "text in rope_parameters": (
        {"rope_scaling": None, "rope_parameters": {**YARN, "beta_fast": "abc"}},
        "rope_parameters.beta_fast: must be a number",
    ),
    "a factor below 1": ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor: must be at least 1"),
    "a list for RoPE": ({"rope_scaling": [1]}, "rope_scaling: must be an object or null, got [1]"),
    "an empty list for RoPE": ({"rope_parameters": []}, "rope_parameters: must be an object or null, got []"),
    "yarn without a length": (
        {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": None},
        "rope_scaling: yarn without original_max_position_embeddings",
    ),
    "text for a length": ({"max_position_embeddings": "4096"}, "max_position_embeddings: must be an integer"),
    "text for groups": ({"n_group": "4"}, 'n_group: must be an integer, got "4"'),
    "text for a width": ({"hidden_size": "64"}, 'hidden_size: must be an integer, got "64"'),
    "no experts": ({"num_experts_per_tok": 0}, "num_experts_per_tok: must be more than 0, got 0"),
    "a list for layers": ({"num_hidden_layers": [61]}, "num_hidden_layers: must be an integer"),
    "another model's yarn": (
        {"model_type": "llama", "rope_scaling": {"type": "yarn"}},
        "model_type: 'llama' is not supported",
    ),
    "mscale 0": ({"rope_scaling": {**YARN, "mscale": 0}}, "rope_scaling: implementations differ on mscale or"),
    "both mscales 0": (
        {"rope_scaling": {**YARN, "mscale": 0, "mscale_all_dim": 0.0}},
        "rope_scaling: implementations differ on mscale or",
    ),
    "mscale_all_dim 0": (
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0}},
        "rope_scaling: implementations differ on mscale or",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_config(tmp_path, case):
    """One line, `FILE: key: fault`, from whatever reads it."""
    changes, message = MALFORMED[case]
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(UserError) as error:
        inspect.inspect(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")
    assert "\n" not in str(error.value)


def test_all_faults_of_a_config_at_once():
    changes = {"hidden_size": "64", "quantization_config": "fp8", "rope_scaling": {**YARN, "mscale": "x"}}
    with pytest.raises(UserError) as error:
        config.model({**CONFIG, **changes}, "config.json")
    keys = {line.split(": ")[1] for line in str(error.value).splitlines()}
    assert keys == {"hidden_size", "quantization_config", "rope_scaling.mscale"}


def test_yarn_without_mscale():
    """Comes in as mscale 1 with mscale_all_dim 0 and goes out as it came: transformers takes 0 for not given."""
    plain = {key: value for key, value in YARN.items() if "mscale" not in key}
    model = config.model({**CONFIG, "rope_scaling": plain}, "config.json", 0)
    assert (model.rope_scaling.mscale, model.rope_scaling.mscale_all_dim) == (1.0, 0.0)
    config_out.refuse_unwritable(model, "recipe.yaml")
    written = config_out.config_of(model, 0, 4096)
    assert written["rope_scaling"] == plain
    assert config.model(written, "config.json") == model
    changed = config_out.updated({**CONFIG, "rope_scaling": None, "rope_parameters": YARN}, model, None, "bf16")
    assert not [key for place in ("rope_scaling", "rope_parameters") for key in changed[place] if "mscale" in key]


@pytest.mark.parametrize("both", [(0.0, 0.0), (0.0, 1.0), (0.7, 0.0)])
def test_an_mscale_of_zero_is_not_exported(tmp_path, both):
    """Said before the checkpoint is looked at."""
    mscale = f"model.rope_scaling={{factor: 40, mscale: {both[0]}, mscale_all_dim: {both[1]}}}"
    (tmp_path / "recipe.yaml").write_text(dump(load("smoke", [mscale])))
    with pytest.raises(UserError, match=r"recipe\.yaml: model\.rope_scaling: implementations differ on mscale or"):
        to_hf.make_plan(tmp_path / "checkpoints" / "step_00000001", None, None)


def test_tokens_of_a_model_trained_here(tmp_path):
    """The tokenizer's end-of-document token, for all ends; none without a tokenizer that has one."""
    file, notes = tmp_path / "tokenizer.json", []
    file.write_bytes(tokenizer.train(["def f(x): return x"] * 9, 300))
    recipe = load("smoke", [f"data.tokenizer={file}"])

    def tokens() -> dict[str, int]:
        return to_hf._tokens(tokenizer_home.find(tmp_path / "run", recipe), notes)

    assert tokens() == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert notes == []
    raw = json.loads(file.read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if "eos" not in token["content"]]
    file.write_text(json.dumps(raw))
    assert tokens() == {}
    file.unlink()
    assert tokens() == {}
    assert ["config.json has no bos_token_id and eos_token_id" in note for note in notes] == [True, True]
    keys = ("bos_token_id", "eos_token_id")
    assert [config_out.config_of(recipe.model, 0, 64, 5).get(key) for key in keys] == [5, 5]
    assert not config_out.config_of(recipe.model, 0, 64).keys() & set(keys)
