"""One YAML file as a tree of settings. What YAML itself would accept and change silently is refused, with its line."""

from __future__ import annotations

import codecs
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megarl.errors import UserError, nearest

LARGEST = 100_000  # values of a file, each alias counted: more is an "alias bomb"
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read(path: Path, name: str) -> dict[str, Any]:
    """The mapping in a file. `name` begins each error. Raises UserError, one line, naming the place in the file."""
    text = _text(path, name)
    try:
        tree = parse(text)
    except yaml.MarkedYAMLError as e:
        at = f" at line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{name} is not YAML{at}: {e.problem or e.context}") from None
    except RecursionError:
        raise UserError(f"{name} is nested too deeply") from None
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    except Exception as e:  # whatever the parser makes of a file
        raise UserError(f"{name} is not YAML: {' '.join(str(e).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{name} is a {type(tree).__name__}, not a mapping of settings")
    return tree


def parse(text: str) -> Any:
    """A YAML text. Raises yaml.YAMLError, RecursionError, and UserError for what YAML would change silently."""
    tree = yaml.load(text, _Loader)
    _size(tree, {})
    return tree


def _text(path: Path, name: str) -> str:
    try:
        if not path.exists():
            there = [f.name for f in path.parent.glob("*.yaml")]
            raise UserError(f"{name} does not exist{nearest(path.name, there) if there else ''}")
        if not path.is_file():
            raise UserError(f"{name} is not a file")
        content = path.read_bytes()
    except (OSError, ValueError) as e:
        raise UserError(f"{name} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    for mark, encoding in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise UserError(f"{name} is {encoding}; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise UserError(f"{name} is not UTF-8 in line {line}; save it as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader without its surprises: a key given twice, and integers that YAML 1.1 reads in another base."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{key.value} is given twice, in lines {lines[name]} and {line}; remove one of them")
            lines[name] = line
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = int(super().construct_yaml_int(node))
        if re.fullmatch(r"[-+]?(0[0-7_]+|[\d_]+(:[0-5]?\d)+)", node.value):
            base = "60" if ":" in node.value else "8"
            raise UserError(
                f"line {node.start_mark.line + 1}: YAML reads {node.value} as {value}, in base {base}; "
                f'write {value}, or quote it as text: "{node.value}"'
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values `value` has, those of aliases as often as they are named. Raises UserError if it is absurd."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        if known[id(value)] < 0:
            raise UserError("an alias (*name) refers to what it is a part of")
        return known[id(value)]
    known[id(value)] = -1
    size = 1 + sum(_size(each, known) for each in (value.values() if isinstance(value, dict) else value))
    if size > LARGEST:
        raise UserError(f"has more than {LARGEST} values, its aliases counted")
    known[id(value)] = size
    return size
