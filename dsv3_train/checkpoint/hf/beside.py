"""What published directories hold beside a model's weights: nothing in it is trained, and all of it goes back.

Kimi-K2, Kimi-VL and Moonlight have RoPE's frequencies in each layer (as BF16 in Kimi-K2: of no use); files for
inference engines have scales of the KV cache; vision-language models a vision tower and a projector; some models
MTP modules that their config.json does not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")
MTP = "of MTP that config.json does not count"
VISION = "of the vision tower and its projector"
_PATTERNS = {
    "frequencies of RoPE (rotary_emb)": re.compile(
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    ),
    # As vLLM, TensorRT's ModelOpt and compressed-tensors name them.
    "scales of the KV cache": re.compile(r"model\.layers\.\d+\.self_attn\.(\w+\.)?(q|k|v|kv|prob)_scale"),
}
_VISION = re.compile(r"(vision_tower|vision_model|vision|visual|mm_projector|multi_modal_projector|projector)\..+")
"""Only of a directory with a language model in it."""


def found(names: Iterable[str], main_layers: int, declared_mtp: int, with_vision: bool) -> dict[str, str]:
    """Which of a directory's tensors are known to be no weights of the model: name -> what it is.

    Args:
        main_layers: `num_hidden_layers` of config.json.
        declared_mtp: MTP modules that config.json counts; their tensors are not among what is found.
        with_vision: the directory is a vision-language model's.
    """
    names = list(names)
    layers = undeclared_layers(names, main_layers + declared_mtp)
    kinds = {}
    for name in names:
        layer = LAYER.match(name)
        if layer and int(layer[1]) in layers:
            kinds[name] = MTP
        elif with_vision and _VISION.fullmatch(name):
            kinds[name] = VISION
        else:
            kinds.update((name, kind) for kind, pattern in _PATTERNS.items() if pattern.fullmatch(name))
    return kinds


def undeclared_layers(names: Iterable[str], counted: int) -> set[int]:
    """Layers beyond those that config.json counts which are MTP modules: they have its projection."""
    layers = {int(match[1]) for name in names if (match := LAYER.match(name)) and name.endswith(".eh_proj.weight")}
    return {layer for layer in layers if layer >= counted}


def told(kinds: Mapping[str, str]) -> list[str]:
    """One line of what is left out, by number; none where nothing is."""
    counts = Counter(kinds.values())
    if not counts:
        return []
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return [f"left out, because these tensors are not weights of this model: {listed}; hf/ keeps them for to-hf"]
