"""From YAML files and `key=value` overrides to settings, and back. Each mistake is reported on one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from megarl.config import aliases, yaml_file
from megarl.config.section import expanded, is_text, unquoted
from megarl.config.settings import Settings
from megarl.errors import UserError, nearest

RECIPES = Path(__file__).parents[1] / "recipes"
SHOWN = 200  # characters of a value in an error
COMPOSING = ("recipe", "include")  # keys of a YAML file that name further files

Tree = dict[str, Any]


def load(path: Path | str, overrides: list[str] | None = None) -> Settings:
    """Read a YAML file with its recipe and includes, apply `key=value` overrides, validate.

    A file comes over its includes, later includes over earlier ones, all of them over the recipe. Sections merge;
    everything else, lists too, is replaced. Included files are relative to the file that includes them, and all other
    paths to the working directory. Raises UserError, one line a mistake, naming the setting and a valid value.
    """
    path = Path(path)
    tree = _read(path)
    pairs = [(text, *_pair(text)) for text in overrides or []]
    tree.update({key: value for _, key, value in pairs if key in COMPOSING})
    tree = _composed(tree, path)
    for text, key, value in pairs:
        if key not in COMPOSING:
            _override(tree, text, key, value)
    return _validated(tree)


def parse(tree: Tree) -> Settings:
    """Validate a tree of settings. Includes are relative to the working directory. Raises UserError."""
    return _validated(_composed(tree, Path("settings")))


def tree(path: Path) -> Tree:
    """A YAML file's settings as they stand there, not validated and without what it includes. Raises UserError."""
    return _read(path)


