"""RoPE's settings in `config.json`: where they stand, and what they come to.

The published files have `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters` with both in it, and
reads either; transformers 4 and DeepSeek's own code know the former alone. A setting that stands in one place is taken
from there. Of two that disagree that one is taken which transformers 5 and 4 both take, with a note; else they are
refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

NO_MSCALE = (1.0, 0.0)
"""`mscale` and `mscale_all_dim` where neither is given: all implementations scale cos and sin, and no softmax."""
ZERO_MSCALE = (
    "implementations differ on mscale or mscale_all_dim 0; set both above 0, or mscale 1 with mscale_all_dim 0"
)
_THETA = 10000.0
_PLAIN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_DEEPSEEKS_LENGTH = 4096
"""What DeepSeek's own code takes for `original_max_position_embeddings` if it is absent."""


@dataclass(frozen=True)
class Rope:
    """RoPE as the model's own class reads it."""

    theta: Any
    scaling: dict[str, Any] | None
    """A recipe's `rope_scaling`, None for plain RoPE; its numbers as they stand, for the schema to judge."""
    key: str
    """Where the settings are, `rope_scaling` or `rope_parameters`."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(key, message)"""
    notes: list[str] = field(default_factory=list)


def read(config: dict[str, Any], longest: Any) -> Rope:
    """RoPE of the language model's keys as they stand; faults are in the result, and its `scaling` is None then.

    Args:
        longest: `max_position_embeddings`, where it is absent its class's default.
    """
    key = "rope_parameters" if config.get("rope_parameters") and not config.get("rope_scaling") else "rope_scaling"
    faults = [
        (name, f"must be an object or null, got {json.dumps(config[name])}")
        for name in ("rope_parameters", "rope_scaling")
        if config.get(name) is not None and not isinstance(config[name], dict)
    ]
    if faults:
        return Rope(_THETA, None, key, faults)
    given = config.get(key) or {}
    rope = _said(given)
    notes = _ignored(config, rope) if key == "rope_scaling" else []
    theta = config.get("rope_theta", _THETA)
    inside = rope.get("rope_theta")
    if inside is not None:
        if config.get("rope_theta") not in (None, inside):
            faults.append(_two("rope_theta", theta, inside, key, "the latter", "the former"))
        theta = inside
    for name, place in (("partial_rotary_factor", config), (f"{key}.partial_rotary_factor", rope)):
        if place.get("partial_rotary_factor") not in (None, 1):
            faults.append((name, "is not supported; qk_rope_head_dim alone sets which dimensions RoPE rotates"))
    if any(isinstance(value, dict) for value in rope.values()):
        faults.append((key, "has settings for each kind of layer; this model's layers share one RoPE"))
        return Rope(theta, None, key, faults)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        faults.append((key, f"rope_type {rope['rope_type']!r} and type {rope['type']!r} disagree; keep the right one"))
    elif kind not in ("default", "yarn"):
        faults.append((key, f"type {kind!r} is not supported; it must be yarn, or null for plain RoPE"))
    elif kind == "default" and (rest := sorted(rope.keys() - _PLAIN)):
        faults.append((key, f"has {', '.join(rest)}, but no type; set rope_type yarn, or remove these for plain RoPE"))
    elif kind == "yarn":
        faults += _yarn_faults(config, key, given, longest)
    if faults or kind == "default":
        if key == "rope_parameters" and theta != config.get("rope_theta", _THETA):
            notes.append(_unread(key, "rope_theta"))
        return Rope(theta, None, key, faults, notes)
    if key == "rope_parameters":
        notes.append(_unread(key, "YaRN"))
    elif theta != config.get("rope_theta", _THETA):
        notes.append(_unread(key, "rope_theta"))
    return Rope(theta, _yarn(config, rope, longest, notes), key, faults, notes)


def known_to_all(config: dict[str, Any]) -> bool:
    """Whether RoPE's settings stand where transformers 4 and DeepSeek's own code look for them too."""
    inside = config.get("rope_scaling") or {}
    if "rope_theta" in inside or (config.get("rope_parameters") and not inside):
        return False
    top = config.get("original_max_position_embeddings")
    return top in (None, inside.get("original_max_position_embeddings"))


def zero_mscale(mscale: Any, mscale_all_dim: Any) -> bool:
    """Whether one of them is a zero that transformers takes for absent, and DeepSeek's own code for a factor of 1."""
    return 0 in (mscale, mscale_all_dim) and (mscale, mscale_all_dim) != NO_MSCALE


def _said(rope: dict[str, Any]) -> dict[str, Any]:
    """Without nulls, which every implementation takes as absent."""
    return {key: value for key, value in rope.items() if value is not None}


