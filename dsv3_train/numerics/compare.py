"""Training losses of runs against a baseline: relative difference over the last half, beside that of other seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_train.errors import UserError
from dsv3_train.numerics.comparable import LEAST_STEPS, notes, refuse_changed, refuse_other_training, same_seeds
from dsv3_train.numerics.series import Series, read
from dsv3_train.recipe.load import diff

FORMAT = 1
BOUND = 0.0025
"""The report's: relative loss error of FP8 against BF16 consistently below 0.25% (section 3.3)."""
EMA = 0.9
"""The report's smoothing of that comparison: exponential moving average of this coefficient (figure 10)."""


@dataclass(frozen=True)
class Curve:
    """A run on the steps that all have, for drawing. Arrays [n], float64."""

    label: str
    loss_n: np.ndarray
    smooth_loss_n: np.ndarray
    smooth_grad_norm_n: np.ndarray
    difference_n: np.ndarray
    """(run - baseline) / baseline, step by step; of the baseline itself 0."""
    smooth_difference_n: np.ndarray
    """The same of the smoothed losses."""
    smooth_mtp_difference_n: np.ndarray | None


@dataclass(frozen=True)
class Curves:
    """What the picture shows."""

    tokens_n: np.ndarray
    half: int
    """Index of the first step of the last half."""
    bound: float
    baseline: Curve
    runs: list[Curve] = field(default_factory=list)
    seeds: list[Curve] = field(default_factory=list)


def smooth(x_n: np.ndarray, window: int | None) -> np.ndarray:
    """Of each step, the mean of the last `window` ones (NaN before there are so many, or where one of them is NaN);
    None: the report's moving average, which begins at the first value and stays where it is at a NaN.
    """
    if window is not None:
        # A window is the end of a block of as many steps and the beginning of the next: sums of nothing outside it.
        blocks_bw = np.pad(x_n, (0, -len(x_n) % window)).reshape(-1, window)
        ends_n = np.cumsum(blocks_bw[:, ::-1], axis=1)[:, ::-1].ravel()
        beginnings_n = np.cumsum(blocks_bw, axis=1).ravel()
        starts = np.arange(len(x_n) - window + 1)
        sums = ends_n[starts] + np.where(starts % window == 0, 0.0, beginnings_n[starts + window - 1])
        return np.concatenate([np.full(len(x_n) - len(sums), np.nan), sums / window])
    out = np.empty_like(x_n)
    state = np.nan
    for i, x in enumerate(x_n.tolist()):
        if not np.isnan(x):
            state = x if np.isnan(state) else EMA * state + (1 - EMA) * x
        out[i] = state
    return out


def compare(
    baseline_dir: Path,
    run_dirs: Sequence[Path],
    seed_dirs: Sequence[Path] = (),
    *,
    window: int | None = None,
    bound: float = BOUND,
) -> tuple[dict[str, Any], Curves]:
    """Figures for JSON and the table, and curves for the picture, of runs against the baseline.

    A run of another seed stands against the one of `seed_dirs` that has it.

    Steps are those that every run has with a finite loss. The last half: of n such steps, those after the first n // 2.

    Args:
        seed_dirs: runs that differ from the baseline in their seeds alone.
        window: see `smooth`.
        bound: of the relative difference, 0.0025 for 0.25%.

    Raises:
        UserError: a directory is no run, runs do not compare, or there are too few steps.
    """
    directories = [baseline_dir, *run_dirs, *seed_dirs]
    for number, path in enumerate(directories):
        if path.resolve() in [known.resolve() for known in directories[:number]]:
            raise UserError(f"{path}: given twice; a run compares with others")
    everything = [read(path) for path in directories]
    baseline, runs, seeds = everything[0], everything[1 : 1 + len(run_dirs)], everything[1 + len(run_dirs) :]
    for series in everything:
        refuse_changed(series)
    for series in seeds:
        refuse_other_training(baseline, series, seed=True)
    against = {series.run_dir: _of_its_seed(series, baseline, seeds) for series in runs}
    for series in runs:
        refuse_other_training(against[series.run_dir], series, seed=False)
    for series in (baseline, *seeds):
        if series.not_finite:
            raise UserError(
                f"{series.run_dir / 'metrics.jsonl'}: the loss of step {series.not_finite[0]} is not finite; "
                "nothing compares with that"
            )
    steps_n = _common_steps(everything)
    half = len(steps_n) // 2
    if window is not None and not 1 <= window <= half + 1:
        raise UserError(f"--window: {window} steps, and {len(steps_n)} are compared; set 1 to {half + 1}")
    labels = _labels(everything)
    pairs = [
        _Pair(against.get(series.run_dir, baseline), series, steps_n, window, labels[series.run_dir])
        for series in everything
    ]
    own, of_runs, of_seeds = pairs[0], pairs[1 : 1 + len(runs)], pairs[1 + len(runs) :]
    spread = _spread(own, of_seeds) if seeds else None
    figures = {
        "format": FORMAT,
        "smoothing": f"mean of the last {window} steps" if window else f"exponential moving average, {EMA}",
        "bound": bound,
        "steps": {
            "compared": len(steps_n),
            "first": int(steps_n[0]),
            "last": int(steps_n[-1]),
            "last_half_from": int(steps_n[half]),
        },
        "consumed_tokens": int(own.tokens_n[-1]),
        "baseline": {**own.facts(), "origin": baseline.origin},
        "runs": [_with_verdict(pair, bound) for pair in of_runs],
        "seeds": [pair.figures() for pair in of_seeds],
        "spread": spread,
        "over_seeds": _over_seeds(of_runs),
    }
    curves = [pair.curve() for pair in pairs]
    return figures, Curves(own.tokens_n, half, bound, curves[0], curves[1 : 1 + len(runs)], curves[1 + len(runs) :])


