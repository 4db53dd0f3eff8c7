"""Which layers lie on which stage of the pipeline, in Megatron-core's notation.

E embedding, t decoder layer, m Multi-Token Prediction module, L output head and loss, | between stages, commas
ignored; `(..)*n` repeats a group, `x*n` one character.
"""

from __future__ import annotations

import re
from itertools import groupby

from dsv3_train.recipe.schema import Recipe

_GROUP = re.compile(r"\(([^)]+)\)\*(\d+)")
_SINGLE = re.compile(r"(.)\*(\d+)")
_LONGEST = 10_000  # letters; no model is that deep, and a repeat count must not fill the memory


def parse(layout: str) -> list[str]:
    """`Et|(tt|)*2mL` -> `['Et', 'tt', 'tt', 'mL']`.

    Raises:
        ValueError: the text is no layout; says where.
    """
    text = layout.replace(",", "")
    for pattern in (_GROUP, _SINGLE):
        length = sum(len(match[1]) * int(match[2][:9]) for match in pattern.finditer(text))
        if length + len(text) > _LONGEST:
            raise ValueError(f"{layout!r} repeats to more than {_LONGEST} layers")
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    strange = sorted(set(text) - set("EtmL|"))
    if strange:
        raise ValueError(
            f"{layout!r} has {' '.join(strange)!r} where only E, t, m, L, |, (..)*n and x*n can stand; "
            "for example 'Ett|(ttt|)*2tmL'"
        )
    return text.split("|")


def stages(recipe: Recipe) -> list[str]:
    """The layers of each stage, as `Etttt`, in the order in which a micro-batch meets them.

    Without `pipeline.layout` the decoder layers are spread evenly.

    Raises:
        ValueError: no such placement exists. Recipes that `load` read have one.
    """
    if recipe.pipeline.layout is not None:
        return parse(recipe.pipeline.layout)
    count = recipe.stage_count
    if recipe.model.num_hidden_layers % count:
        raise ValueError(
            f"{recipe.model.num_hidden_layers} layers do not spread evenly over {count} stages; "
            f"write a layout such as {suggestion(recipe)!r}"
        )
    return _spread(recipe)


def layout_string(recipe: Recipe) -> str:
    """The placement of every layer, explicitly: what Megatron-core's `pipeline_model_parallel_layout` takes.

    Raises:
        ValueError: as `stages`.
    """
    return "|".join(stages(recipe))


def suggestion(recipe: Recipe) -> str:
    """A layout that works for the recipe's layers and stages, short; the last stages get the fewer layers."""
    *first, last = _spread(recipe)
    text = ""
    for stage, same in groupby(first):
        repeat = len(list(same))
        text += f"({stage}|)*{repeat}" if repeat > 1 else f"{stage}|"
    return text + last


def _spread(recipe: Recipe) -> list[str]:
    """Decoder layers as evenly as they go; embedding first, MTP modules and head last."""
    count = recipe.stage_count
    each, more = divmod(recipe.model.num_hidden_layers, count)
    placed = ["t" * (each + (stage < more)) for stage in range(count)]
    placed[0] = "E" + placed[0]
    placed[-1] += "m" * recipe.model.num_nextn_predict_layers + "L"
    return placed
