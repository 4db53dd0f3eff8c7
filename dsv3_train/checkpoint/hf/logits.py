"""Logits of two sets of weights on the same tokens: by this project's model, Hugging Face's files by transformers."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import psutil
import torch

from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf import own_class
from dsv3_train.checkpoint.hf.names import weights
from dsv3_train.checkpoint.hf.sides import Side
from dsv3_train.checkpoint.hf.verify import Weights
from dsv3_train.errors import UserError
from dsv3_train.recipe import load as recipes
from dsv3_train.recipe.schema import Model, Recipe
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch

TOKENS = 32
"""Of the one sequence that is compared."""
_ONE_PROCESS = [
    "parallel={world_size: 1, zero1: false}",
    "pipeline={}",
    "precision={params: fp32, adam_moments: fp32}",
    "model.num_nextn_predict_layers=0",
    "schedule.mtp_weight=0",
    "training.recompute=[]",
    "runtime.device=cpu",
]


def compare_logits(a: Weights, b: Weights) -> dict[str, Any]:
    """`max_abs_difference` and `relative_difference` (norm of the difference over A's) of FP32 logits on random tokens.

    Hugging Face's files are run by transformers where that is installed and knows the model, so that our model is
    held against another implementation; `by` says what ran each. Both are on the CPU, in this process, one at a time.

    Raises:
        UserError: the model does not fit this machine's memory, or there is a GPU that this process sees.
    """
    needed = 4 * sum(weight.values for weight in weights(a.model, 0)) * 2
    if needed > (free := psutil.virtual_memory().available):
        raise UserError(f"logits: would take {needed:,} bytes of memory, and {free:,} are free; leave --logits out")
    generator = torch.Generator().manual_seed(0)
    tokens_1s = torch.randint(0, a.model.vocab_size, (1, TOKENS), generator=generator)
    found, by = [], []
    for side in (a, b):
        reference = _transformers(side)
        by.append("transformers" if reference else "dsv3-train")
        found.append(reference(tokens_1s) if reference else _ours(side, tokens_1s))
    difference = found[0] - found[1]
    return {
        "max_abs_difference": float(difference.abs().max()),
        "relative_difference": float(difference.norm() / found[0].norm()),
        "tokens": TOKENS,
        "by": by,
    }


def _ours(side: Weights, tokens_1s: torch.Tensor) -> torch.Tensor:
    """[1, s] tokens -> [1, s, vocabulary] of this project's model."""
    # Nothing here needs a GPU, and a CPU run refuses to see one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    distributed.prepare_import("cpu")
    recipe = _recipe(side)
    logits: list[torch.Tensor] = []
    launch(lambda: logits.append(_forward(recipe, side, tokens_1s)), 1, "cpu")
    return logits[0]


def _recipe(side: Weights) -> Recipe:
    if side.directory is not None:
        plain = configs.derive(side.directory.config, "verify", 0, "F32")
        return recipes.build(plain, str(side.path / "config.json"), _ONE_PROCESS)
    return recipes.load(str(side.path.parent.parent / "recipe.yaml"), _ONE_PROCESS)


@torch.no_grad()
def _forward(recipe: Recipe, side: Weights, tokens_1s: torch.Tensor) -> torch.Tensor:
    from dsv3_train.checkpoint.hf.fill import fill
    from dsv3_train.model.build import build_chunks
    from dsv3_train.model.config import megatron_config

    distributed.start(recipe, "cpu")
    try:
        model = build_chunks(recipe, megatron_config(recipe, "cpu"))[0].eval()
        fill([model], side.tensors.values())
        return model(tokens_1s, torch.arange(tokens_1s.size(1))[None], None).float()
    finally:
        distributed.stop()


def _transformers(side: Weights) -> Any:
    """A function as `_ours` by transformers; None: it is not installed, or has no such model."""
    if side.directory is None or importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    own = side.directory.config
    config = {key: value for key, value in own.items() if key != "quantization_config" and value is not None}
    # Absent, the heads of keys are 128 to a deepseek_v3; and what a null of these means, its strict types do not take.
    config |= {"num_key_value_heads": side.model.num_attention_heads, "n_shared_experts": side.model.n_shared_experts}
    config |= {"q_lora_rank": side.model.q_lora_rank}
    name = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2"}[own_class.OWN_CLASS[own["model_type"]]]
    if not hasattr(transformers, f"{name}ForCausalLM"):
        return None
    settings = getattr(transformers, f"{name}Config").from_dict(config)
    settings._attn_implementation = "eager"
    # Built and filled by hand: `from_pretrained` builds on the meta device, which the patches for Megatron upset.
    model = getattr(transformers, f"{name}ForCausalLM")(settings).float().eval()
    if not _scales_softmax(model, side.model):
        return None
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            _put(side.tensors, key, tensor)

    def logits(tokens_1s: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens_1s).logits.float()

    return logits


def _scales_softmax(model: Any, ours: Model) -> bool:
    """Whether transformers' model has YaRN's softmax scale: DeepseekV2 of 4.57 leaves it out, of 5.24 not."""
    scaling = ours.rope_scaling
    mscale = 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1 if scaling else 1.0
    expected = (ours.qk_nope_head_dim + ours.qk_rope_head_dim) ** -0.5 * mscale**2
    return math.isclose(model.model.layers[0].self_attn.scaling, expected, rel_tol=1e-6)


def _put(tensors: dict[str, Side], key: str, tensor: torch.Tensor) -> None:
    """Fill a tensor of transformers' model; from version 5 on it has a layer's experts in one.

    Without shared experts its model has some of width 0, which no file holds.
    """
    if not tensor.numel():
        return
    layer, fused, part = key.partition(".experts.")
    if fused and part in ("gate_up_proj", "down_proj"):
        names = ("down",) if part == "down_proj" else ("gate", "up")
        for expert, values in enumerate(tensor):
            rows = [_whole(tensors[f"{layer}.experts.{expert}.{name}_proj.weight"]) for name in names]
            values.copy_(torch.cat(rows))
    else:
        tensor.copy_(_whole(tensors[key]))


def _whole(side: Side) -> torch.Tensor:
    return side.rows(0, side.weight.shape[0]).float()
