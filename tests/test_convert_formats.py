"""Formats that are not read are named as such, not by the tensors that are missed for them. One line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_train.checkpoint.hf import from_hf, inspect
from dsv3_train.errors import UserError

LINEAR = "model.layers.1.mlp.experts.3.up_proj"
INT4 = {  # Kimi-K2.5's, shortened
    "config_groups": {"group_0": {"weights": {"group_size": 32, "num_bits": 4, "type": "int"}}},
    "format": "pack-quantized",
    "quant_method": "compressed-tensors",
}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
PACKED = torch.zeros(32, 32, dtype=torch.uint8)
E4M3 = torch.zeros(32, 4).to(torch.float8_e4m3fn)

CASES = {
    # ModelOpt's file, beside a config.json that says nothing (DeepSeek-V3.1-NVFP4).
    "NVFP4, ModelOpt": ({}, {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, {}, ["NVFP4"]),
    "NVFP4, config": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, None, {}, ["config.json", "NVFP4"]),
    "NVFP4, tensors": (
        {},
        None,
        {"weight": PACKED, "weight_scale": E4M3, "weight_scale_2": torch.ones(()), "input_scale": torch.ones(())},
        [f"{LINEAR}.weight_scale_2", "NVFP4"],
    ),
    "MXFP4, config": ({"quant_method": "mxfp4"}, None, {}, ["MXFP4"]),
    "MXFP4, tensors": ({}, None, {"weight": None, "weight_blocks": PACKED, "weight_scales": PACKED.clone()}, ["MXFP4"]),
    "INT4, config": (INT4, None, {}, ["INT4 (compressed-tensors, pack-quantized)"]),
    "INT4, tensors": (
        {},
        None,
        {
            "weight": None,
            "weight_packed": torch.zeros(32, 8, dtype=torch.int32),
            "weight_scale": torch.ones(32, 2).bfloat16(),
            "weight_shape": torch.ones(2, dtype=torch.int32),
        },
        [f"{LINEAR}.weight_packed", "INT4"],
    ),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, None, {}, ["gptq (4 bits)"]),
    "FP8 by rows": (
        {},
        None,
        {"weight": torch.zeros(32, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(32, 1)},
        [f"{LINEAR}.weight_scale", "other scales than those of 128x128 blocks"],
    ),
    "FP8 by tensors": ({"quant_method": "fp8"}, None, {}, ["without weight_block_size"]),
    "E8M0 scales": (
        BLOCKS,
        None,
        {
            "weight": torch.zeros(32, 64).to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.ones(1, 1).to(torch.float8_e8m0fnu),
        },
        [f"{LINEAR}.weight_scale_inv is F8_E8M0", "E8M0 scales"],
    ),
    "E8M0 scales as bytes": (
        BLOCKS,
        None,
        {"weight_scale_inv": torch.ones(1, 1, dtype=torch.uint8)},
        [f"{LINEAR}.weight_scale_inv is U8", "E8M0 scales"],
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "hf"
    hf_models.plain(path)
    return path


def refused(source: Path, *parts: str) -> None:
    for command in (lambda: from_hf.make_plan(source, None, [], None, None, "small"), lambda: inspect.inspect(source)):
        with pytest.raises(UserError) as error:
            command()
        message = str(error.value)
        assert "\n" not in message
        assert all(part in message for part in (*parts, "not read; this reads BF16, FP32, and FP8")), message


@pytest.mark.parametrize("case", CASES)
def test_named(plain, tmp_path, case):
    quantisation, modelopt, tensors, parts = CASES[case]
    source = hf_models.copy(plain, tmp_path / "hf")
    contents = {**hf_models.tensors(source), **{f"{LINEAR}.{name}": tensor for name, tensor in tensors.items()}}
    contents = {name: tensor for name, tensor in contents.items() if tensor is not None}
    hf_models.rewrite(source, contents, **({"quantization_config": quantisation} if quantisation else {}))
    if modelopt:
        (source / "hf_quant_config.json").write_text(json.dumps(modelopt))
    refused(source, *parts)


def test_within_a_vision_language_model(plain, tmp_path):
    """Kimi-K2.5: what it is stored in, before that its model_type is another."""
    source = hf_models.copy(plain, tmp_path / "hf")
    text = json.loads((source / "config.json").read_text())
    config = {"model_type": "kimi_k25", "text_config": {**text, "model_type": "kimi_k2", "quantization_config": INT4}}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, "config.json: quantization_config: stored in INT4")


def test_a_type_of_four_bits(plain, tmp_path):
    """A header may speak of F4, half a byte a value."""
    source = hf_models.copy(plain, tmp_path / "hf")
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["x.weight"] = {"dtype": "F4", "shape": [8, 4], "data_offsets": [end, end + 16]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + bytes(16))
    refused(source, "x.weight is F4", "F4 (microscaling)")


def test_only_the_kv_cache_is_quantised(plain, tmp_path):
    """ModelOpt's file of a model whose weights are not."""
    source = hf_models.copy(plain, tmp_path / "hf")
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    from_hf.make_plan(source, None, [], None, None, "small")
    (source / "hf_quant_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"hf_quant_config\.json: not ModelOpt's"):
        from_hf.make_plan(source, None, [], None, None, "small")
