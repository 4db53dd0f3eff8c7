"""Pictures of a run: expert load and learning curve."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def expert_load(load_le: np.ndarray, step: int) -> Figure:
    """Heat map of [MoE layers, experts] token counts over each layer's mean; the largest ratio stands at the right."""
    ratio_le = load_le / load_le.mean(axis=1, keepdims=True).clip(min=1e-9)
    layers, experts = ratio_le.shape
    figure = Figure(figsize=(min(4 + experts * 0.15, 16), min(1.5 + layers * 0.3, 14)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(ratio_le, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, float(ratio_le.max())))
    axes.set(xlabel="expert", ylabel="MoE layer", title=f"Tokens per expert over the layer's mean, step {step}")
    for layer, largest in enumerate(ratio_le.max(axis=1)):
        axes.text(experts - 0.4, layer, f" {largest:.2f}", va="center", fontsize=7)
    figure.colorbar(image, ax=axes, pad=0.1)
    return figure


def learning_curve(metrics: Path) -> Figure | None:
    """Losses and learning rate over consumed tokens, from a run's metrics.jsonl; None before the first step."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    valid = [line for line in lines if line["kind"] == "validation"]
    if not steps:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    tokens = [line["consumed_tokens"] for line in steps]
    axes.plot(tokens, _values(steps, "loss"), label="loss", linewidth=1)
    if any(line["mtp_loss"] is not None for line in steps):
        axes.plot(tokens, _values(steps, "mtp_loss"), label="MTP loss", linewidth=1)
    if valid:
        at = [line["consumed_tokens"] for line in valid]
        axes.plot(at, _values(valid, "loss"), "ko-", label="validation", markersize=3)
    axes.set(xlabel="consumed tokens", ylabel="nats per token")
    rate = axes.twinx()
    rate.plot(tokens, _values(steps, "lr"), color="0.7", linewidth=1)
    rate.set_ylabel("learning rate (grey)")
    axes.legend()
    return figure


def _values(lines: list[dict], key: str) -> list[float]:
    """null stands for a value that was not finite: a gap in the curve."""
    return [float("nan") if line[key] is None else line[key] for line in lines]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)
