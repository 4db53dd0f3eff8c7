"""The recipe's section `schedule`: what changes over consumed tokens, in pieces."""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dsv3_train.recipe import ranges
from dsv3_train.recipe.quantity import Extent
from dsv3_train.recipe.section import Section


class Segment(Section):
    """One piece of a schedule: `{linear: [0, 2.2e-4], until: 2000 steps}`; the last one has no `until`."""

    constant: Union[float, None] = None
    linear: Union[tuple[float, float], None] = None
    cosine: Union[tuple[float, float], None] = None
    until: Union[Extent, None] = None
    """Where the piece ends: consumed tokens, or `N steps`."""

    @field_validator("linear", "cosine", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_shape(self) -> Segment:
        if sum(shape is not None for shape in (self.constant, self.linear, self.cosine)) != 1:
            raise ValueError("a piece is one of constant: v, linear: [from, to], cosine: [from, to]")
        return self


def _pieces(value: Any) -> Any:
    return [{"constant": value}] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Piecewise = Annotated[list[Segment], BeforeValidator(_pieces), Field(min_length=1)]
"""Pieces in order over consumed tokens; a plain number is one constant piece."""


class Schedule(Section):
    """What changes over consumed tokens. One mechanism for all four."""

    lr: Piecewise
    batch_size: Piecewise
    """Sequences per global batch, rounded down to a multiple of micro-batch size x data parallel size (and x pipeline
    size in the interleaved schedule)."""
    mtp_weight: Piecewise = [Segment(constant=0.0)]  # noqa: RUF012  pydantic copies it
    """Weight (lambda) of the Multi-Token Prediction loss."""
    bias_update_speed: Piecewise = [Segment(constant=0.0)]  # noqa: RUF012  pydantic copies it
    """Step (gamma) of each expert's routing bias per global batch."""
    balance_loss: ranges.LossWeight = 1e-4
    """Weight (alpha) of the sequence-wise balance loss; constant in the report."""
