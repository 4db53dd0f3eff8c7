"""The table of names and the FP8 blocks, against what is published and against plain arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_train.checkpoint.hf import config, fp8, from_hf, names
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import build, load

TOOL = Path(__file__).parents[1] / "tools" / "synthetic_hf.py"


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
    _, scales = fp8.quantise(weight, powers_of_two=True)
    assert scales.tolist() == [[1.0], [2.0**-6]]
    codes, again = fp8.quantise(fp8.dequantise(*fp8.quantise(weight, powers_of_two=True)), powers_of_two=True)
    assert torch.equal(again, scales)
    assert float(fp8.dequantise(codes, again)[200, 127]) == 5.0


def test_config_and_recipe():
    """The published config.json gives the shipped recipe's architecture, and a model's own config.json itself."""
    sys.path.insert(0, str(TOOL.parent))
    from synthetic_hf import CONFIG

    derived = build(config.derive(CONFIG, "v3", 1, "F8_E4M3"), "config.json")
    shipped = load("dsv3_671b_2048xh800")
    changed = {"rope_scaling": derived.model.rope_scaling, "initializer_range": 0.02}
    assert derived.model == shipped.model.model_copy(update=changed)
    assert derived.model.rope_scaling.factor == 40
    again = build(config.derive(config.config_of(derived.model, 1, 4096), "v3", 1, "BF16"), "config.json")
    assert again.model == derived.model
    assert [line.split(":")[0] for line in config.contradictions(shipped, CONFIG, 1)] == ["model.rope_scaling"]
