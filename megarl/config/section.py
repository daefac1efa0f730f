"""What every group of settings is, and the kinds of numbers that settings take."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of settings; unknown keys are refused by `load`, with the nearest known one named."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)
