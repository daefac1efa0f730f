"""Where code stands: floors as the package's docstring says, no circles, small files, few flat modules.

Imports are read from the source, those for type checkers and those inside functions included.
"""

from __future__ import annotations

import ast
import graphlib
import re
from itertools import pairwise
from pathlib import Path

import megarl

ROOT = Path(__file__).parents[1]
PRODUCT = ("megarl", "checkpoints_conv", "tools")
APART = ("data", "rewards", "rollout", "learner")


def modules() -> dict[str, Path]:
    """Every Python module of the product by its dotted name; stand-ins for other packages are not ours to sort."""
    files = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py") if "sglang_cpu" not in file.parts]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imports(module: str) -> set[str]:
    """The product's modules that a module imports, anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found & MODULES.keys() - {module}


def room(module: str) -> str:
    """`megarl.rollout.local.engine` stands in the room `rollout`."""
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "megarl" else package


def floors() -> dict[str, int]:
    """Room to floor, 0 the lowest, as the package's docstring draws them."""
    lines = re.findall(r"^ {4}(\w+(?:, \w+)*)$", megarl.__doc__ or "", re.M)
    return {name: floor for floor, line in enumerate(reversed(lines)) for name in line.split(", ")}


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room(module) for module in MODULES if module.startswith("megarl.")}
    assert rooms == floors().keys()


def test_a_module_imports_only_from_its_own_room_and_the_floors_below() -> None:
    floor = floors()
    upwards = [
        f"{module} -> {other}"
        for module in MODULES
        if module.startswith("megarl.")
        for other in imports(module) - {"megarl"}
        if room(other) != room(module) and floor.get(room(other), 99) >= floor[room(module)]
    ]
    assert not upwards


def test_components_do_not_reach_for_each_other() -> None:
    reaching = [
        f"{module} -> {other}"
        for module in MODULES
        for other in imports(module)
        if room(module) in APART and room(other) in APART and room(other) != room(module)
    ]
    assert not reaching


def test_no_circle_of_imports() -> None:
    """Not one, at type checking included: graphlib raises CycleError naming the modules."""
    list(graphlib.TopologicalSorter({module: imports(module) - {"megarl"} for module in MODULES}).static_order())


def test_a_circle_would_be_seen() -> None:
    """The check above can fail: the same graph with one arrow back is refused."""
    graph = {module: imports(module) - {"megarl"} for module in MODULES}
    one, other = next((module, min(found)) for module, found in graph.items() if found)
    graph[other] = graph[other] | {one}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as e:
        assert any({one, other} <= set(pair) for pair in pairwise(e.args[1]))
    else:
        raise AssertionError("the circle was not seen")


def test_files_are_small_and_few_lie_flat() -> None:
    long = {module: n for module, file in MODULES.items() if (n := len(file.read_text().splitlines())) > 500}
    assert not long
    assert len(list((ROOT / "megarl").glob("*.py"))) <= 12