def _two(name: str, top: Any, inside: Any, key: str, five: str, four: str) -> tuple[str, str]:
    said = f"{json.dumps(top)} at the top level, but {json.dumps(inside)} in {key}"
    return name, f"{said}: transformers 5 reads {five}, transformers 4 reads {four}; keep the right one"


def _unread(key: str, what: str) -> str:
    return f"config.json has {what} only in {key}, where transformers before version 5 does not read it"


def _ignored(config: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    """Of `rope_parameters` beside `rope_scaling`, which transformers 5 and 4 both take."""
    other = _said(config.get("rope_parameters") or {})
    if not rope or not other:
        return []
    one, two = _comparable(rope, config), _comparable(other, config)
    keys = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
    if not keys:
        return []
    said = f"config.json: rope_scaling and rope_parameters disagree on {', '.join(keys)}"
    return [f"{said}: rope_scaling is used, as in transformers"]


def _comparable(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    settings = {"rope_theta": config.get("rope_theta", _THETA), **rope, "rope_type": kind}
    return {key: value for key, value in settings.items() if key != "type"}


def _yarn_faults(config: dict[str, Any], key: str, given: dict[str, Any], longest: Any) -> list[tuple[str, str]]:
    rope, faults = _said(given), []
    if not rope.get("factor"):
        faults.append((key, "yarn without a factor"))
    if "attention_factor" in rope or not given.get("truncate", True):
        faults.append((key, "attention_factor and truncate are not supported"))
    if rope.get("mscale") == 0 or zero_mscale(rope.get("mscale", 1.0), rope.get("mscale_all_dim", 1.0)):
        faults.append((key, ZERO_MSCALE))
    inside, top = (place.get("original_max_position_embeddings") for place in (rope, config))
    if None not in (inside, top) and inside != top:
        faults.append(_two("original_max_position_embeddings", top, inside, key, "the former", "the latter"))
    if not (inside or top or longest):
        faults.append(
            (key, "yarn without original_max_position_embeddings, and there is no max_position_embeddings either")
        )
    return faults


def _yarn(config: dict[str, Any], rope: dict[str, Any], longest: Any, notes: list[str]) -> dict[str, Any]:
    original = rope.get("original_max_position_embeddings")
    if not original:
        original = config.get("original_max_position_embeddings") or longest
        if config.get("original_max_position_embeddings"):
            notes.append(
                "config.json has original_max_position_embeddings beside rope_scaling, where transformers before 5 and "
                "DeepSeek's own code do not read it"
            )
        elif original != _DEEPSEEKS_LENGTH:
            said = "config.json: yarn without original_max_position_embeddings: max_position_embeddings"
            notes.append(
                f"{said} ({original}) is used, as in transformers; DeepSeek's own code takes {_DEEPSEEKS_LENGTH}"
            )
    mscale, mscale_all_dim = _mscales(rope, notes)
    return {
        "factor": rope["factor"],
        "original_max_position_embeddings": original,
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


def _mscales(rope: dict[str, Any], notes: list[str]) -> tuple[Any, Any]:
    """`mscale` and `mscale_all_dim` that scale cos, sin and softmax as transformers does, also where one is absent.

    transformers scales cos and sin by 0.1 ln(factor) + 1 unless both are given, and the softmax by `mscale_all_dim`.
    DeepSeek's own code takes 1 for an absent `mscale` and 0 for an absent `mscale_all_dim`.
    """
    mscale, mscale_all_dim, factor = rope.get("mscale"), rope.get("mscale_all_dim"), rope["factor"]
    if mscale is not None and mscale_all_dim is not None:
        return mscale, mscale_all_dim
    if mscale_all_dim in (None, 0):
        if mscale not in (None, 1):
            said = f"config.json has mscale {json.dumps(mscale)} without mscale_all_dim"
            notes.append(f"{said}: mscale 1 is used, as in transformers; DeepSeek's own code takes the given value")
        return NO_MSCALE
    numbers = all(isinstance(value, int | float) for value in (factor, mscale_all_dim))
    if not numbers or factor <= 1:
        return 1.0, mscale_all_dim
    log = 0.1 * math.log(factor)
    mscale = ((log + 1) * (log * mscale_all_dim + 1) - 1) / log
    said = f"config.json has mscale_all_dim without mscale: cos and sin are scaled by {log + 1:.4f}, as in transformers"
    notes.append(f"{said} (here as mscale {mscale:.4f}); DeepSeek's own code takes mscale 1")
    return mscale, mscale_all_dim
