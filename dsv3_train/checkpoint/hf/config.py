"""`config.json` and a recipe: deriving one from the other, and what contradicts between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsv3_train.errors import UserError
from dsv3_train.recipe.faults import Fault, Place, refuse
from dsv3_train.recipe.messages import faults_of
from dsv3_train.recipe.schema import Model, Recipe, Section
from dsv3_train.recipe.yaml_source import Node

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2")
"""Whose layers are DeepSeek-V3's, or a part of them (Moonlight is a deepseek_v3)."""
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_nextn_predict_layers",
    "rms_norm_eps",
    "initializer_range",
)
"""Keys that `config.json` and a recipe's `model` section share."""
_WHERE_ABSENT: dict[str, Any] = {
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": None,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 1.0,
    "initializer_range": 0.02,
}
_REQUIRED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "moe_layer_freq": (1, None),
    "rope_interleave": (True, None),
}
"""What these keys must say if they are there: this project's model has nothing else."""
_STARTING_POINT: dict[str, Any] = {
    "schedule": {"lr": 7.3e-6, "batch_size": 8, "bias_update_speed": 0.0, "balance_loss": 0.0},
    "training": {"duration": "1000 steps"},
}
"""What a recipe needs and `config.json` does not say; the learning rate is the report's last (section 4.2)."""
_LONGEST_SEQUENCE = 4096


def read(path: Path) -> dict[str, Any]:
    """The `config.json` of a directory.

    Raises:
        UserError: missing, or not JSON of an object.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; a Hugging Face directory has one") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object; fetch it again")
    return config


def model_of(config: dict[str, Any], file: str) -> dict[str, Any]:
    """A recipe's `model` section from `config.json`.

    Raises:
        UserError: a model that this project does not have, or values of other types; one line for each key.
    """
    return _checked(config, file)[0]


def model(config: dict[str, Any], file: str, mtp: int | None = None) -> Model:
    """The model of `config.json`, with `mtp` MTP modules where that is given.

    Raises:
        UserError: as `model_of`.
    """
    checked = _checked(config, file)[1]
    return checked if mtp is None else checked.model_copy(update={"num_nextn_predict_layers": mtp})


class _Keys(Section):
    """So that faults of a model are found below `model`, as in a recipe."""

    model: Model


def _checked(config: dict[str, Any], file: str) -> tuple[dict[str, Any], Model]:
    faults = [Fault(Place(file), key, message) for key, message in _unsupported(config)]
    values: dict[str, Any] = {}
    for key in _SAME:
        value = config.get(key, _WHERE_ABSENT.get(key))
        if value is None:
            value = _WHERE_ABSENT.get(key)
        if value is None and key != "q_lora_rank":
            faults.append(Fault(Place(file), key, "missing; a DeepSeek-V3 configuration has it"))
        values[key] = _float(value) if key in _FLOATS else value
    values["scoring_func"] = _scoring(config)
    rope = _rope(config)
    values["rope_theta"] = _float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    unreadable = any(fault.key in ("model_type", _rope_key(config)) for fault in faults)
    values["rope_scaling"] = None if unreadable else _scaling(config, rope)
    try:
        checked = _Keys.model_validate({"model": values}).model
    except ValidationError as error:
        refuse([*faults, *_faults_of(error, values, config, file)])
    if faults:
        refuse(faults)
    return values, checked


def _faults_of(error: ValidationError, values: dict[str, Any], config: dict[str, Any], file: str) -> Iterator[Fault]:
    """The schema's faults, under the keys of `config.json`."""
    root = _node({"model": values}, Place(file))
    for fault in faults_of(error, root):
        key = fault.key.removeprefix("model.")
        yield Fault(fault.place, key.replace("rope_scaling", _rope_key(config), 1), fault.message)


def _node(value: Any, place: Place) -> Node:
    inside = isinstance(value, dict)
    return Node({key: _node(part, place) for key, part in value.items()} if inside else value, place)


def _float(value: Any) -> Any:
    """An integer as a float; all else as it is, for the schema to judge."""
    return float(value) if type(value) is int and abs(value) < 1 << 64 else value


_FLOATS = ("routed_scaling_factor", "rms_norm_eps", "initializer_range")


def _scoring(config: dict[str, Any]) -> str:
    default = "softmax" if config.get("model_type") == "deepseek_v2" else "sigmoid"
    return config.get("scoring_func") or default


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (the published files)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {}


def _rope_key(config: dict[str, Any]) -> str:
    return "rope_parameters" if config.get("rope_parameters") else "rope_scaling"


