"""From a YAML file and `key=value` overrides to settings, and back; mistakes are told one line each."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from megarl.config.settings import Settings
from megarl.errors import UserError, nearest


def load(path: Path, overrides: list[str] | None = None) -> Settings:
    """Read a YAML file, apply `key=value` overrides and validate; relative paths are taken from the working directory.

    Raises UserError, one line a mistake, naming the setting and a valid value.
    """
    if not path.is_file():
        raise UserError(f"config: {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        raise UserError(f"config: {path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config: {path} holds a {type(tree).__name__}, not settings")
    for text in overrides or []:
        _override(tree, text)
    return parse(tree)


def parse(tree: dict[str, Any]) -> Settings:
    """Validate a tree of settings; raises UserError."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as e:
        raise UserError("\n".join(_line(error) for error in e.errors())) from None


def dump(settings: Settings) -> str:
    """The resolved settings as YAML."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override: '{text}' is not of the form key=value")
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"override: '{key}': '{name}' holds a value, not settings")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        node[leaf] = value
    # YAML 1.1 reads "1e-4" as a string; people mean the number.
    if isinstance(node[leaf], str):
        with suppress(ValueError):
            node[leaf] = float(value)


def _line(error: Any) -> str:
    """One pydantic error as one line."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{location}: unknown setting{nearest(str(error['loc'][-1]), _fields_at(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{location}: is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{location}: {error['input']!r}: {message}" if location else message


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    section: Any = Settings
    for name in location:
        annotation = section.model_fields[name].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)
        if section is None:
            return []
    return list(section.model_fields)
