"""`config.json` and a recipe: deriving one from the other, and what contradicts between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsv3_train import regular
from dsv3_train.checkpoint.hf import language, own_class, rope
from dsv3_train.errors import UserError
from dsv3_train.recipe.faults import Fault, Place, refuse
from dsv3_train.recipe.messages import faults_of
from dsv3_train.recipe.schema import Model, Recipe, Section
from dsv3_train.recipe.yaml_source import Node

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
    "scoring_func",
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
_SCORING: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True,)},
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, None),
    },
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "moe_layer_freq": (1, None),
    "rope_interleave": (True,),
    "is_causal": (True, None),
    "per_layer_config": (None,),
}
"""What these keys must say if they are there: this project's model has nothing else."""
_STARTING_POINT: dict[str, Any] = {
    "schedule": {"lr": 7.3e-6, "batch_size": 8, "bias_update_speed": 0.0, "balance_loss": 0.0},
    "training": {"duration": "1000 steps"},
}
"""What a recipe needs and `config.json` does not say; the learning rate is the report's last (section 4.2)."""
_LONGEST_SEQUENCE = 4096
_LARGEST = 1 << 22  # bytes


def read(path: Path) -> dict[str, Any]:
    """The `config.json` of a directory.

    Raises:
        UserError: missing, or not JSON of an object.
    """
    file = path / "config.json"
    try:
        text = regular.read(file, _LARGEST).decode("utf-8")
        config = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, file))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; a Hugging Face directory has one") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object; fetch it again")
    return config


