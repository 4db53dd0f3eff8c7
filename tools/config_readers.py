"""How config.json is read here and by transformers, with keys removed, doubled and moved at random: logits compared.

    python tools/config_readers.py make DIR              # 40 directories of random weights, by transformers 5
    python tools/config_readers.py ours DIR              # this project's logits of each, or its refusal
    python tools/config_readers.py theirs DIR 5          # transformers'; once with 5.x and once, by the interpreter of
    OTHER/bin/python tools/config_readers.py theirs DIR 4    # an environment that has it, with 4.57
    python tools/config_readers.py compare DIR           # how many are read, how far logits are apart

A key is removed (or several), stands in a second place, there alike or not, or has moved to another place that a
version knows. `compare` ends with exit code 1 if logits of a file that is read differ from transformers 5 by more than
1e-5, or from 4.57, unless that does not look where a setting has moved to; if a file without contradiction is refused;
or if fewer than three in four are read.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TINY: dict[str, Any] = {
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.05,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_attention_heads": 2,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-3,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "v_head_dim": 12,
    "vocab_size": 64,
}
_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 64, "type": "yarn"}
_V3 = {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
BASES: dict[str, dict[str, Any]] = {
    "V3": {
        **_TINY,
        **_V3,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 1.5,
        "rope_interleave": True,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "Moonlight": {
        **_TINY,
        **_V3,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rope_scaling": None,
        "routed_scaling_factor": 2.446,
    },
    # transformers 4.57 leaves YaRN's softmax scale out of it, which mscale alone does not ask for.
    "V2-Lite": {
        **_TINY,
        **_V2,
        "mlp_bias": False,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_scaling": {**_YARN},
        "routed_scaling_factor": 1.5,
    },
}
"""As the published ones but for their sizes; no value is its class's default where another one can be had."""
_LARGEST = 30_000_000
"""Values of a model: one key absent can make it wide, several too wide for a quick look."""


@dataclass
class Changed:
    """One config.json after random changes."""

    base: str
    config: dict[str, Any]
    said: list[str]
    """What was done."""

    @property
    def contradicts(self) -> bool:
        """Two settings disagree, and the versions differ on which holds."""
        config, rope = self.config, self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        turned = config.get("qk_rope_head_dim", 64)
        pairs = [
            (config.get(_experts(self.base)), config.get("n_routed_experts")),
            (config.get("rope_theta"), rope.get("rope_theta")),
            (rope.get("type"), rope.get("rope_type")),
            (config.get("original_max_position_embeddings"), rope.get("original_max_position_embeddings")),
            (config.get("head_dim"), turned if self.base != "V2-Lite" else None),
            (config.get("qk_head_dim"), config.get("qk_nope_head_dim", 128) + turned),
        ]
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    @property
    def only_five(self) -> bool:
        """A setting stands only where transformers 4.57 does not look for it, or has another default there."""
        config, rope = self.config, self.config.get("rope_scaling") or {}
        top, inside = (place.get("original_max_position_embeddings") for place in (config, rope))
        return (
            (_experts(self.base) in config and "n_routed_experts" not in config)
            or bool(config.get("rope_parameters") and not rope)
            or ("rope_theta" in rope and "rope_theta" not in config)
            or (top is not None and inside is None)
            or (self.base == "V2-Lite" and "vocab_size" not in config)
        )


def _experts(base: str) -> str:
    """The other name of `n_routed_experts`, which transformers 5 knows."""
    return "num_experts" if base == "V2-Lite" else "num_local_experts"


def change(generator: random.Random) -> Changed:
    """A base with one to three changes."""
    base = generator.choice(list(BASES))
    made = Changed(base, json.loads(json.dumps(BASES[base])), [])
    for one in generator.sample([_remove, _remove, _double, _move, _within_rope], generator.randint(1, 3)):
        one(made, generator)
    return made


def _remove(made: Changed, generator: random.Random) -> None:
    for key in generator.sample(sorted(made.config.keys() - {"model_type"}), generator.randint(1, 3)):
        del made.config[key]
        made.said.append(f"- {key}")


