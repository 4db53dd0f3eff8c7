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
    if not steps:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    tokens = [line["consumed_tokens"] for line in steps]
    axes.plot(tokens, [line["loss"] for line in steps], label="loss", linewidth=1)
    if steps[0]["mtp_loss"] is not None:
        axes.plot(tokens, [line["mtp_loss"] for line in steps], label="MTP loss", linewidth=1)
    valid = [line for line in lines if line["kind"] == "validation"]
    axes.plot([v["consumed_tokens"] for v in valid], [v["loss"] for v in valid], "ko-", label="validation", markersize=3)
    axes.set(xlabel="consumed tokens", ylabel="nats per token")
    rate = axes.twinx()
    rate.plot(tokens, [line["lr"] for line in steps], color="0.7", linewidth=1)
    rate.set_ylabel("learning rate (grey)")
    axes.legend()
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)
