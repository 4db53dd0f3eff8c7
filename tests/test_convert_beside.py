"""What published directories hold beside a model's weights is left out, counted, and brought back; the rest is refused.

Names and shapes as in the published tables of Kimi-K2 (frequencies of RoPE, BF16 [56]), Kimi-VL and Kimi-K2.5
(language model, vision tower, projector) and GLM-5.1 (MTP without copies of embedding and head).
"""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import from_hf, inspect, to_hf, verify
from dsv3_train.errors import UserError

COPIES = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")


def quiet(*_: object) -> None:
    pass


def convert_in(source: Path, target: Path, mtp=None) -> dict:
    return from_hf.convert(from_hf.make_plan(source, None, [], mtp, None, "small"), target, 1, quiet)


def convert_out(run: Path, target: Path, dtype=None, mtp=None) -> dict:
    return to_hf.convert(to_hf.make_plan(resolve(run), dtype, mtp), target, 1, quiet)


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)] == []


def add(path: Path, shards: int = 1, **more: torch.Tensor) -> None:
    hf_models.rewrite(path, {**hf_models.tensors(path), **more}, shards)


def of_vision(path: Path, **settings: object) -> None:
    """Make a directory a part of a vision-language one, as Kimi-VL: its `text_config` has no `model_type`."""
    generator = torch.Generator().manual_seed(2)
    vision = {
        "mm_projector.pre_norm.bias": [12],
        "mm_projector.proj.0.weight": [64, 12],
        "multi_modal_projector.linear_1.weight": [64, 12],
        "vision_tower.encoder.blocks.0.wqkv.weight": [900, 300],  # of more values than the language model
        "vision_tower.patch_embed.pos_emb.weight": [4, 4, 12],
        "vision_tower.patch_embed.proj.weight": [12, 3, 14, 14],
    }
    contents = {f"language_model.{name}": tensor for name, tensor in hf_models.tensors(path).items()}
    contents |= {name: torch.randn(shape, generator=generator).half() for name, shape in vision.items()}
    text = json.loads((path / "config.json").read_text())
    del text["model_type"]
    hf_models.rewrite(path, contents, 2)
    config = {"model_type": "kimi_vl", "vision_config": {"hidden_size": 12}, "text_config": text, **settings}
    (path / "config.json").write_text(json.dumps(config, indent=2))


def test_frequencies_and_scales_of_the_cache(tmp_path):
    source = tmp_path / "hf"
    hf_models.plain(source)
    layers = [f"model.layers.{layer}.self_attn" for layer in range(2)]
    frequencies = {f"{layer}.rotary_emb.inv_freq": torch.rand(56).bfloat16() for layer in layers}
    cache = {f"{layer}.{name}": torch.tensor(0.5) for layer in layers for name in ("k_scale", "attn.v_scale")}
    add(source, 2, **frequencies, **cache)
    report = convert_in(source, tmp_path / "run")
    assert report["left_out"] == sorted([*frequencies, *cache])
    (note,) = report["notes"]
    assert "2 frequencies of RoPE (rotary_emb)" in note
    assert "4 scales of the KV cache" in note
    looked = inspect.inspect(source)
    assert looked["beside"] == {"frequencies of RoPE (rotary_emb)": 2, "scales of the KV cache": 4}
    assert (looked["surplus"], looked["missing"], looked["scales"]) == ([], [], 0)
    assert looked["values"] == inspect.inspect(tmp_path / "run")["values"]
    convert_out(tmp_path / "run", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    found = verify.verify(verify.open_weights(source), verify.open_weights(tmp_path / "run"), 1, quiet)
    assert (found["identical"], found["missing"], found["surplus"]) == (found["tensors"], [], [])


@pytest.mark.parametrize("fp8", [False, True])
def test_the_language_model_of_a_vision_language_directory(tmp_path, fp8):
    source = tmp_path / "hf"
    hf_models.plain(source)
    if fp8:
        hf_models.to_fp8(source)
    add(source, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)})
    of_vision(source)
    report = convert_in(source, tmp_path / "run")
    assert len(report["left_out"]) == 7
    assert any("6 of the vision tower and its projector" in note for note in report["notes"])
    convert_out(tmp_path / "run", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    # In another type the language model's part of config.json changes, and nothing else.
    convert_out(tmp_path / "run", tmp_path / "wide", "fp32")
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "wide"))
    assert after["text_config"].pop("torch_dtype") == "float32"
    before["text_config"].pop("torch_dtype")
    before["text_config"].pop("quantization_config", None)
    assert after == before
    one, other = verify.open_weights(source), verify.open_weights(tmp_path / "wide")
    found = verify.verify(one, other, 1, quiet)
    assert (found["max_abs_difference"], found["missing"], found["surplus"]) == (0.0, [], [])


