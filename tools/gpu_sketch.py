"""Gradients of two runs compared without keeping gigabytes of them, by products with random vectors: the mean square of
the products' differences is the square of the gradients' distance."""

from __future__ import annotations

import math
import statistics
import zlib
from typing import Any

PROBES = 8


def sketch(trainer: Any, device: str, what: str = "main_grad") -> dict[str, list[float]]:
    """Of every piece of a parameter that this rank holds, its gradient's (or `data`'s) norm and products with random
    vectors."""
    import torch

    from parity import pieces, unshard_gradients

    unshard_gradients(trainer)
    rows = {}
    for key, _, place, values in pieces(trainer, lambda parameter: getattr(parameter, what).detach().float()):
        name = f"{key} {place}"
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        flat = values.reshape(-1)
        probes = [flat @ torch.randn(flat.numel(), generator=generator, device=device) for _ in range(PROBES)]
        rows[name] = torch.stack([flat.norm(), *probes]).tolist()
    return rows


def distance(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, Any]:
    """Relative distance of two runs' gradients, of all together and of the parameter with the largest."""
    if one.keys() != other.keys():
        return {"all": math.nan, "largest": math.nan, "of": "the two runs have other parameters"}
    squares = {
        name: (statistics.fmean((a - b) ** 2 for a, b in zip(row[1:], other[name][1:], strict=True)), row[0] ** 2)
        for name, row in one.items()
    }
    apart, norm = (sum(values) for values in zip(*squares.values(), strict=True))
    worst, name = max((math.sqrt(a / n) if n else 0.0, name) for name, (a, n) in squares.items())
    return {"all": math.sqrt(apart / norm), "largest": worst, "of": name}