def _object(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    found = dict(pairs)
    for key, value in pairs:
        if value != found[key]:
            raise UserError(
                f"{file}: {key}: is there twice, as {_show(value)} and {_show(found[key])}; keep the right one"
            )
    return found


_READABLE = "weights are read in BF16, FP32, and FP8 (e4m3) in 128x128 blocks"


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


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's keys, those absent as the model's own class takes them, under one name each."""
    return own_class.settings(config)


def notes(config: dict[str, Any]) -> list[str]:
    """What of `config.json` another reader takes otherwise, or what of it does not hold, one line each."""
    own = language.part(config)
    return own_class.notes(config) + rope.read(own, settings(config)["max_position_embeddings"]).notes


def _checked(config: dict[str, Any], file: str) -> tuple[dict[str, Any], Model]:
    part, own = language.key(config), language.part(config)
    within = f"{part}." if part else ""
    kind = own.get("model_type")
    if not isinstance(kind, str) or kind not in own_class.OWN_CLASS:
        known = ", ".join([*own_class.OWN_CLASS, language.WITHOUT_TYPE])
        refuse([Fault(Place(file), f"{within}model_type", f"{kind!r} is not supported; it must be one of {known}")])
    wrong = [(key if key == part else within + key, message) for key, message in own_class.contradictions(config)]
    found = settings(config)
    theirs = rope.read(own, found["max_position_embeddings"])
    wrong += [(within + key, message) for key, message in (*_unsupported(own, found), *theirs.faults)]
    faults = [Fault(Place(file), key, message) for key, message in wrong]
    values = {key: _float(found[key]) if key in _FLOATS else found[key] for key in _SAME}
    if values["num_experts_per_tok"] is None and "num_experts_per_tok" not in own:
        faults.append(
            Fault(Place(file), f"{within}num_experts_per_tok", "missing, and a deepseek_v2 has no default for it")
        )
        values["num_experts_per_tok"] = 1
    if all(type(found[key]) is int for key in ("first_k_dense_replace", "num_hidden_layers")):
        values["first_k_dense_replace"] = min(found["first_k_dense_replace"], found["num_hidden_layers"])
    values["rope_theta"] = _float(theirs.theta)
    values["rope_scaling"] = theirs.scaling and {
        key: value if key == "original_max_position_embeddings" else _float(value)
        for key, value in theirs.scaling.items()
    }
    try:
        checked = _Keys.model_validate({"model": values}).model
    except ValidationError as error:
        refuse([*faults, *_faults_of(error, values, within, theirs.key, file)])
    if faults:
        refuse(faults)
    return values, checked


def _faults_of(
    error: ValidationError, values: dict[str, Any], within: str, rope_key: str, file: str
) -> Iterator[Fault]:
    """The schema's faults, under the keys of `config.json`."""
    root = _node({"model": values}, Place(file))
    for fault in faults_of(error, root):
        key = fault.key.removeprefix("model.")
        yield Fault(fault.place, within + key.replace("rope_scaling", rope_key, 1), fault.message)


def _node(value: Any, place: Place) -> Node:
    inside = isinstance(value, dict)
    return Node({key: _node(part, place) for key, part in value.items()} if inside else value, place)


def _float(value: Any) -> Any:
    """An integer as a float; all else as it is, for the schema to judge."""
    return float(value) if type(value) is int and abs(value) < 1 << 64 else value


_FLOATS = ("routed_scaling_factor", "rms_norm_eps", "initializer_range")


def _unsupported(own: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) of what this project's model has not; `own` as it stands, `found` with the class's defaults."""
    kind = own_class.OWN_CLASS[own["model_type"]]
    for key, allowed in (_ONLY | _SCORING[kind]).items():
        if found.get(key, allowed[0]) not in allowed:
            only = " or ".join(repr(value) for value in allowed if value is not None)
            yield key, f"{found[key]!r} is not supported; of a {kind} this model has only {only}"
    if kind == "deepseek_v2" and found["topk_method"] == "group_limited_greedy" and found["n_group"] != 1:
        yield (
            "topk_method",
            "'group_limited_greedy' is not supported unless all groups are taken (topk_group is n_group)",
        )
    if found["num_experts_per_tok"] == 1 and found["scoring_func"] == "sigmoid":
        yield "num_experts_per_tok", "1 is not supported: implementations differ on a single expert's gate"
    yield from _derived(own, found, kind)
    longest = found["max_position_embeddings"]
    if longest is not None and type(longest) is not int:
        yield "max_position_embeddings", f"must be an integer, got {_show(longest)}"
    quantisation = own.get("quantization_config")
    if quantisation is not None and not isinstance(quantisation, dict):
        yield "quantization_config", f"must be an object or null, got {_show(quantisation)}"
    elif quantisation and (
        quantisation.get("quant_method") != "fp8"
        or quantisation.get("fmt", "e4m3") != "e4m3"
        or quantisation.get("weight_block_size") != [128, 128]
    ):
        names = ("quant_method", "quant_algo", "format", "fmt", "weight_block_size")
        said = ", ".join(f"{name} {_show(quantisation[name])}" for name in names if name in quantisation)
        yield "quantization_config", f"{said or 'no quant_method'} is not supported; {_READABLE}"


def _derived(own: dict[str, Any], found: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    """Keys that say again what others say."""
    heads, nope, turned = (found[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    if own.get("num_key_value_heads") not in (None, heads):
        yield "num_key_value_heads", f"{own['num_key_value_heads']} of {heads} heads is not supported; MLA has all"
    # transformers' deepseek_v2 does not look at it.
    if kind == "deepseek_v3" and own.get("head_dim") not in (None, turned):
        yield "head_dim", f"{own['head_dim']}, but qk_rope_head_dim is {turned}, which it stands for here; remove it"
    both_ints = type(nope) is int and type(turned) is int
    if both_ints and own.get("qk_head_dim") not in (None, nope + turned):
        yield (
            "qk_head_dim",
            f"{own['qk_head_dim']}, but qk_nope_head_dim + qk_rope_head_dim is {nope + turned}; remove it",
        )


def derive(config: dict[str, Any], name: str, mtp: int, main_dtype: str) -> dict[str, Any]:
    """Plain values of a recipe for the model of `config.json` with `mtp` MTP modules: a place to start from."""
    model = {**model_of(config, "config.json"), "num_nextn_predict_layers": mtp}
    schedule = {**_STARTING_POINT["schedule"], "mtp_weight": 0.1 if mtp else 0.0}
    length = min(settings(config)["max_position_embeddings"] or _LONGEST_SEQUENCE, _LONGEST_SEQUENCE)
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