def _scaling(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any] | None:
    if _rope_type(rope) == "default":
        return None
    both = rope.get("mscale") is not None  # `_unsupported` has refused one without the other
    return {
        "factor": _float(rope["factor"]),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings")
        or config["max_position_embeddings"],
        "beta_fast": _float(rope.get("beta_fast") or 32.0),
        "beta_slow": _float(rope.get("beta_slow") or 1.0),
        "mscale": _float(rope["mscale"]) if both else _NO_MSCALE[0],
        "mscale_all_dim": _float(rope["mscale_all_dim"]) if both else _NO_MSCALE[1],
    }


_NO_MSCALE = (1.0, 0.0)
"""What `mscale` and `mscale_all_dim` are where neither is given. Of a zero elsewhere transformers makes neither, and
DeepSeek's own code a factor of 1."""


def _zero_mscale(rope: dict[str, Any]) -> bool:
    both = (rope.get("mscale"), rope.get("mscale_all_dim"))
    return 0 in both and both != _NO_MSCALE


def refuse_unwritable(model: Model, file: str) -> None:
    """Refuse a model that no `config.json` can say.

    Raises:
        UserError: naming the key of the recipe `file`.
    """
    if model.rope_scaling and _zero_mscale(model.rope_scaling.model_dump()):
        refuse([Fault(Place(file), "model.rope_scaling", _ZERO_MSCALE)])


