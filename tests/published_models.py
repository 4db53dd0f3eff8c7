"""Directories with the structure of published ones and tiny random weights, from the data in tests/published/."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch

import hf_models

DATA = Path(__file__).parent / "published"
UNUSED_EXPERT = 1
"""Of every layer: its routing bias keeps tokens away from it, so that training leaves it as it was."""


def power_of_two(block: torch.Tensor, name: str) -> torch.Tensor:
    """V3.1's scales: powers of two, but the report's for `o_proj`."""
    scale = hf_models.by_largest(block, name)
    return scale if "o_proj" in name else torch.exp2(torch.ceil(torch.log2(scale)))


@dataclass(frozen=True)
class Family:
    """A published directory: folders of tests/published/ that hold its config.json, tensors, and tokenizer's files."""

    config: str
    tensors: str
    tokenizer: str | None = None
    norms: str = "BF16"
    scale: Callable[[torch.Tensor, str], torch.Tensor] = hf_models.by_largest
    files: dict[str, str] = field(default_factory=dict)
    """Others that it has, with stand-ins for what is in them."""
    crlf: bool = False
    """Line ends of its index."""


TOKENIZERS = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
CODE = {"configuration_deepseek.py": "raise SystemExit\n", "modeling_deepseek.py": "raise SystemExit\n"}
TIKTOKEN = {"tiktoken.model": "IQ== 0\nIg== 1\n", "tokenization_kimi.py": "raise SystemExit\n"}
VISION = {
    "multi_modal_projector.linear_1.weight": [256, 64],
    "vision_tower.encoder.blocks.0.wqkv.weight": [96, 32],
    "vision_tower.patch_embed.pos_emb.weight": [4, 4, 32],
}
R1, V3_1 = "DeepSeek-R1", "DeepSeek-V3.1"
MOONLIGHT, K2, KIMI_VL = "Moonlight-16B-A3B-Instruct", "Kimi-K2-Instruct", "Kimi-VL-A3B-Instruct"
FAMILIES = {
    "DeepSeek-V3": Family("DeepSeek-V3", R1, "DeepSeek-V3", files=CODE),
    # Not found itself; here with the config.json of V3's first release, December 2024.
    "DeepSeek-V3-Base": Family("DeepSeek-V3.release-2024-12", R1, "DeepSeek-V3", files=CODE),
    "DeepSeek-V3.1": Family(V3_1, R1, V3_1, scale=power_of_two, files=CODE),
    # Not found itself; here V3.1 with norms in FP32, as V3.2 has them.
    "DeepSeek-V3.1-Terminus": Family(V3_1, R1, V3_1, "F32", power_of_two, CODE),
    # Not found itself; here R1, with an index whose lines end in CRLF, as a mirror of R1 has it.
    "DeepSeek-R1-0528": Family(R1, R1, R1, files=CODE, crlf=True),
    "DeepSeek-V2-Lite": Family("DeepSeek-V2-Lite", "DeepSeek-V2-Lite", files=CODE),
    "Moonlight-16B-A3B": Family(MOONLIGHT, MOONLIGHT, files=CODE | TIKTOKEN),
    "Kimi-K2": Family(K2, K2, K2, files=CODE | TIKTOKEN),
    "Kimi-VL": Family(KIMI_VL, MOONLIGHT, files=TIKTOKEN),
}


def make(path: Path, name: str) -> None:
    """Write the directory of a family."""
    family = FAMILIES[name]
    path.mkdir()
    (path / "config.json").write_bytes((DATA / family.config / "config.json").read_bytes())
    for file in TOKENIZERS if family.tokenizer else ():
        if (content := DATA / family.tokenizer / file).is_file():
            (path / file).write_bytes(content.read_bytes())
    for file, text in family.files.items():
        (path / file).write_text(text)
    if family.tokenizer and (special := DATA / family.tokenizer / "special_tokens.json").is_file():
        (path / "tokenizer.json").write_text(tokenizer(json.loads(special.read_text())))
    described = json.loads((DATA / family.tensors / "tensors.json").read_text())
    rows = [(name, dtype, shape) for row in described["tensors"] for name, dtype, shape in expanded(*row)]
    contents = values(rows, family)
    if family.config == KIMI_VL:
        contents = {f"language_model.{name}": tensor for name, tensor in contents.items()}
        contents |= {name: torch.rand(shape).bfloat16() for name, shape in VISION.items()}
    write(path, contents, described["files"], family.crlf)


