"""The comparison as a picture: losses, relative difference with the bound and the seeds' spread, gradient norms."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from dsv3_train.numerics.compare import Curves, percent

_INK = "#1f2328"
_BASELINE, _SEED, _BAND = "#64748b", "#94a3b8", "#15803d"
_RUNS = ("#2563eb", "#ea580c", "#6d28d9", "#0d9488", "#db2777", "#b45309")
_STYLE: Any = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "dsv3",  # the same figures give the same file
}
_BUCKETS = 1000


def styled(draw: Callable[[Figure], None], width: float, height: float) -> Figure:
    """A figure that `draw` fills, in the style that `svg` can turn light or dark."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.draw_without_rendering()  # ticks and legends are made while the style holds
    return figure


def svg(figure: Figure) -> str:
    """An SVG element without a background, its ink the text colour of the page around it."""
    text = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(text, format="svg", facecolor="none", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :].replace(_INK, "currentColor")


def picture(curves: Curves) -> Figure:
    """Of one comparison, over consumed tokens; the dotted line is where the last half begins."""
    mtp = curves.baseline.smooth_mtp_difference_n is not None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(3 + mtp, 1, sharex=True, height_ratios=[3, 3, *[2] * mtp, 2])
        _losses(panels[0], curves)
        _differences(panels[1], curves)
        if mtp:
            _mtp_differences(panels[2], curves)
        _grad_norms(panels[-1], curves)
        panels[-1].set_xlabel("consumed tokens")
        panels[-1].xaxis.set_major_formatter(EngFormatter())
        for axes in panels:
            axes.axvline(curves.tokens_n[curves.half], color=_INK, lw=0.8, ls=":")
            axes.grid(alpha=0.15)

    return styled(draw, 10, 11 if mtp else 9)


def _losses(axes: Axes, curves: Curves) -> None:
    axes.set_title("loss, nats per token: smoothed, faint each step's")
    for curve, colour in _all(curves):
        _line(axes, curves, curve.loss_n, color=colour, lw=0.6, alpha=0.2)
        _line(axes, curves, curve.smooth_loss_n, color=colour, lw=1.2, label=curve.label)
    last = np.concatenate([curve.smooth_loss_n[curves.half // 4 :] for curve, _ in _all(curves)])
    _limit(axes, last)
    axes.legend(ncols=4)


def _differences(axes: Axes, curves: Curves) -> None:
    axes.set_title(
        f"(loss - {curves.baseline.label}) / {curves.baseline.label}: smoothed, faint each step's; "
        f"band: {percent(curves.bound)}"
    )
    axes.axhspan(-curves.bound, curves.bound, color=_BAND, alpha=0.15, lw=0)
    axes.axhline(0, color=_INK, lw=0.6)
    _spread(axes, curves, [curve.smooth_difference_n for curve in curves.seeds])
    for number, curve in enumerate(curves.runs):
        colour = _RUNS[number % len(_RUNS)]
        _line(axes, curves, curve.difference_n, color=colour, lw=0.6, alpha=0.25)
        _line(axes, curves, curve.smooth_difference_n, color=colour, lw=1.3, label=curve.label)
    shown = [curve.smooth_difference_n for curve in (*curves.runs, *curves.seeds)]
    _centre(axes, curves, shown)
    axes.legend(ncols=4)


def _mtp_differences(axes: Axes, curves: Curves) -> None:
    axes.set_title("the same of the MTP loss, smoothed")
    axes.axhspan(-curves.bound, curves.bound, color=_BAND, alpha=0.15, lw=0)
    axes.axhline(0, color=_INK, lw=0.6)
    of_seeds, of_runs = (
        [curve.smooth_mtp_difference_n for curve in some if curve.smooth_mtp_difference_n is not None]
        for some in (curves.seeds, curves.runs)
    )
    _spread(axes, curves, of_seeds)
    for number, smooth_n in enumerate(of_runs):
        _line(axes, curves, smooth_n, color=_RUNS[number % len(_RUNS)], lw=1.3)
    _centre(axes, curves, [*of_runs, *of_seeds])


def _grad_norms(axes: Axes, curves: Curves) -> None:
    axes.set_title("gradient norm before clipping, smoothed")
    for curve, colour in _all(curves):
        _line(axes, curves, curve.smooth_grad_norm_n, color=colour, lw=1)
    _limit(axes, np.concatenate([curve.smooth_grad_norm_n[curves.half // 4 :] for curve, _ in _all(curves)]))


def _spread(axes: Axes, curves: Curves, of_seeds: list[np.ndarray]) -> None:
    """Between the lowest and the highest of the seeds, the baseline's among them, which is 0."""
    if not of_seeds:
        return
    stacked_sn = np.stack([*of_seeds, np.zeros_like(of_seeds[0])])
    low_n, high_n = stacked_sn.min(0), stacked_sn.max(0)
    at = np.union1d(extremes(low_n), extremes(high_n))
    axes.fill_between(curves.tokens_n[at], low_n[at], high_n[at], color=_SEED, alpha=0.35, lw=0, label="other seeds")


def _line(axes: Axes, curves: Curves, y_n: np.ndarray, **style: Any) -> None:
    at = extremes(y_n)
    axes.plot(curves.tokens_n[at], y_n[at], **style)


def extremes(y_n: np.ndarray) -> np.ndarray:
    """Indices of the least and the largest value of each of `_BUCKETS` stretches, in order; all of a short curve.

    More points than that lie on the same pixels, and would make a page of many steps large.
    """
    if len(y_n) <= 2 * _BUCKETS:
        return np.arange(len(y_n))
    found = []
    for part in np.array_split(np.arange(len(y_n)), _BUCKETS):
        y = y_n[part]
        found += [part[np.where(np.isnan(y), np.inf, y).argmin()], part[np.where(np.isnan(y), -np.inf, y).argmax()]]
    return np.unique(found)


def _all(curves: Curves) -> list:
    """(curve, colour), the baseline last, so that it lies on top where it is thin."""
    runs = [(curve, _RUNS[number % len(_RUNS)]) for number, curve in enumerate(curves.runs)]
    return [*((curve, _SEED) for curve in curves.seeds), *runs, (curves.baseline, _BASELINE)]


def _limit(axes: Axes, shown: np.ndarray) -> None:
    """To what is after the first eighth: beginnings would flatten all else."""
    finite = shown[np.isfinite(shown)]
    if finite.size and (room := 0.08 * np.ptp(finite) or 0.08 * abs(finite[0])):
        axes.set_ylim(finite.min() - room, finite.max() + room)


def _centre(axes: Axes, curves: Curves, shown: list[np.ndarray]) -> None:
    """Symmetric around 0, with room for the band and for all of the last half."""
    largest = max((float(np.nanmax(np.abs(smooth_n[curves.half :]), initial=0.0)) for smooth_n in shown), default=0.0)
    limit = 1.15 * max(1.3 * curves.bound, largest)
    axes.set_ylim(-limit, limit)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
