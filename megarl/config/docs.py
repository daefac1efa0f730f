"""Every setting with its type, default and documentation, and every recipe, for `megarl settings`."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from megarl.config import Section, Settings, reading
from megarl.errors import UserError, nearest

REQUIRED = object()
PREFACE = """\
# Settings

A run has one YAML file, plus `key=value` overrides on the command line. An unknown key is refused, and the message
names the right one, also for names of TRL, verl, slime, NeMo-RL, OpenRLHF, AReaL and prime-rl. Two more keys of a YAML
file start from other settings:

- `recipe: step_grpo+dppo` starts from shipped ones ([megarl/recipes](../megarl/recipes)). `megarl settings --recipe
  NAME` prints one.
- `include: [base.yaml]` starts from other files, relative to this one.

A file wins over its includes, later includes win over earlier ones, and all win over the recipe. Sections merge; lists
are replaced. The run directory's `config.yaml` has the result, complete.

This page is the output of `megarl settings`, made from [megarl/config](../megarl/config). `megarl settings NAME` prints
one section or setting.

"""
_BOUNDS: dict[type, Sequence[tuple[str, str]]] = {
    Ge: [("≥", "ge")],
    Gt: [(">", "gt")],
    Le: [("≤", "le")],
    Lt: [("<", "lt")],
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `default` is `REQUIRED` if it has none."""

    key: str  # dotted, as in an override
    kind: str  # its type in words, bounds included
    default: Any
    doc: str


@dataclass(frozen=True, slots=True)
class Group:
    """The settings of one section, without those of the sections inside it."""

    key: str  # dotted; "" for the top
    doc: str
    settings: tuple[Setting, ...]


def groups(section: type[Section] = Settings, key: str = "") -> Iterator[Group]:
    """Every section, depth first, in the order of their declaration."""
    prefix = f"{key}." if key else ""
    nested = {name: _section(field.annotation) for name, field in section.model_fields.items()}
    plain = [_setting(f"{prefix}{n}", f) for n, f in section.model_fields.items() if nested[n] is None]
    yield Group(key, " ".join((section.__doc__ or "").split()), tuple(plain))
    for name, inner in nested.items():
        if inner is not None:
            yield from groups(inner, f"{prefix}{name}")


def text(value: Any) -> str:
    """A value as it stands in YAML."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(text(v) for v in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value) if value != value.strip() or "\n" in value else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown(below: str | None = None) -> str:
    """The reference, or only the section or setting `below`. Raises UserError for an unknown name."""
    found = [g for g in groups() if below is None or f"{g.key}.".startswith(f"{below}.")]
    if not found:
        found = [
            Group(g.key, g.doc, tuple(s for s in g.settings if s.key == below))
            for g in groups()
            if any(s.key == below for s in g.settings)
        ]
    if not found:
        names = [name for g in groups() for name in (g.key, *(s.key for s in g.settings))]
        raise UserError(f"settings: there is none called '{below}'{nearest(str(below), names)}")
    return "\n".join(_chapter(g) for g in found)


def recipe(name: str) -> str:
    """The settings of a recipe as YAML, each with the first sentence of its documentation. Raises UserError."""
    meanings = {s.key: s.doc.partition(". ")[0].removesuffix(".") for g in groups() for s in g.settings}

    def lines(tree: dict[str, Any], prefix: str, indent: str) -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield f"{indent}{key}:"
                yield from lines(value, f"{prefix}{key}.", indent + "  ")
            else:
                style = '"' if isinstance(value, str) and "\n" in value else None
                written = yaml.safe_dump([value], default_flow_style=True, default_style=style, width=math.inf)
                written = written.strip()[1:-1]
                yield f"{indent}{key}: {written}  # {meanings[prefix + key]}"

    return "\n".join([f"# recipe: {name}", *lines(reading.recipe(name), "", "")]) + "\n"


def _chapter(group: Group) -> str:
    lines = [f"## {group.key or 'The run'}", ""]
    if group.doc:
        lines += [_cell(group.doc), ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for s in group.settings:
        default = "required" if s.default is REQUIRED else f"`{text(s.default)}`" if text(s.default) else ""
        lines.append(f"| `{s.key}` | {_cell(s.kind)} | {_cell(default)} | {_cell(s.doc)} |")
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _setting(key: str, field: FieldInfo) -> Setting:
    default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
    return Setting(key, _kind(field.annotation, field.metadata), default, " ".join((field.description or "").split()))


def _kind(annotation: Any, metadata: Any = ()) -> str:
    """A type in the words of YAML."""
    bounds = ", ".join(f"{sign} {getattr(m, name):g}" for m in metadata for sign, name in _BOUNDS.get(type(m), ()))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated inside an Optional
        return _kind(
            arguments[0], [m for extra in annotation.__metadata__ for m in getattr(extra, "metadata", [extra])]
        )
    if origin is Literal:
        name = " | ".join(map(str, arguments))
    elif origin in (Union, types.UnionType):
        name = " or ".join(_kind(a) for a in arguments if a is not type(None))
    elif origin in (list, tuple):
        inner = [a for a in arguments if a is not Ellipsis]
        plural = _kind(inner[0]) + ("" if get_origin(inner[0]) is Literal else "s")
        name = f"list of {plural}" if origin is list else f"{len(inner)} {plural}"
    else:
        names = {
            Path: "path",
            str: "text",
            bool: "bool",
            int: "integer",
            float: "number",
            dict: "mapping",
            date: "date",
        }
        kind = origin or annotation
        name = names.get(kind, getattr(kind, "__name__", str(kind)))
    return f"{name}, {bounds}" if bounds else name
