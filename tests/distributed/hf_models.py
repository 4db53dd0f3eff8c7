"""Hugging Face directories for tests of conversion: small random models, whole or with MTP, in any type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 144,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
}


def reference(**changes: Any) -> Any:
    """transformers' DeepseekV3ForCausalLM with random weights, FP32; routing biases that change who is chosen."""
    import transformers

    config = transformers.DeepseekV3Config(**{**SMALL, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.05)
            if "norm" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.05)
    return model


def save(path: Path, *, dtype: torch.dtype = torch.float32, shard: str = "300KB", **changes: Any) -> Any:
    """Save a random model at `path` as transformers does, beside a tokenizer; returns the model, FP32."""
    model = reference(**changes)
    kept = model
    if dtype != torch.float32:
        kept = reference(**changes).to(dtype)
        for name, buffer in kept.named_buffers():  # transformers keeps them in FP32 when it loads
            if name.endswith("e_score_correction_bias"):
                buffer.data = dict(model.named_buffers())[name].clone()
    kept.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer_config.json").write_text('{"model_max_length": 64}\n')
    return model


def plain(path: Path, dtype: torch.dtype = torch.bfloat16, mtp: int = 0, shards: int = 1, **changes: Any) -> None:
    """A directory of random tensors without transformers, by the project's own table of names: for tests of bytes."""
    from dsv3_train.checkpoint.hf import config as configs
    from dsv3_train.checkpoint.hf.names import weights

    settings = {
        **SMALL,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": mtp,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "torch_dtype": "float32" if dtype == torch.float32 else "bfloat16",
        **changes,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    generator, contents, originals = torch.Generator().manual_seed(0), {}, {}
    expected = weights(configs.model(settings, "config.json"), mtp)
    for weight in sorted(expected, key=lambda weight: weight.copy):
        values = torch.randn(weight.shape, generator=generator) * 0.05 + ("norm" in weight.name)
        contents[weight.name] = values if weight.stored == "fp32" else values.to(dtype)
        if weight.copy:
            contents[weight.name] = originals[weight.key].clone()
        originals[weight.key] = contents[weight.name]
    rewrite(path, contents, shards)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, by the library that writes them."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def rewrite(path: Path, contents: dict[str, torch.Tensor], shards: int = 1, **config: Any) -> None:
    """Replace a directory's tensors (in `shards` files, by the library) and keys of its config.json."""
    from safetensors.torch import save_file

    for file in path.glob("*.safetensors*"):
        file.unlink()
    names = list(contents)
    weight_map = {}
    for shard in range(shards):
        part = names[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:06d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: contents[name].contiguous() for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in contents.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, **config}, indent=2) + "\n")


def add_mtp(path: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """Give a saved model an MTP module of random weights, with its copies of embedding and head; all its tensors."""
    contents = tensors(path)
    settings = json.loads((path / "config.json").read_text())
    last, hidden = settings["num_hidden_layers"] - 1, settings["hidden_size"]
    theirs, mtp = f"model.layers.{last}.", f"model.layers.{last + 1}."
    generator = torch.Generator().manual_seed(1)

    def like(tensor: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(tensor.shape, generator=generator) * 0.05 + mean).to(tensor.dtype)

    for name in [name for name in contents if name.startswith(theirs)]:
        contents[mtp + name.removeprefix(theirs)] = like(contents[name], 1.0 if "norm" in name else 0.0)
    norm = contents["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        contents[f"{mtp}{name}.weight"] = like(norm, 1.0)
    contents[f"{mtp}eh_proj.weight"] = like(torch.empty(hidden, 2 * hidden, dtype=norm.dtype))
    contents[f"{mtp}embed_tokens.weight"] = contents["model.embed_tokens.weight"].clone()
    contents[f"{mtp}shared_head.head.weight"] = contents["lm_head.weight"].clone()
    rewrite(path, contents, shards, num_nextn_predict_layers=1)
    return contents


def by_largest(block: torch.Tensor, name: str) -> torch.Tensor:
    """The report's scale of a block."""
    return block.abs().max() / 448


def to_fp8(
    path: Path, shards: int = 3, scale: Callable[[torch.Tensor, str], torch.Tensor] = by_largest, **more: str
) -> dict[str, torch.Tensor]:
    """Store the linear layers of attention and FFN as DeepSeek-V3's files do, by a plain quantiser; all tensors.

    Args:
        scale: of a block [128, 128] of the weight of a name.
        more: of `quantization_config`.
    """
    contents: dict[str, torch.Tensor] = {}
    for name, tensor in tensors(path).items():
        linear = tensor.dim() == 2 and "layers" in name and "proj" in name and "eh_proj" not in name
        if linear:
            contents[name], contents[f"{name}_scale_inv"] = quantise(tensor.float(), scale, name)
        else:
            contents[name] = tensor if name.endswith("bias") else tensor.bfloat16()
    quantisation = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        **more,
    }
    settings = json.loads((path / "config.json").read_text())
    key = "dtype" if "dtype" in settings else "torch_dtype"
    rewrite(path, contents, shards, quantization_config=quantisation, **{key: "bfloat16"})
    return contents


def quantise(weight: torch.Tensor, scale: Callable = by_largest, name: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block, in loops: what the project's own is compared with."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.size(0)):
        for j in range(scales.size(1)):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = scale(weight[place], name)
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def copy(source: Path, target: Path) -> Path:
    """A directory to damage."""
    shutil.copytree(source, target)
    return target