def _within_rope(made: Changed, generator: random.Random) -> None:
    """A key of YaRN is removed."""
    rope = made.config.get("rope_scaling") or {}
    keys = sorted(rope.keys() - {"factor", "type", "rope_type"})
    if keys:
        key = generator.choice(keys)
        del rope[key]
        made.said.append(f"- rope_scaling.{key}")


def _double(made: Changed, generator: random.Random) -> None:
    config, rope = made.config, made.config.get("rope_scaling")
    differs = generator.random() < 0.4
    kind = generator.choice(
        ["dtype", "experts", "rope_parameters", "theta", "rope_type", "head_dim", "original", "mtp"]
    )
    if kind == "dtype" and "torch_dtype" in config:
        config["dtype"] = "bfloat16" if differs else "float32"  # weights are compared in FP32
    elif kind == "experts" and "n_routed_experts" in config:
        config[_experts(made.base)] = config["n_routed_experts"] * (2 if differs else 1)
    elif kind == "rope_parameters" and rope:
        theta = config.get("rope_theta", 10000.0)
        config["rope_parameters"] = {"rope_theta": 777.0 if differs else theta, **rope, "rope_type": "yarn"}
        if differs:
            config["rope_parameters"]["factor"] = 4.0
    elif kind == "theta" and rope and "rope_theta" in config:
        rope["rope_theta"] = 777.0 if differs else config["rope_theta"]
    elif kind == "rope_type" and rope and "type" in rope:
        rope["rope_type"] = "linear" if differs else "yarn"
    elif kind == "head_dim" and {"qk_rope_head_dim", "qk_nope_head_dim"} <= config.keys():
        config["head_dim"], config["qk_head_dim"] = 8, 24
        differs = False
    elif kind == "original" and rope and "original_max_position_embeddings" in rope:
        config["original_max_position_embeddings"] = 128 if differs else 64
    elif kind == "mtp" and "num_nextn_predict_layers" in config:
        config["num_mtp_layers"] = config["num_nextn_predict_layers"]
        differs = False
    else:
        return
    made.said.append(f"+ {kind}{' (differs)' if differs else ''}")


def _move(made: Changed, generator: random.Random) -> None:
    config, rope = made.config, made.config.get("rope_scaling")
    kind = generator.choice(["rope_parameters", "dtype", "experts", "rope_type", "original", "theta"])
    if kind == "rope_parameters" and "rope_scaling" in config and "rope_parameters" not in config:
        theta = {"rope_theta": config.pop("rope_theta")} if "rope_theta" in config else {}
        config["rope_parameters"] = {**(config.pop("rope_scaling") or {"rope_type": "default"}), **theta}
    elif kind == "dtype" and "torch_dtype" in config:
        config["dtype"] = config.pop("torch_dtype")
    elif kind == "experts" and "n_routed_experts" in config:
        config[_experts(made.base)] = config.pop("n_routed_experts")
    elif kind == "rope_type" and rope and "type" in rope:
        rope["rope_type"] = rope.pop("type")
    elif kind == "original" and rope and "original_max_position_embeddings" in rope:
        config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    elif kind == "theta" and rope and "rope_theta" in config and "rope_theta" not in rope:
        rope["rope_theta"] = config.pop("rope_theta")
    else:
        return
    made.said.append(f"> {kind}")


def classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' classes of a configuration and its model."""
    import transformers

    name = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2"}[config["model_type"]]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def make(where: Path, count: int, seed: int) -> None:
    """Directories 00, 01, ... with config.json, random weights as transformers 5 reads it, and made.json."""
    import torch

    generator, done = random.Random(seed), 0
    while done < count:
        made = change(generator)
        kind, model_of = classes(made.config)
        try:
            settings = kind.from_dict(json.loads(json.dumps(made.config)))
            with torch.device("meta"):
                values = sum(parameter.numel() for parameter in model_of(settings).parameters())
            if not made.said or values > _LARGEST:
                continue
            model = filled(model_of(settings).float(), done)
        except Exception as error:  # no model: transformers itself cannot read this one
            print(f"passed over, {', '.join(made.said)}: {type(error).__name__}: {error}"[:160])
            continue
        write(where / f"{done:02d}", model, made)
        done += 1


