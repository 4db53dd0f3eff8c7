"""The language model within a vision-language directory: its part of `config.json`, and its tensors' prefix.

Kimi-VL and Kimi-K2.5 have DeepSeek-V3's configuration as `text_config` and its names behind `language_model.`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PREFIX = "language_model."
KEY = "text_config"
_KIND = "deepseek_v3"
"""The class of Kimi-VL's `text_config`, which has no `model_type` in its published file."""
_SHARED = ("quantization_config",)
"""Keys that stand beside `text_config` and hold for it."""


def part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's configuration: `config` itself where there is no other model in it."""
    text = config.get(KEY)
    if not isinstance(text, dict):
        return config
    return {"model_type": _KIND, **{key: config[key] for key in _SHARED if key in config}, **text}


def whole(config: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`config` with its language model's part changed: what `part` took from elsewhere stays there."""
    text = config.get(KEY)
    if not isinstance(text, dict):
        return changed
    inside = {key: value for key, value in changed.items() if key not in _SHARED or key in text or key not in config}
    if "model_type" not in text:
        inside.pop("model_type", None)
    above = {key: value for key, value in config.items() if key not in _SHARED or key in changed}
    return {**above, KEY: inside}


def prefix(config: dict[str, Any], names: Iterable[str]) -> str:
    """What stands before the names of the language model's tensors."""
    inside = isinstance(config.get(KEY), dict) and any(name.startswith(PREFIX) for name in names)
    return PREFIX if inside else ""