def _of_its_seed(run: Series, baseline: Series, seeds: list[Series]) -> Series:
    """What a run is compared with; the baseline where no other has its seeds."""
    return next((one for one in (baseline, *seeds) if same_seeds(one.recipe, run.recipe)), baseline)


def _over_seeds(runs: list[_Pair]) -> list[dict[str, Any]]:
    """Of runs that differ from their baselines in the same settings, each with a seed of its own: the mean of their
    mean smoothed differences, and its standard error. One seed's difference is chance to the extent that seeds differ;
    this is what is left of it.
    """
    found: dict[str, dict[str, _Pair]] = {}
    for pair in runs:
        alike = found.setdefault(json.dumps(pair.differs()), {})
        alike.setdefault(str(pair.baseline.run_dir), pair)  # a second run of one seed tells nothing of seeds
    told = []
    for group in (list(alike.values()) for alike in found.values() if len(alike) > 1):
        means_s = np.array([pair.smooth_difference_n[pair.half :].mean() for pair in group])
        error = float(means_s.std(ddof=1) / len(means_s) ** 0.5)
        labels = [pair.label for pair in group]
        told.append({"runs": labels, "means": means_s.tolist(), "mean": float(means_s.mean()), "error": error})
    return told


def _common_steps(everything: list[Series]) -> np.ndarray:
    steps_n = reduce(np.intersect1d, [series.steps_n for series in everything])
    if len(steps_n) < LEAST_STEPS:
        fewest = min(everything, key=lambda series: len(series.steps_n))
        raise UserError(
            f"{fewest.run_dir}: {len(fewest.steps_n)} steps with a finite loss, {len(steps_n)} of them in every run; "
            f"at least {LEAST_STEPS} are needed"
        )
    first = everything[0]
    for series in everything[1:]:
        ours, theirs = first.tokens_n[_at(first, steps_n)], series.tokens_n[_at(series, steps_n)]
        if (apart := np.flatnonzero(ours != theirs)).size:
            step, a, b = (int(x[apart[0]]) for x in (steps_n, ours, theirs))
            raise UserError(
                f"{series.run_dir}: {b} tokens consumed after step {step}, and {a} in {first.run_dir}; batches of "
                "different sizes do not compare (parallel and training.micro_batch_size round them)"
            )
    return steps_n


def _at(series: Series, steps_n: np.ndarray) -> np.ndarray:
    """Indices of steps in a series that has them all."""
    return np.searchsorted(series.steps_n, steps_n)


def _labels(everything: list[Series]) -> dict[Path, str]:
    """The directories' last names, or whole where two have the same one."""
    names = [series.run_dir.resolve().name for series in everything]
    return {
        series.run_dir: name if names.count(name) == 1 else str(series.run_dir)
        for series, name in zip(everything, names, strict=True)
    }