def write(path: Path, model: Any, made: Changed) -> None:
    """A directory of a model, with another config.json."""
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(made.config, indent=1) + "\n")
    facts = {name: getattr(made, name) for name in ("base", "said", "contradicts", "only_five")}
    (path / "made.json").write_text(json.dumps(facts))


def filled(model: Any, seed: int) -> Any:
    """transformers' model with random weights, FP32, after it has run once."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
            if "norm" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.05)
        model(torch.arange(3)[None])
    return model


def tokens(path: Path) -> Any:
    """[1, 24] token ids."""
    import torch

    return torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(int(path.name)))


def theirs(where: Path, version: str) -> None:
    """transformers' logits of each directory: theirs-4.pt or theirs-5.pt; or why not: .txt."""
    import torch
    import transformers

    assert transformers.__version__.startswith(f"{version}."), f"this is transformers {transformers.__version__}"
    for path in sorted(path for path in where.iterdir() if path.is_dir()):
        try:
            _, model_of = classes(json.loads((path / "config.json").read_text()))
            load = {"dtype": torch.float32, "output_loading_info": True}
            model, info = model_of.from_pretrained(path, **load)
            # Without it 4.57 fills what it does not find at random.
            wrong = [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]]
            if wrong:
                raise ValueError(f"{wrong[0]}: {len(info[wrong[0]])}")
            with torch.no_grad():
                torch.save(model.eval()(tokens(path)).logits.float(), path / f"theirs-{version}.pt")
        except Exception as error:  # whatever it says is the finding
            (path / f"theirs-{version}.txt").write_text(f"{type(error).__name__}: {error}")


def ours(where: Path) -> None:
    """This project's logits of each directory: ours.pt; or its refusal: ours.txt."""
    import torch

    from dsv3_train.checkpoint.hf import logits
    from dsv3_train.checkpoint.hf.from_hf import make_plan
    from dsv3_train.checkpoint.hf.verify import open_weights
    from dsv3_train.errors import UserError

    for path in sorted(path for path in where.iterdir() if path.is_dir()):
        try:
            make_plan(path, None, [], None, None, "small")
            torch.save(logits._ours(open_weights(path), tokens(path)), path / "ours.pt")
        except UserError as error:
            (path / "ours.txt").write_text(str(error).replace(f"{path}/", ""))


def compare(where: Path) -> int:
    """Print a line for each directory, and the sums; the exit code."""
    import torch

    wrong = read = both = 0
    paths = sorted(path for path in where.iterdir() if path.is_dir())
    for path in paths:
        made = json.loads((path / "made.json").read_text())
        said = f"{path.name} {made['base']:9s} {', '.join(made['said'])}: "
        if not (path / "ours.pt").is_file():
            refusal = (path / "ours.txt").read_text()
            wrong += not made["contradicts"]
            print(f"{said}REFUSED{'' if made['contradicts'] else ' WITHOUT CONTRADICTION'}: {refusal}")
            continue
        read += 1
        found = torch.load(path / "ours.pt")
        parts, near = [], []
        for version in ("5", "4"):
            file = path / f"theirs-{version}.pt"
            if file.is_file():
                distance = float((found - torch.load(file)).abs().max())
                near.append(distance < 1e-5)
                parts.append(f"{version}: {distance:.1e}")
            else:
                near.append(False)
                parts.append(f"{version}: {(path / f'theirs-{version}.txt').read_text().splitlines()[0][:70]}")
        both += all(near)
        wrong += not near[0] or not (near[1] or made["only_five"])
        bad = "" if all(near) else " (4 does not look there)" if near[0] and made["only_five"] else " WRONG"
        print(said + ", ".join(parts) + bad)
    print(f"{read} of {len(paths)} read; {both} with the logits of transformers 5 and 4 within 1e-5; {wrong} wrong")
    return int(wrong > 0 or read < 0.75 * len(paths))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "theirs", "ours", "compare"])
    parser.add_argument("where", type=Path)
    parser.add_argument("version", nargs="?", default="5", choices=["4", "5"])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.where, arguments.count, arguments.seed)
    elif arguments.what == "theirs":
        theirs(arguments.where, arguments.version)
    elif arguments.what == "ours":
        ours(arguments.where)
    else:
        return compare(arguments.where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