def dump(settings: Settings) -> str:
    """The resolved settings as YAML, with nothing left to include."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def recipe(name: str) -> Tree:
    """The settings of a recipe: a file of megarl/recipes, or several joined by `+`. Raises UserError."""
    return _composed({"recipe": name}, Path("settings"))


def _validated(tree: Tree) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as e:
        raise UserError("\n".join(line for error in e.errors() for line in _lines(error))) from None


def _read(path: Path, included_by: Path | None = None) -> Tree:
    return yaml_file.read(path, f"{included_by}: include: {path}" if included_by else f"config: {path}")


def _composed(tree: Tree, file: Path, outer: tuple[Path, ...] = ()) -> Tree:
    """`tree`, as read from `file`, over its recipe and its includes; `outer` are the files that include `file`."""
    names, include = tree.get("recipe"), tree.get("include", [])
    if names is not None and not isinstance(names, str):
        raise UserError(f"recipe: {names!r} is not a name; write e.g. recipe: step_grpo+dppo")
    if not isinstance(include, list) or not all(isinstance(each, str) for each in include):
        raise UserError(f"include: {include!r} is not a list of files; write e.g. include: [base.yaml]")
    chain, made = (*outer, file), Tree()
    for each in [
        *(_recipe_file(name) for name in (names.split("+") if names is not None else ())),
        *(file.parent / _expanded(i) for i in include),
    ]:
        if each.resolve() in [other.resolve() for other in chain]:
            raise UserError(f"include: {' includes '.join(map(str, (*chain, each)))}: a circle; remove one of these")
        made = _merged(made, _composed(_read(each, file), each, chain))
    return _merged(made, {key: value for key, value in tree.items() if key not in COMPOSING})


def _expanded(name: str) -> str:
    try:
        return str(expanded(name))
    except ValueError as e:
        raise UserError(f"include: {name!r}: {e}") from None


def _recipe_file(name: str) -> Path:
    known = [file.stem for file in RECIPES.glob("*.yaml")]
    if name.strip() not in known:
        raise UserError(f"recipe: there is none called '{name.strip()}'{nearest(name, known)}")
    return RECIPES / f"{name.strip()}.yaml"


def _merged(below: Tree, above: Tree) -> Tree:
    both = {k for k in below.keys() & above.keys() if isinstance(below[k], dict) and isinstance(above[k], dict)}
    return below | above | {key: _merged(below[key], above[key]) for key in both}


def _pair(text: str) -> tuple[str, Any]:
    key, equals, written = text.partition("=")
    if key.startswith("-"):  # an option of another trainer, or one of ours misspelled
        key = key.lstrip("-")
        raise UserError(
            f"{text}: {aliases.answer(key) or 'is not an option; settings are written key=value, without dashes'}"
        )
    if not equals or not key:
        raise UserError(f"override: '{text}' is not of the form key=value")
    return key, _text(written) if is_text(_annotation(key)) else _value(text, written)


def _text(written: str) -> str | None:
    """A text as the shell passed it on: prose needs no YAML quotes. Quotes around all of it are YAML's; `null` and
    nothing are None."""
    if written in ("", "null"):
        return None
    if written[0] == written[-1] and written[0] in "\"'":
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(written)
            return value if isinstance(value, str) else written
    return written


def _value(text: str, written: str) -> Any:
    """What `written` is in YAML, or as a number: YAML 1.1 reads "1e-4" as text."""
    try:
        value = yaml_file.parse(written)
    except UserError as e:
        raise UserError(f"{text}: {e}") from None
    except yaml.YAMLError as e:
        reason = getattr(e, "problem", None) or "it has a character that YAML does not know"
        raise UserError(f"{text}: {written!r} is not a YAML value: {reason}; quote it if it is text") from None
    except (RecursionError, ValueError):
        raise UserError(f"{text}: is not a YAML value: nested too deeply, or no date; quote it if it is text") from None
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(written)
    return value


def _annotation(key: str) -> Any:
    """The type of the setting `key`; None for a name that is none."""
    section: Any = Settings
    *parents, leaf = key.split(".")
    for name in parents:
        field = getattr(section, "model_fields", {}).get(name)
        section = field and field.annotation
    field = getattr(section, "model_fields", {}).get(leaf)
    return field and field.annotation


def _override(tree: Tree, text: str, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if tree is None:
            raise UserError(f"override: '{text}': the file has {name}: with nothing below it; remove that line")
        if not isinstance(tree, dict):
            raise UserError(f"override: '{text}': {name} has a value, not settings below it")
    tree[leaf] = value


def _lines(error: Any) -> list[str]:
    """One pydantic error as one line; an unknown section as one line for each of its settings that has a name here."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(location, error["input"])
    if error["type"] == "missing":
        return [f"{location}: is required"]
    message, given = str(error["msg"]).removeprefix("Value error, "), error["input"]
    if not location:
        return [message]
    if given is None and error["type"] == "model_type":
        return [f"{location}: has nothing below it; add its settings or remove the line"]
    if error["type"] in ("string_type", "path_type", "literal_error") and unquoted(given):
        message += "; YAML does not read this as text: quote it"
    elif error["type"] == "int_parsing":
        message += "; write its digits, without exponent and quotes"
    shown = repr(given)
    return [f"{location}: {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'}: {message}"]


def _unknown(key: str, value: Any) -> list[str]:
    if answers := _answers(key, value):
        return answers
    section, _, name = key.rpartition(".")
    below = [k.removeprefix(f"{section}.") for k in known() if not section or k.startswith(f"{section}.")]
    elsewhere = [k for k in known() if k.endswith(f".{name}")]
    hint = f" (did you mean '{elsewhere[0]}'?)" if elsewhere else nearest(name, {k.split(".")[0] for k in below})
    return [f"{key}: unknown setting{hint}"]


def _answers(key: str, value: Any) -> list[str]:
    """What the settings below an unknown section are called here; if none of them is known, the section itself."""
    inner = value.items() if isinstance(value, dict) else ()
    below = [line for name, each in inner for line in _answers(f"{key}.{name}", each)]
    found = aliases.answer(key)
    return below or ([f"{key}: {found}"] if found else [])


def known(section: Any = Settings, prefix: str = "") -> Iterator[str]:
    """Every setting and section, dotted."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for annotation in (field.annotation, *get_args(field.annotation)):
            if hasattr(annotation, "model_fields"):
                yield from known(annotation, f"{prefix}{name}.")
