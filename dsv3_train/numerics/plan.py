"""Which runs a comparison from scratch needs: one per variant of the precision, and the baseline's other seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dsv3_train.errors import UserError
from dsv3_train.numerics.comparable import LEAST_STEPS, differences
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import NO_FP8, Precision, Recipe

BASELINE = "none"


@dataclass(frozen=True)
class Planned:
    """A run that is trained, unless it was."""

    run_dir: Path
    ref: str
    overrides: list[str]
    recipe: Recipe
    seed: bool
    """Another seed of the baseline."""

    @property
    def log(self) -> Path:
        """What its `dsv3 train` prints."""
        return self.run_dir.with_name(self.run_dir.name + ".log")

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        try:
            return (self.run_dir / "state").read_text(encoding="utf-8").strip() == "finished"
        except OSError:
            return False


def plan(
    ref: str, overrides: Sequence[str], variants: Sequence[str], seeds: int, out: Path, paired: bool = False
) -> list[Planned]:
    """The runs of a comparison: the baseline first, then the variants, then the other seeds.

    Args:
        variants: each a value of precision.fp8, `+a.b=c` for what else differs (`blockwise+power_of_2_scales=false`:
            keys of `precision` go without it); `none`, the baseline, is there anyhow.
        seeds: of the baseline, its own among them. Runs that begin at a checkpoint (checkpoint.load) differ in the
            order of their data too.
        paired: the variants are trained with all of them too.

    Raises:
        UserError: a recipe is at fault, or a run of another training is in its place.
    """
    names = list(dict.fromkeys([BASELINE, *variants]))
    if len(names) == 1 and seeds == 1:
        raise UserError("--variants: nothing to compare with the baseline; add one, as emulated or blockwise")
    planned = [_planned(out, name, ref, [*overrides, *_overrides(name)]) for name in names]
    recipe = planned[0].recipe
    if (steps := Schedules(recipe).total_steps) < LEAST_STEPS:
        raise UserError(f"training.duration: {steps} steps, and a comparison takes {LEAST_STEPS}; train longer")
    first = recipe.training.seed
    for seed in range(first + 1, first + seeds):
        seeded = [f"training.seed={seed}"]
        if recipe.checkpoint.load:  # weights are those of the checkpoint, whatever training.seed
            seeded.append(f"data.seed={recipe.data.seed + seed - first}")
        for name in names if paired else names[:1]:
            own = [*overrides, *_overrides(name), *seeded]
            planned.append(_planned(out, f"{name}-seed{seed}", ref, own, seed=name == BASELINE))
    return planned


def is_variant(word: str) -> bool:
    """Whether a word names a variant, rather than an override of all of them."""
    key, equals, _ = word.split("+")[0].partition("=")
    return not equals or key in ("fp8", "precision.fp8")


def _overrides(variant: str) -> list[str]:
    """Of a variant's name."""
    first, *more = variant.split("+")
    name = first.removeprefix("fp8=").removeprefix("precision.fp8=")
    known = get_args(Precision.model_fields["fp8"].annotation)
    if name not in known:
        raise UserError(f"--variants: {first!r} is no precision.fp8; there are {', '.join(known)}")
    within = [part if "." in part.partition("=")[0] else f"precision.{part}" for part in more]
    return [*(NO_FP8 if name == BASELINE else [f"precision.fp8={name}"]), *within]


def _planned(out: Path, name: str, ref: str, overrides: list[str], *, seed: bool = False) -> Planned:
    run_dir = out / re.sub(r"[^A-Za-z0-9.+=_-]+", "_", name.removeprefix("precision.").removeprefix("fp8="))
    braced = str(run_dir).replace("{", "{{").replace("}", "}}")  # run_dir is a format of the recipe's name
    all_overrides = [*overrides, f"runtime.run_dir={json.dumps(braced)}"]
    planned = Planned(run_dir, ref, all_overrides, load(ref, all_overrides), seed)
    if (run_dir / "recipe.yaml").is_file():
        for key, before, now in differences(load(str(run_dir / "recipe.yaml")), planned.recipe):
            raise UserError(
                f"{run_dir}: holds a run with {key} {before!r}, not {now!r}; set another --out, or remove it"
            )
    return planned