def expanded(name: str, dtype: str, shape: list[int]) -> Iterator[tuple[str, str, list[int]]]:
    """Every tensor of a row: `0-3` in a name stands for every number from 0 to 3."""
    parts = re.split(r"(?<=\.)(\d+-\d+)(?=\.)", name)
    ranges = [
        range(int(part.split("-")[0]), int(part.split("-")[1]) + 1) if i % 2 else (part,)
        for i, part in enumerate(parts)
    ]
    for one in itertools.product(*ranges):
        yield "".join(map(str, one)), dtype, shape


def values(rows: list[tuple[str, str, list[int]]], family: Family) -> dict[str, torch.Tensor]:
    """Random tensors; MTP's copies of embedding and head are copies."""
    generator = torch.Generator().manual_seed(0)
    contents: dict[str, torch.Tensor] = {}
    for name, dtype, shape in rows:
        made = torch.randn(shape, generator=generator) * 0.05
        if "norm" in name:
            dtype, made = family.norms, made + 1
        if name.endswith("e_score_correction_bias"):
            made[UNUSED_EXPERT] = -50
        if name.endswith("_scale_inv"):
            assert contents[name].shape == made.shape
        elif dtype == "F8_E4M3":
            contents[name], contents[f"{name}_scale_inv"] = hf_models.quantise(made, family.scale, name)
        else:
            contents[name] = made if dtype == "F32" else made.bfloat16()
    for name in contents:
        if re.search(r"layers\.\d+\.embed_tokens", name):
            contents[name] = contents["model.embed_tokens.weight"].clone()
        if "shared_head.head" in name:
            contents[name] = contents["lm_head.weight"].clone()
    return contents


def write(path: Path, contents: dict[str, torch.Tensor], pattern: str, crlf: bool) -> None:
    """A file for each layer, named by `pattern`, with an index; head and norm lie with the last but one."""
    from safetensors.torch import save_file

    last = max(map(layer_of, contents))
    numbers = {name: last - 1 if "lm_head" in name or "model.norm" in name else layer_of(name) for name in contents}
    weight_map = {name: pattern.format(number + 1, last + 1) for name, number in numbers.items()}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in contents.items() if weight_map[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n"
    (path / "model.safetensors.index.json").write_bytes(text.replace("\n", "\r\n" if crlf else "\n").encode())


def layer_of(name: str) -> int:
    """A tensor's layer; 0 where it is of none."""
    layer = re.search(r"layers\.(\d+)\.", name)
    return int(layer[1]) if layer else 0


def tokenizer(special: dict[str, int]) -> str:
    """A tokenizer.json of bytes with the published special tokens: the published one was not found."""
    names = {number: token for token, number in special.items()}
    alphabet = iter(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {
        names.get(number) or next(alphabet, f"<｜place▁holder▁no▁{number}｜>"): number  # noqa: RUF001
        for number in range(max(names) + 1)
    }
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return bpe.to_str()


def plain(path: Path, to: Path) -> None:
    """The language model of a directory for transformers: FP32 by plain loops, without what is not its own."""
    from safetensors.torch import save_file

    config = json.loads((path / "config.json").read_text())
    own = config.get("text_config", config)
    settings = {key: value for key, value in own.items() if key not in ("quantization_config", "auto_map")}
    stored = hf_models.tensors(path)
    contents = {}
    for name, tensor in stored.items():
        own_name = name.removeprefix("language_model.")
        beside = own_name.endswith(("_scale_inv", "inv_freq")) or own_name in VISION
        if beside or layer_of(own_name) >= own["num_hidden_layers"]:
            continue
        wide = tensor.float()
        scales = stored.get(f"{name}_scale_inv")
        if scales is not None:
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            wide = wide * spread[: wide.size(0), : wide.size(1)]
        contents[own_name] = wide.contiguous()
    to.mkdir()
    kind = settings.get("model_type", "deepseek_v3")
    (to / "config.json").write_text(
        json.dumps({**settings, "model_type": "deepseek_v3" if kind == "kimi_k2" else kind, "torch_dtype": "float32"})
    )
    save_file(contents, to / "model.safetensors", metadata={"format": "pt"})
