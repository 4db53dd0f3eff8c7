"""Make a directory with every name, shape and type of the published DeepSeek-V3, in files that take no space.

    python tools/synthetic_hf.py models/synthetic        # 162 sparse files, 91,991 tensors of zeros
    dsv3 convert inspect models/synthetic
    dsv3 convert from-hf models/synthetic runs/synthetic --dry-run

Names and shapes are written out here anew, from the published config.json and index, so that the project's own
table is held against them. `--layers`, `--experts` make a smaller one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""As published."""
PER_FILE = 4_302_000_000  # bytes; about the published 163 files
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
Tensor = tuple[str, str, list[int]]
"""Name, type, shape."""


def tensors(config: dict) -> Iterator[Tensor]:
    """All of them, in the order of the published files."""
    hidden, vocabulary, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    yield "model.embed_tokens.weight", "BF16", [vocabulary, hidden]
    for layer in range(layers + config["num_nextn_predict_layers"]):
        if layer >= layers:
            yield f"model.layers.{layer}.embed_tokens.weight", "BF16", [vocabulary, hidden]
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"model.layers.{layer}.{name}.weight", "BF16", [hidden]
            yield f"model.layers.{layer}.eh_proj.weight", "BF16", [hidden, 2 * hidden]
            yield f"model.layers.{layer}.shared_head.head.weight", "BF16", [vocabulary, hidden]
        for name, dtype, shape in layer_tensors(config, layer):
            yield f"model.layers.{layer}.{name}", dtype, shape
    yield "model.norm.weight", "BF16", [hidden]
    yield "lm_head.weight", "BF16", [vocabulary, hidden]


def layer_tensors(config: dict, layer: int) -> Iterator[Tensor]:
    """Of one transformer layer."""
    hidden, heads, latent, query = (
        config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank")
    )
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield from linear("self_attn.q_a_proj", query, hidden)
    yield "self_attn.q_a_layernorm.weight", "BF16", [query]
    yield from linear("self_attn.q_b_proj", heads * (nope + rope), query)
    yield from linear("self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", "BF16", [latent]
    yield from linear("self_attn.kv_b_proj", heads * (nope + value), latent)
    yield from linear("self_attn.o_proj", hidden, heads * value)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", "BF16", [hidden]
    if layer < config["first_k_dense_replace"]:
        yield from ffn("mlp", hidden, config["intermediate_size"])
        return
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    yield "mlp.gate.weight", "BF16", [experts, hidden]
    yield "mlp.gate.e_score_correction_bias", "F32", [experts]
    for expert in range(experts):
        yield from ffn(f"mlp.experts.{expert}", hidden, width)
    yield from ffn("mlp.shared_experts", hidden, config["n_shared_experts"] * width)


def ffn(name: str, hidden: int, width: int) -> Iterator[Tensor]:
    """Gate, up and down."""
    yield from linear(f"{name}.gate_proj", width, hidden)
    yield from linear(f"{name}.up_proj", width, hidden)
    yield from linear(f"{name}.down_proj", hidden, width)


def linear(name: str, out: int, into: int) -> Iterator[Tensor]:
    """FP8 codes, and a scale for each 128x128 block."""
    yield f"{name}.weight", "F8_E4M3", [out, into]
    yield f"{name}.weight_scale_inv", "F32", [-(-out // 128), -(-into // 128)]


def make(path: Path, config: dict, per_file: int = PER_FILE) -> int:
    """Write the directory; the number of its tensors."""
    path.mkdir(parents=True)
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors(config):
        nbytes = prod(tensor[2]) * BYTES[tensor[1]]
        if size + nbytes > per_file and files[-1]:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += nbytes
    weight_map = {}
    for number, contents in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        weight_map |= {tensor[0]: name for tensor in contents}
        write_sparse(path / name, contents)
    total = sum(prod(shape) * BYTES[dtype] for contents in files for _, dtype, shape in contents)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(weight_map)


def write_sparse(path: Path, contents: list[Tensor]) -> None:
    """A safetensors file whose data is a hole."""
    header, begin = {}, 0
    for name, dtype, shape in contents:
        end = begin + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--experts", type=int, default=CONFIG["n_routed_experts"])
    asked = parser.parse_args()
    count = make(asked.path, {**CONFIG, "num_hidden_layers": asked.layers, "n_routed_experts": asked.experts})
    print(f"{count:,} tensors in {asked.path}")
