"""The language model within a vision-language directory: its part of `config.json`, and its tensors' prefix.

Kimi-VL and Kimi-K2.5 have DeepSeek-V3's configuration as `text_config` and its names behind `language_model.`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PREFIX = "language_model."
KEY = "text_config"
WITHOUT_TYPE, _KIND = "kimi_vl", "deepseek_v3"
"""Whose `text_config` has no `model_type`, and the class that its own code reads it with."""
_SHARED = ("quantization_config",)
"""Keys that stand beside `text_config` and hold for it."""


def key(config: dict[str, Any]) -> str | None:
    """The key below which the language model's settings are; None: they are at the top."""
    return KEY if isinstance(config.get(KEY), dict) or config.get("model_type") == WITHOUT_TYPE else None


def part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's keys as they stand, with the type of its class: `config` itself where it is alone.

    A part has no part of its own: taken from one, it is the same. Where `text_config` is no object, its keys are none.
    """
    if key(config) is None:
        return config
    text = config.get(KEY)
    own = dict(text) if isinstance(text, dict) else {}
    if config.get("model_type") == WITHOUT_TYPE:
        own.setdefault("model_type", _KIND)
    shared = {name: config[name] for name in _SHARED if name in config and own.get(name) is None}
    return own | shared


def whole(config: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`config` with its language model's part changed: what `part` took from elsewhere stays there.

    A dtype beside it follows: transformers loads all parts in that one.
    """
    text = config.get(KEY)
    if not isinstance(text, dict):
        return changed
    above = {name for name in _SHARED if name in config and text.get(name) is None}
    inside = {name: value for name, value in changed.items() if name not in above}
    if "model_type" not in text:
        inside.pop("model_type", None)
    dtype = changed.get("dtype") or changed.get("torch_dtype")
    beside = {name: dtype if name in ("dtype", "torch_dtype") else value for name, value in config.items()}
    beside |= {name: changed[name] for name in above if name in changed} | {KEY: inside}
    return {name: value for name, value in beside.items() if name not in above or name in changed}


def prefix(config: dict[str, Any], names: Iterable[str]) -> str:
    """What stands before the names of the language model's tensors."""
    inside = key(config) is not None and any(name.startswith(PREFIX) for name in names)
    return PREFIX if inside else ""
