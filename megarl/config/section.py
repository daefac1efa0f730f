"""The base class of all groups of settings, and the kinds of numbers in them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of settings. `load` refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)
