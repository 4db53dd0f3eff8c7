"""Values of a trace as they may be used: scalars, integers, nanoseconds."""

from __future__ import annotations

from decimal import Decimal, DecimalException
from typing import Any

LATEST = 1000 << 52
"""Nanoseconds: the year 2112, where clocks count from 1970. None lies far before 0, so that differences fit 64 bits."""
LONGEST = 1 << 50
"""Nanoseconds that an event may last, and that a GPU's work may span: 13 days. Beyond, a time stamp is broken."""


def scalar(value: Any) -> str | int | None:
    """A text or an integer; None for what else JSON has, which names nothing and may be nested without end."""
    return value if isinstance(value, (str, int)) else None


def integer(value: Any) -> int:
    """Of a number, or of the text of one, as `3.0`; -1: none."""
    if type(value) is int:
        return value if -(1 << 62) < value < 1 << 62 else -1
    try:
        number = Decimal(value) if isinstance(value, str) else value
        # First the range: as an integer, 1e999999999 takes forever.
        return int(number) if abs(number) < 1 << 62 and number % 1 == 0 else -1
    except (TypeError, ValueError, DecimalException):
        return -1


def nanoseconds(value: Any) -> int | None:
    """Of microseconds: an integer, or the text of a number; None for anything else, and for times out of range."""
    if type(value) is int:
        found = value * 1000 if abs(value) < LATEST else LATEST
    elif type(value) is str:
        whole, point, part = value.partition(".")
        if point and len(part) <= 3 and part.isdecimal() and whole.isdecimal() and len(whole) < 16:
            found = int(whole) * 1000 + int(part.ljust(3, "0"))
        else:
            try:
                number = Decimal(value) * 1000
                found = int(number.to_integral_value()) if abs(number) < LATEST else LATEST
            except (DecimalException, ValueError, OverflowError):
                return None
    else:
        return None
    return found if -LONGEST < found < LATEST else None