def test_a_quantisation_beside_the_language_model(tmp_path):
    """`quantization_config` at the top, as transformers writes it, stays there; gone with FP8."""
    source = tmp_path / "hf"
    hf_models.plain(source)
    hf_models.to_fp8(source)
    text = json.loads((source / "config.json").read_text())
    quantisation = text.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(text))
    of_vision(source, quantization_config=quantisation)
    convert_in(source, tmp_path / "run")
    convert_out(tmp_path / "run", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    convert_out(tmp_path / "run", tmp_path / "wide", "bf16")
    after = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert "quantization_config" not in after
    assert "quantization_config" not in after["text_config"]


def test_a_setting_that_differs_beside_the_language_model(tmp_path):
    """Kimi-VL says `vocab_size` at the top too; as the file stands, not only its part."""
    hf_models.plain(tmp_path / "hf")
    of_vision(tmp_path / "hf", vocab_size=161)
    with pytest.raises(UserError, match=r"text_config\.vocab_size: 160 in text_config, but 161 beside it"):
        convert_in(tmp_path / "hf", tmp_path / "run")


def test_vision_without_a_language_model_is_refused(tmp_path):
    hf_models.plain(tmp_path / "hf")
    add(tmp_path / "hf", **{"vision_tower.patch_embed.proj.bias": torch.ones(3)})
    with pytest.raises(UserError, match=r"vision_tower\.patch_embed\.proj\.bias is no tensor of this model"):
        convert_in(tmp_path / "hf", tmp_path / "run")


def test_mtp_that_config_does_not_count(tmp_path):
    source = tmp_path / "hf"
    hf_models.plain(source, mtp=1)
    hf_models.rewrite(source, hf_models.tensors(source), 2, num_nextn_predict_layers=0)
    for asked in (None, "keep"):
        with pytest.raises(
            UserError, match=r"num_nextn_predict_layers: 0, .* MTP in layer 2; say --mtp drop .* or set 1"
        ):
            convert_in(source, tmp_path / "run", asked)
    report = convert_in(source, tmp_path / "run", "drop")
    assert {name.split(".")[2] for name in report["left_out"]} == {"2"}
    assert any(f"{len(report['left_out'])} of MTP that config.json does not count" in note for note in report["notes"])
    convert_out(tmp_path / "run", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    convert_out(tmp_path / "run", tmp_path / "without", mtp="drop")
    left = set(hf_models.tensors(source)) - set(hf_models.tensors(tmp_path / "without"))
    assert left == set(report["left_out"])


def test_a_layer_too_many_is_no_mtp(tmp_path):
    hf_models.plain(tmp_path / "hf")
    add(tmp_path / "hf", **{"model.layers.2.input_layernorm.weight": torch.ones(64).bfloat16()})
    with pytest.raises(UserError, match=r"layers\.2\.input_layernorm\.weight is no tensor of this model"):
        convert_in(tmp_path / "hf", tmp_path / "run", "drop")


@pytest.mark.parametrize("absent", [COPIES, COPIES[:1]])
def test_mtp_without_copies(tmp_path, absent):
    """The main model's embedding and head are MTP's too; files that say so once are whole, and come back so."""
    source = tmp_path / "hf"
    hf_models.plain(source, mtp=1)
    contents = {name: tensor for name, tensor in hf_models.tensors(source).items() if name not in absent}
    hf_models.rewrite(source, contents)
    assert inspect.inspect(source)["missing"] == []
    assert convert_in(source, tmp_path / "run")["copies"] == 2 - len(absent)
    convert_out(tmp_path / "run", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    for a, b in ((source, tmp_path / "run"), (tmp_path / "run", source)):
        found = verify.verify(verify.open_weights(a), verify.open_weights(b), 1, quiet)
        assert (found["missing"], found["surplus"], found["different"]) == ([], [], [])
    del contents["model.embed_tokens.weight"]
    hf_models.rewrite(source, contents)
    missing = inspect.inspect(source)["missing"]
    assert missing == ["model.embed_tokens.weight", COPIES[0]]
