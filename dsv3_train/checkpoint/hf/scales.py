"""FP8 scales of published files: by which rule they were made, and whether all codes come back through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from dsv3_train.checkpoint.hf import fp8
from dsv3_train.checkpoint.hf.names import BLOCK
from dsv3_train.checkpoint.hf.sides import Published

_BLOCKS = 16
"""That tell a rule, at least: a row of them in DeepSeek-V3, more of narrower weights."""


class Looked(NamedTuple):
    """At one FP8 weight."""

    rule: fp8.Rule | None
    """None: no known one."""
    lossy: bool
    """A scale is so small or so large (0 too) that codes do not come back from values: the bytes change."""


def look(found: Published) -> Looked:
    """The rule of a weight's first blocks, and of all its scales whether codes come back through them."""
    assert found.scale is not None
    rows, scales_bc = found.stored.shape[0], found.scale.read()
    of_blocks = -(-_BLOCKS // scales_bc.shape[1])
    rule = fp8.find_rule(found.stored.read(0, min(of_blocks * BLOCK, rows)), scales_bc[:of_blocks])
    odd = torch.nonzero(fp8.lossy(scales_bc).any(dim=1)).flatten().tolist()
    for row in odd:
        codes_oi = found.stored.read(row * BLOCK, min((row + 1) * BLOCK, rows))
        if not fp8.comes_back(codes_oi, scales_bc[row : row + 1]):
            return Looked(rule, True)
    return Looked(rule, False)


def told(looked: Mapping[str, Looked]) -> list[str]:
    """What was found, in lines; none for files without FP8."""
    names: dict[fp8.Rule | None, list[str]] = {}
    for name, one in looked.items():
        names.setdefault(one.rule, []).append(name)
    lines = []
    rules = sorted(((rule, of) for rule, of in names.items() if rule), key=lambda item: -len(item[1]))
    if rules:
        listed = "; ".join(f"{rule} ({len(of):,} weights{_example(of, len(rules))})" for rule, of in rules)
        lines.append(f"FP8 scales are kept; a trained weight gets new ones by the rule found in its file: {listed}")
    if None in names:
        lines.append(f"FP8 scales follow no known rule: {_listed(names[None])}: kept; if trained, they get usual ones")
    if lossy := [name for name, one in looked.items() if one.lossy]:
        lines.append(
            f"will not come back byte for byte, because scales near 0 or very large lose codes: {_listed(lossy)}"
        )
    return lines


def _example(names: list[str], rules: int) -> str:
    return f", as {names[0]}" if rules > 1 else ""


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
