"""`config.json` as the model's own class reads it: what stands for a key that is absent, and where a key may stand.

The class is transformers', by `model_type`; 5.24 and 4.57 agree on every default below but for `vocab_size` of
deepseek_v2 (4.57: 32000), which the shape of the embedding decides. docs/config_json.md has the table of all keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dsv3_train.checkpoint.hf import language

OWN_CLASS = {
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "deepseek_v2": "deepseek_v2",
}
"""Whose layers are DeepSeek-V3's, or a part of them, and the class that reads them: transformers 5.24 reads a kimi_k2
within Kimi-K2.5 as a deepseek_v3."""

_BOTH: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_ABSENT: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_BOTH,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",  # these two by DeepSeek's own class; transformers' has nothing else
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 4096,
        "rope_interleave": True,
    },
    "deepseek_v2": {
        **_BOTH,
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": None,
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,  # no class of it has the key
        "max_position_embeddings": 2048,
        "mlp_bias": False,
    },
}
"""transformers 5.24, configuration_deepseek_v3.py and configuration_deepseek_v2.py."""
OTHER_NAMES = {
    "deepseek_v3": {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    "deepseek_v2": {"num_experts": "n_routed_experts"},
}
"""transformers 5 reads these too (`attribute_map`); 4.57 and DeepSeek's own code do not know them."""
_NULL_IS_NONE = ("n_shared_experts", "num_nextn_predict_layers")
"""Where null means 0: DeepSeek's own code has no shared experts then; transformers fails."""


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's keys, those absent as its class takes them, under one name each.

    A null stays null, for which no class takes a default, but for keys that transformers does not look at, and for
    `n_shared_experts` and `num_nextn_predict_layers`.
    `config` is of a type in `OWN_CLASS`.
    """
    own = language.part(config)
    kind = OWN_CLASS[own["model_type"]]
    found = {**_ABSENT[kind], **own}
    for other, key in OTHER_NAMES[kind].items():
        if key not in own and other in own:
            found[key] = own[other]
    ignored = ("scoring_func", "topk_method") if kind == "deepseek_v3" else ("scoring_func",)
    found |= {key: _ABSENT[kind][key] for key in ignored if found[key] is None}
    all_groups = found["n_group"] is not None and found["n_group"] == found["topk_group"]
    if kind == "deepseek_v2" and (
        found["topk_method"] == "greedy" or (found["topk_method"] == "group_limited_greedy" and all_groups)
    ):
        found |= {"n_group": 1, "topk_group": 1}  # groups decide nothing then
    return found | {key: 0 for key in _NULL_IS_NONE if found[key] is None}


def says(config: dict[str, Any], key: str) -> bool:
    """Whether the key is there itself, under any of its names."""
    own = language.part(config)
    names = OTHER_NAMES[OWN_CLASS[own["model_type"]]]
    return key in own or any(other in own for other, name in names.items() if name == key)


def contradictions(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) of every setting but RoPE's that stands in two places with two values."""
    own, key = language.part(config), language.key(config)
    if key is not None and not isinstance(config.get(key), dict):
        yield key, f"must be an object with the language model's settings, got {json.dumps(config.get(key))}"
        return
    kind = OWN_CLASS[own["model_type"]]
    for other, name in OTHER_NAMES[kind].items():
        if name in own and other in own and own[name] != own[other]:
            yield (
                name,
                f"{json.dumps(own[name])}, but {other}, which means the same, is {json.dumps(own[other])}: "
                f"transformers 5 reads {other}, transformers 4 reads {name}; keep the right one",
            )
    for name in sorted(_ABSENT[kind].keys() & config.keys() & own.keys()) if key is not None else ():
        if config[name] != own[name]:
            yield name, f"{json.dumps(own[name])} in {key}, but {json.dumps(config[name])} beside it; make them alike"


def notes(config: dict[str, Any]) -> list[str]:
    """What of the settings other than RoPE's another reader may take otherwise, one line each."""
    found = []
    for one in (config,) if language.key(config) is None else (config, language.part(config)):
        both = one.get("dtype"), one.get("torch_dtype")
        if None not in both and both[0] != both[1]:
            said = f"config.json has dtype {both[0]} and torch_dtype {both[1]}"
            found.append(f"{said}: transformers takes dtype; from-hf keeps each weight in its stored type")
    own = language.part(config)
    for other, name in OTHER_NAMES[OWN_CLASS[own["model_type"]]].items():
        if other in own and name not in own:
            found.append(f"config.json has {name} as {other} alone, which transformers before 5 does not read")
    return found
