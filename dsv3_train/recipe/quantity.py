"""Quantities as people write them in recipes: `14.8T`, `469B tokens`, `2000 steps`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from dsv3_train.recipe.ranges import LARGEST_EXTENT

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# So many digits are beyond any run, and few enough for exact arithmetic.
_TOKENS = re.compile(r"([0-9][0-9_]{0,19}(?:\.[0-9]{1,12})?)\s*([KMBT]?)(?:\s*tokens)?")
_STEPS = re.compile(r"([0-9][0-9_]{0,19})\s*steps?")


class _TooMuch(ValueError):
    """A number as it should be written, beyond `LARGEST_EXTENT`."""


class Steps(int):
    """A number of optimizer steps, written `2000 steps`; any other number in its place is tokens."""

    def __repr__(self) -> str:
        return f"{int(self)} steps"

    __str__ = __repr__


def parse_tokens(value: object) -> int:
    """`14.8T`, `469B tokens`, `1_000_000` or a plain integer -> tokens. ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return _bounded(int(value))
    match = _TOKENS.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"{value!r} is no number of tokens; write 4096, 469B or 14.8T")
    exact = Decimal(match[1].replace("_", "")) * _SUFFIX[match[2]]
    if exact != int(exact):
        raise ValueError(f"{value!r} is not a whole number of tokens")
    return _bounded(int(exact))


def parse_extent(value: object) -> int:
    """`2000 steps` -> Steps(2000); everything else as `parse_tokens`."""
    if isinstance(value, Steps):
        return value
    match = _STEPS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match:
        return Steps(_bounded(int(match[1].replace("_", ""))))
    try:
        return parse_tokens(value)
    except _TooMuch:
        raise
    except ValueError:
        raise ValueError(f"{value!r} is no extent; write '2000 steps', or tokens as 4096, 469B or 14.8T") from None


def _bounded(value: int) -> int:
    if value > LARGEST_EXTENT:
        raise _TooMuch(f"more than {LARGEST_EXTENT:.0e}, which no run reaches and 64 bits cannot count; write less")
    return value


def _write(value: int) -> Any:
    return str(value) if isinstance(value, Steps) else value


_SCHEMA = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]})

Tokens = Annotated[int, PlainValidator(parse_tokens), _SCHEMA]
"""A number of tokens."""

Extent = Annotated[int, PlainValidator(parse_extent), PlainSerializer(_write), _SCHEMA]
"""A point in training: `Steps`, or a plain int of consumed tokens."""
