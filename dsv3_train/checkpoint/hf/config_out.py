"""A recipe's model as `config.json`: made anew, or the one that it came from with what has changed since.

What is written here transformers 4 and 5 read alike: RoPE stands in `rope_theta` and `rope_scaling`, which both know.
"""

from __future__ import annotations

from typing import Any

from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf import language, own_class, rope
from dsv3_train.recipe.faults import Fault, Place, refuse
from dsv3_train.recipe.schema import Model

_APART = ("rope_theta", "rope_scaling", "initializer_range", "num_nextn_predict_layers", "scoring_func")
"""Keys of a recipe that are not written for being absent, or changed."""
_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def refuse_unwritable(model: Model, file: str) -> None:
    """Refuse a model that no `config.json` can say.

    Raises:
        UserError: naming the key of the recipe `file`.
    """
    if model.rope_scaling and rope.zero_mscale(model.rope_scaling.mscale, model.rope_scaling.mscale_all_dim):
        refuse([Fault(Place(file), "model.rope_scaling", rope.ZERO_MSCALE)])


def config_of(model: Model, mtp: int, sequence_length: int, eos_id: int | None = None) -> dict[str, Any]:
    """A `config.json` for a model that did not come from one.

    Args:
        eos_id: the end-of-document token, with which generation begins too; None: not known, left out.
    """
    values = model.model_dump()
    del values["rope_scaling"], values["rope_theta"]
    softmax = model.scoring_func == "softmax"
    scaling = _scaling(model)
    return {
        "architectures": ["DeepseekV2ForCausalLM" if softmax else "DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({} if eos_id is None else {"bos_token_id": eos_id, "eos_token_id": eos_id}),
        "hidden_act": "silu",
        "max_position_embeddings": _longest(scaling) if scaling else sequence_length,
        "model_type": "deepseek_v2" if softmax else "deepseek_v3",
        "moe_layer_freq": 1,
        "norm_topk_prob": not softmax,
        "num_key_value_heads": model.num_attention_heads,
        "rope_scaling": scaling,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "topk_method": "greedy" if softmax else "noaux_tc",
        "use_cache": True,
        **values,
        "num_nextn_predict_layers": mtp,
    }


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config.json` for files of `dtype` (fp8, bf16, fp32): `quantization_config` exactly with FP8."""
    changed = {"torch_dtype": None, **config} if "dtype" not in config else dict(config)
    changed |= dict.fromkeys(changed.keys() & {"dtype", "torch_dtype"}, "float32" if dtype == "fp32" else "bfloat16")
    if dtype == "fp8":
        changed["quantization_config"] = config.get("quantization_config") or _FP8
    else:
        changed.pop("quantization_config", None)
    return changed


def updated(config: dict[str, Any], model: Model, mtp: int | None, dtype: str) -> dict[str, Any]:
    """`config` for a model that a recipe may have changed since, in files of `dtype`; what still holds stays as it is.

    Args:
        mtp: MTP modules to say; None: what `config` says of them stays.
    """
    own = language.part(config)
    return language.whole(config, with_dtype(_updated(own, model, mtp), dtype))


def _updated(own: dict[str, Any], model: Model, mtp: int | None) -> dict[str, Any]:
    """The language model's keys, `own`, with what differs from them in `model`, and with what they leave to defaults.

    Those of the versions of transformers and of DeepSeek's own code differ, and not all know all names of a key.
    """
    theirs = configs.model(own, "config.json")
    changed = {
        name: value
        for name, value in model.model_dump().items()
        if name not in _APART and (name not in own or value != getattr(theirs, name))
    }
    if mtp is not None:
        changed["num_nextn_predict_layers"] = mtp
    kind = own_class.OWN_CLASS[own["model_type"]]
    others = {other: name for other, name in own_class.OTHER_NAMES[kind].items() if other in own and name in changed}
    result = own | changed | {other: changed[name] for other, name in others.items()}
    same = (model.rope_theta, model.rope_scaling) == (theirs.rope_theta, theirs.rope_scaling)
    return result if same and rope.known_to_all(own) else result | _rope(own, model, theirs)


def _rope(own: dict[str, Any], model: Model, theirs: Model) -> dict[str, Any]:
    """The keys of RoPE, alike in all places that `own` has."""
    scaling = _scaling(model)
    found = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    if own.get("rope_parameters"):
        kind = {"rope_type": "yarn", **scaling} if scaling else {"rope_type": "default"}
        found["rope_parameters"] = {"rope_theta": model.rope_theta, **kind}
    if scaling and model.rope_scaling != theirs.rope_scaling:
        found["max_position_embeddings"] = _longest(scaling)
    if scaling and "original_max_position_embeddings" in own:
        found["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return found


def _scaling(model: Model) -> dict[str, Any] | None:
    """`rope_scaling` under the names of the published files; None: plain RoPE."""
    if model.rope_scaling is None:
        return None
    scaling = {"type": "yarn", **model.rope_scaling.model_dump()}
    if (scaling["mscale"], scaling["mscale_all_dim"]) == rope.NO_MSCALE:
        del scaling["mscale"], scaling["mscale_all_dim"]
    return scaling


def _longest(scaling: dict[str, Any]) -> int:
    return int(scaling["factor"] * scaling["original_max_position_embeddings"])
