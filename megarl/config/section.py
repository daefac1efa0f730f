"""The base class of all groups of settings, and the kinds of numbers and paths in them."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

LARGEST_INTEGER = 2**31 - 1  # what every library below takes
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(?:oc\.env:)?(\w+)\})")  # OmegaConf's spelling too


def expanded(value: Any) -> Any:
    """A path with `~` and variables expanded, so that no folder gets the name of one."""
    if not isinstance(value, str | Path):
        return value

    def variable(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]

    path = _VARIABLE.sub(variable, str(value))
    if "${" in path:
        raise ValueError("this ${…} is not understood; write ${NAME} for an environment variable")
    home = os.path.expanduser(path)
    if "~" in home.split("/") or (path.startswith("~") and home == path):
        raise ValueError("~ is not expanded here: only ~/… and ~USER/… of a known user are; write the whole path")
    if "\0" in home or len(os.fsencode(home)) >= 4096 or any(len(os.fsencode(part)) > 255 for part in home.split("/")):
        raise ValueError("no file can have this name: at most 255 bytes between slashes, 4095 in all, and no NUL")
    return home


Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Seconds = Annotated[float, Field(gt=0.0, le=1e8)]  # three years: what waits and sockets can count
Place = Annotated[Path, BeforeValidator(expanded)]
"""A path. `~` and environment variables are expanded."""


class Section(BaseModel):
    """A group of settings. `load` refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would convert silently: a truth value as a number, an integer beyond any library."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("is a truth value (YAML reads yes, no, on, off, true, false as one), not a number")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise ValueError(f"is out of range; at most {LARGEST_INTEGER}")
        if isinstance(value, str | bytes) and kinds == {bool}:
            raise ValueError("is text, not a truth value; write true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types inside an annotation: {int, NoneType} for `Positive | None`, {str} for a choice of words."""
    if get_origin(annotation) is Literal:
        return {type(word) for word in get_args(annotation)}
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}


def is_text(annotation: Any) -> bool:
    """Whether a setting of this type takes one text: a string, a path, or one of several words."""
    return get_origin(annotation) not in (list, tuple, dict) and _kinds(annotation) <= {str, Path, type(None)}


def unquoted(value: Any) -> bool:
    """Whether YAML made `value` of a text without quotes."""
    return isinstance(value, bool | int | float | datetime.date)