_ZERO_MSCALE = (
    "implementations differ on mscale or mscale_all_dim 0; set both above 0, or mscale 1 with mscale_all_dim 0"
)


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _unsupported(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        yield "model_type", f"{kind!r} is not supported; it must be one of {', '.join(MODEL_TYPES)}"
        return
    for key, allowed in _REQUIRED.items():
        if config.get(key, allowed[0]) not in allowed:
            yield key, f"{config[key]!r} is not supported; this model has only {allowed[0]!r}"
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        yield "num_key_value_heads", f"{config['num_key_value_heads']} of {heads} heads is not supported; MLA has all"
    scoring = _scoring(config)
    if scoring not in ("sigmoid", "softmax"):
        yield "scoring_func", f"{scoring!r} is not supported; it must be sigmoid or softmax"
    method = config.get("topk_method") or ("noaux_tc" if scoring == "sigmoid" else "greedy")
    if method != ("noaux_tc" if scoring == "sigmoid" else "greedy"):
        yield (
            "topk_method",
            f"{method!r} with scoring_func {scoring!r} is not supported (sigmoid has noaux_tc, softmax greedy)",
        )
    normalised = config.get("norm_topk_prob", scoring == "sigmoid")
    if bool(normalised) != (scoring == "sigmoid"):
        yield "norm_topk_prob", f"{normalised} with scoring_func {scoring!r} is not supported"
    if config.get("num_experts_per_tok") == 1 and scoring == "sigmoid":
        yield "num_experts_per_tok", "1 is not supported: implementations differ on a single expert's gate"
    yield from _unsupported_rope(config)
    longest = config.get("max_position_embeddings")
    if longest is not None and type(longest) is not int:
        yield "max_position_embeddings", f"must be an integer, got {_show(longest)}"
    quantisation = config.get("quantization_config")
    if quantisation is not None and not isinstance(quantisation, dict):
        yield "quantization_config", f"must be an object or null, got {_show(quantisation)}"
    elif quantisation and (
        quantisation.get("quant_method") != "fp8"
        or quantisation.get("fmt", "e4m3") != "e4m3"
        or quantisation.get("weight_block_size") != [128, 128]
    ):
        yield "quantization_config", "only FP8 (e4m3) in 128x128 blocks is supported"


def _unsupported_rope(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            yield key, f"must be an object or null, got {_show(config[key])}"
    key, rope = _rope_key(config), _rope(config)
    kind = _rope_type(rope)
    if kind not in ("default", "yarn"):
        yield key, f"type {kind!r} is not supported; it must be yarn, or null for plain RoPE"
    if kind != "yarn":
        return
    if not rope.get("factor"):
        yield key, "yarn without a factor"
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        yield key, "attention_factor and truncate are not supported"
    if (rope.get("mscale") is None) != (rope.get("mscale_all_dim") is None):
        yield key, "mscale and mscale_all_dim must both be there or neither: implementations differ on one alone"
    elif _zero_mscale(rope):
        yield key, _ZERO_MSCALE
    if not (rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")):
        yield key, "yarn without original_max_position_embeddings, and there is no max_position_embeddings either"


def derive(config: dict[str, Any], name: str, mtp: int, main_dtype: str) -> dict[str, Any]:
    """Plain values of a recipe for the model of `config.json` with `mtp` MTP modules: a place to start from."""
    model = {**model_of(config, "config.json"), "num_nextn_predict_layers": mtp}
    schedule = {**_STARTING_POINT["schedule"], "mtp_weight": 0.1 if mtp else 0.0}
    length = min(int(config.get("max_position_embeddings") or _LONGEST_SEQUENCE), _LONGEST_SEQUENCE)
    return {
        "name": name,
        "description": "Derived from config.json; data and schedule are yours to set",
        "model": model,
        "precision": {"params": "fp32" if main_dtype == "F32" else "bf16", "adam_moments": "fp32"},
        "schedule": schedule,
        "training": {**_STARTING_POINT["training"], "sequence_length": length},
    }


def contradictions(recipe: Recipe, config: dict[str, Any], mtp: int, chosen: Sequence[str] = ()) -> list[str]:
    """`model.KEY: recipe's value, but config.json says ...`, for every key that differs.

    Args:
        mtp: MTP modules that the files have, or that are kept of them.
        chosen: `a.b` keys that the command line set: what is said there holds.
    """
    theirs = model(config, "config.json", mtp)
    found = []
    for key, said in theirs.model_dump().items():
        own = recipe.model.model_dump()[key]
        if key == "initializer_range" or any(_within(f"model.{key}", choice) for choice in chosen):
            continue
        if own != said:
            found.append(f"model.{key}: {_show(own)} in the recipe, {_show(said)} in config.json")
    return found


def _within(key: str, choice: str) -> bool:
    return choice == key or choice.startswith(f"{key}.") or key.startswith(f"{choice}.")


def _show(value: Any) -> str:
    return "null" if value is None else json.dumps(value)


def config_of(model: Model, mtp: int, sequence_length: int, eos_id: int | None = None) -> dict[str, Any]:
    """A `config.json` for a model that did not come from one.

    Args:
        eos_id: the end-of-document token, with which generation begins too; None: not known, left out.
    """
    values = model.model_dump()
    scaling, theta = values.pop("rope_scaling"), values.pop("rope_theta")
    softmax = model.scoring_func == "softmax"
    longest = sequence_length
    if scaling:
        longest = int(scaling["factor"] * scaling["original_max_position_embeddings"])
        scaling = {"type": "yarn", **scaling}
        if (scaling["mscale"], scaling["mscale_all_dim"]) == _NO_MSCALE:
            del scaling["mscale"], scaling["mscale_all_dim"]
    return {
        "architectures": ["DeepseekV2ForCausalLM" if softmax else "DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({} if eos_id is None else {"bos_token_id": eos_id, "eos_token_id": eos_id}),
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "model_type": "deepseek_v2" if softmax else "deepseek_v3",
        "moe_layer_freq": 1,
        "norm_topk_prob": not softmax,
        "num_key_value_heads": model.num_attention_heads,
        "rope_scaling": scaling,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "topk_method": "greedy" if softmax else "noaux_tc",
        "use_cache": True,
        **values,
        "num_nextn_predict_layers": mtp,
    }


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config.json` for files of `dtype` (fp8, bf16, fp32): `quantization_config` exactly with FP8."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    changed = {**config, key: "float32" if dtype == "fp32" else "bfloat16"}
    if dtype == "fp8":
        changed["quantization_config"] = config.get("quantization_config") or {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    else:
        changed.pop("quantization_config", None)
    return changed


def changed(model: Model, config: dict[str, Any]) -> dict[str, Any]:
    """Keys of `config.json` that follow from a model which a recipe has changed since, as its RoPE."""
    fresh = config_of(model, model.num_nextn_predict_layers, int(config.get("max_position_embeddings") or 0))
    keys = [key for key in _SAME if key not in ("initializer_range", "num_nextn_predict_layers")]
    found = {key: fresh[key] for key in keys if key in config or fresh[key] != _WHERE_ABSENT.get(key)}
    for key in ("rope_theta", "rope_scaling", "max_position_embeddings"):
        found[key] = fresh[key]
    if "rope_parameters" in config:
        found["rope_parameters"] = {
            "rope_theta": fresh["rope_theta"],
            **({"rope_type": "yarn", **fresh["rope_scaling"]} if fresh["rope_scaling"] else {"rope_type": "default"}),
        }
    return found
