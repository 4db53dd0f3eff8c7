"""Durations as a user gives them: `F=1,I=1,W=1,FB=2.5`, or a JSON file of measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from dsv3_train.errors import UserError
from dsv3_train.pipeline.durations import Durations

_TIMED = ("F", "B", "I", "W", "FB")
_LEAST, _MOST = 1e-30, 1e30
"""Sums of times within these are numbers too."""


def durations_from(text: str) -> Durations:
    """Read durations from a list of times, or from the file that `text` names.

    F is required. Where one of I and W is missing, it is the rest of B; where both are, half of B; where B is missing
    too, B = 2 F. FB is F + B unless given. The file is an object of the same keys, and further
    `per`: "rank" (all layers of a rank; the rule) or "stage" (as measured, where a rank holds several stages), and
    `stages`: {"7": {"F": 1.3, ...}}, other times of single stages.

    Raises:
        UserError: no such file, an unknown key, a time that is no positive number from 1e-30 to 1e30.
    """
    if "=" in text:
        given: dict[str, Any] = {}
        for part in text.split(","):
            kind, _, value = part.partition("=")
            if kind.strip() in given:
                raise UserError(f"--durations: {kind.strip()} is given twice")
            given[kind.strip()] = _number(value)
        return _durations(given, "--durations")
    path = Path(text)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--durations: cannot read {text} ({error.strerror or error}); give a JSON file or times as F=1,I=1,W=1"
        ) from None
    except ValueError as error:
        raise UserError(f"{text}: not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{text}: nested too deeply; the times are an object, stages an object of objects") from None
    if not isinstance(content, dict):
        raise UserError(f'{text}: must be an object, as {{"F": 1.0, "I": 1.0, "W": 1.0}}')
    return _durations(content, text)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _durations(given: dict[str, Any], where: str) -> Durations:
    given = dict(given)
    per, stages = given.pop("per", "rank"), given.pop("stages", {})
    if per not in ("rank", "stage"):
        raise UserError(f'{where}: per must be "rank" or "stage", not {brief(per)}')
    if not isinstance(stages, dict) or not all(isinstance(times, dict) for times in stages.values()):
        raise UserError(f'{where}: stages must be an object of objects, as {{"7": {{"F": 1.3}}}}')
    for stage, times in stages.items():
        if not stage.isdecimal() or len(stage) > 9:
            raise UserError(f"{where}: stages: {brief(stage)} is no stage's number (0, 1, ...)")
        _check(times, f"{where}: stage {stage}")
    _check(given, where)
    if "F" not in given:
        raise UserError(f"{where}: F is missing; the least is F=1")
    forward, whole = given["F"], given.get("B")
    total = 2 * forward if whole is None else whole
    inputs = given["I"] if "I" in given else total - given.get("W", total / 2)
    weights = given["W"] if "W" in given else total - inputs
    if min(inputs, weights) <= 0:
        raise UserError(f"{where}: B = {total:g} leaves nothing for {'I' if inputs <= 0 else 'W'}; give both I and W")
    by_stage = {int(stage): times for stage, times in stages.items()}
    return Durations(forward, inputs, weights, whole, given.get("FB"), by_stage, per == "stage")


def _check(times: dict[str, Any], where: str) -> None:
    for kind, time in times.items():
        if kind not in _TIMED:
            raise UserError(f"{where}: unknown key {brief(kind)}; there are {', '.join(_TIMED)}")
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not _LEAST <= time <= _MOST:
            raise UserError(f"{where}: {kind} must be a positive number, not {brief(time)} (from 1e-30 to 1e30)")
