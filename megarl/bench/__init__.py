"""Benchmarks: `megarl bench NAME [--json FILE]`, each a module with a `main` function.

They are the modules of this folder, and those that a package declares as entry points of the group `megarl.benchmarks`.
What several share is in common/.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType


def names() -> dict[str, str]:
    """Every benchmark's name and the module that has its `main`; imports none of them."""
    own = {module.name: f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__) if not module.ispkg}
    declared = {entry.name: entry.module for entry in entry_points(group="megarl.benchmarks")}
    return dict(sorted((own | declared).items()))


def load(name: str) -> ModuleType:
    """The module of a benchmark that `names` has."""
    return importlib.import_module(names()[name])