class _Pair:
    """A run beside the baseline, on the steps that all runs have."""

    def __init__(self, baseline: Series, run: Series, steps_n: np.ndarray, window: int | None, label: str) -> None:
        self.baseline, self.run, self.steps_n, self.label = baseline, run, steps_n, label
        self.half = len(steps_n) // 2
        ours, theirs = _at(run, steps_n), _at(baseline, steps_n)
        self.tokens_n = run.tokens_n[ours]
        self.loss_n, base_loss_n = run.loss_n[ours], baseline.loss_n[theirs]
        self.smooth_loss_n = smooth(self.loss_n, window)
        self.difference_n = self.loss_n / base_loss_n - 1
        self.smooth_difference_n = self.smooth_loss_n / smooth(base_loss_n, window) - 1
        self.grad_norm_n, self.base_grad_norm_n = run.grad_norm_n[ours], baseline.grad_norm_n[theirs]
        self.smooth_grad_norm_n = smooth(self.grad_norm_n, window)
        self.mtp_difference_n = self.smooth_mtp_difference_n = None
        if run.mtp_loss_n is not None and baseline.mtp_loss_n is not None:
            mtp_n, base_mtp_n = run.mtp_loss_n[ours], baseline.mtp_loss_n[theirs]
            self.mtp_difference_n = mtp_n / base_mtp_n - 1
            self.smooth_mtp_difference_n = smooth(mtp_n, window) / smooth(base_mtp_n, window) - 1

    def curve(self) -> Curve:
        return Curve(
            self.label, self.loss_n, self.smooth_loss_n, self.smooth_grad_norm_n, self.difference_n,
            self.smooth_difference_n, self.smooth_mtp_difference_n,
        )  # fmt: skip

    def mean_loss(self) -> float:
        """Nats per token over the last half, not smoothed."""
        return float(self.loss_n[self.half :].mean())

    def facts(self) -> dict[str, Any]:
        precision = self.run.recipe.precision
        return {
            "run": str(self.run.run_dir),
            "label": self.label,
            "precision": precision.params if precision.fp8 == "none" else f"{precision.params}, FP8 {precision.fp8}",
            "seed": self.run.recipe.training.seed,
            "steps": int(self.run.steps_n[-1]),
            "mean_loss": self.mean_loss(),
        }

    def differs(self) -> dict[str, list[Any]]:
        """Keys of the recipe: the baseline's value, and the run's."""
        found = diff(self.baseline.recipe, self.run.recipe)
        return {key: [left, right] for key, left, right in found if key not in ("name", "runtime.run_dir")}

    def figures(self) -> dict[str, Any]:
        return {
            **self.facts(),
            "against": str(self.baseline.run_dir),
            "differs": self.differs(),
            "loss": self._of(self.difference_n, self.smooth_difference_n),
            "mtp_loss": self._of(self.mtp_difference_n, self.smooth_mtp_difference_n),
            "grad_norm_ratio": self._grad_norm_ratio(),
            "validation": self._validation(),
            "notes": notes(self.baseline, self.run),
        }

    def _of(self, raw_n: np.ndarray | None, smooth_n: np.ndarray | None) -> dict[str, Any] | None:
        """Of relative differences over the last half."""
        if raw_n is None or smooth_n is None or np.isnan(smooth_n[self.half :]).any():
            return None
        last_n = smooth_n[self.half :]
        largest = int(np.abs(last_n).argmax())
        return {
            "max_abs": float(np.abs(last_n[largest])),
            "max_abs_at_step": int(self.steps_n[self.half + largest]),
            "mean": float(last_n.mean()),
            "last": float(last_n[-1]),
            "unsmoothed_max_abs": float(np.nanmax(np.abs(raw_n[self.half :]))),
        }

    def _grad_norm_ratio(self) -> float | None:
        """Mean norm of the last half over the baseline's."""
        ours_n, theirs_n = self.grad_norm_n[self.half :], self.base_grad_norm_n[self.half :]
        both = np.isfinite(ours_n) & np.isfinite(theirs_n)
        if not both.any() or theirs_n[both].sum() == 0:
            return None
        return float(ours_n[both].sum() / theirs_n[both].sum())

    def _validation(self) -> dict[str, Any] | None:
        """At the last step at which both were validated, on the same sequences."""
        common = self.run.validation.keys() & self.baseline.validation.keys()
        a, b = (-(-r.training.eval_sequences // r.batch_multiple) for r in (self.baseline.recipe, self.run.recipe))
        same = a * self.baseline.recipe.batch_multiple == b * self.run.recipe.batch_multiple
        # The first ones of an order that hangs on data.seed.
        same = same and self.baseline.recipe.data.seed == self.run.recipe.data.seed
        if not common or not same:
            return None
        step = max(common)
        ours, theirs = self.run.validation[step], self.baseline.validation[step]
        return {"step": step, "loss": ours, "baseline": theirs, "difference": ours / theirs - 1}


def _with_verdict(pair: _Pair, bound: float) -> dict[str, Any]:
    figures, run = pair.figures(), pair.run
    largest, at = figures["loss"]["max_abs"], figures["loss"]["max_abs_at_step"]
    within = largest < bound and not run.not_finite
    if run.not_finite:
        text = f"not within {percent(bound)}: there are losses that are not finite"
    elif within:
        text = f"within {percent(bound)}: at most {percent(largest)}, at step {at}"
    else:
        text = f"misses {percent(bound)} by {100 * (largest - bound):.3f} points: {percent(largest)} at step {at}"
    if pair.steps_n[-1] < run.total_steps:
        text += f" (so far: step {pair.steps_n[-1]} of {run.total_steps})"
    return {**figures, "within_bound": within, "verdict": text}


def percent(value: float) -> str:
    """`0.25%`, three decimals where it needs them."""
    text = f"{value:.3%}"
    return f"{value:.2%}" if text.endswith("0%") else text


def _spread(own: _Pair, seeds: list[_Pair]) -> dict[str, Any]:
    """How far seeds are apart: their largest smoothed difference, and the standard deviation of mean losses."""
    means_s = np.array([pair.mean_loss() for pair in (own, *seeds)])
    return {
        "seeds": len(means_s),
        "max_abs": max(float(np.abs(pair.smooth_difference_n[pair.half :]).max()) for pair in seeds),
        "mean_loss_std": float(means_s.std(ddof=1) / means_s.mean()),
    }
