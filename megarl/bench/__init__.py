"""Benchmarks: `megarl bench NAME [--json FILE]`, each a module with a `main` function.

A benchmark is a module or package of this folder, an entry point of the group `megarl.benchmarks`, or the file
`examples/NAME/bench.py` of the working directory or of the checkout that megarl is imported from.
What several benchmarks share is in common/.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).parents[2]
SHARED = "common"


def names() -> dict[str, str | Path]:
    """Every benchmark's name, and the module or the file that has its `main`; imports none of them."""
    own = {
        module.name: f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__) if module.name != SHARED
    }
    declared = {entry.name: entry.module for entry in entry_points(group="megarl.benchmarks")}
    # An installed package may have a stranger's `examples` beside it.
    roots = [CHECKOUT, Path()] if (CHECKOUT / "pyproject.toml").is_file() else [Path()]
    found: dict[str, str | Path] = {
        file.parent.name: file for root in roots for file in (root / "examples").glob("*/bench.py")
    }
    found |= own | declared
    return dict(sorted(found.items()))


def summary(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing the benchmark."""
    place = names()[name]
    if isinstance(place, str):
        spec = importlib.util.find_spec(place)
        assert spec is not None and spec.origin is not None
        place = Path(spec.origin)
    return (ast.get_docstring(ast.parse(place.read_text())) or "").partition("\n")[0]


def load(name: str) -> ModuleType:
    """The module of a benchmark that `names` has."""
    place = names()[name]
    if isinstance(place, str):
        return importlib.import_module(place)
    root = str(place.resolve().parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)  # before a stranger's `examples`
    return importlib.import_module(f"examples.{name}.bench")
