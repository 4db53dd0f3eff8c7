"""What all parts of a recipe have in common."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from dsv3_train.errors import UNSEEN


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values are not coerced from other types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _no_control_characters(cls, value: Any, info: ValidationInfo) -> Any:
        """Names and paths end in shell scripts, file names and terminals."""
        lines = info.field_name in ("description", "layout")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (UNSEEN.search(text) or (not lines and re.search(r"[\n\t]", text))):
                raise ValueError(f"{ascii(text)[:100]} has a control character in it; take it out")
        return value
