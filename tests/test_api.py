"""`import megarl`: the names that are public, their signatures, what importing costs, and that docs/python.md runs.
Not proven: that a notebook shows the ranks' progress."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megarl
from tests.support import pages

PUBLIC = ["Completion", "Engine", "Generation", "Prompt", "Sampling", "Settings", "evaluate", "load", "train"]
SIGNATURES = {
    "load": "(path: 'Path | str', overrides: 'list[str] | None' = None) -> 'Settings'",
    "train": "(settings: 'Settings', nproc: 'int | None' = None, resume: 'bool' = False, dry_run: 'bool' = False, "
    "allow_changes: 'bool' = False) -> 'list[dict[str, Any]]'",
    "evaluate": "(settings: 'Settings', trained: 'bool' = False, temperatures: 'list[float] | None' = None, "
    "nproc: 'int | None' = None, responses: 'Path | None' = None) -> 'list[dict[str, Any]]'",
}
HEAVY = ("torch", "pydantic", "transformers", "numpy", "yaml")


def python(code: str, folder: Path = pages.ROOT) -> str:
    """What a fresh interpreter prints; like a notebook, it has no file for its main module."""
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_public_names_are_these() -> None:
    assert megarl.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(megarl))
    with pytest.raises(AttributeError, match="'megarl' has no attribute 'trian'"):
        megarl.trian  # noqa: B018


def test_type_checkers_see_what_runs() -> None:
    """The imports for type checkers name the objects that the lazy names give."""
    [branch] = [node for node in ast.parse(Path(megarl.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {
        name.name: getattr(importlib.import_module(str(node.module)), name.name)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert seen == {name: getattr(megarl, name) for name in PUBLIC}


def test_signatures_are_these() -> None:
    assert {name: str(inspect.signature(getattr(megarl, name))) for name in SIGNATURES} == SIGNATURES


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    """Importing `megarl.train` and `megarl.evaluate`, as the launcher does, leaves the functions in place."""
    importlib.import_module("megarl.train")
    importlib.import_module("megarl.evaluate")
    assert inspect.isfunction(megarl.train) and inspect.isfunction(megarl.evaluate)
    assert megarl.train.__module__ == megarl.evaluate.__module__ == "megarl.launch"


def test_importing_is_instant() -> None:
    """Under 0.2 s of processor time, and nothing heavy imported; nor by the command line's help."""
    loaded = f"print([name for name in {HEAVY} if name in sys.modules])"
    clock = "import sys, time; start = time.process_time(); import megarl; spent = time.process_time() - start; "
    spent, found = python(f"{clock} print(spent); {loaded}").splitlines()
    assert float(spent) < 0.2
    assert found == "[]"
    help_page = "import sys, megarl.cli; sys.argv = ['megarl', '--help']\ntry: megarl.cli.main()\nexcept SystemExit: "
    assert python(help_page + loaded).splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    """docs/python.md, from top to bottom, in one interpreter: two steps are trained, evaluated and read back."""
    (tmp_path / "examples").symlink_to(pages.ROOT / "examples")
    code = "\n".join(block for _, block in pages.python(pages.ROOT / "docs" / "python.md"))
    printed = python(code, tmp_path)
    assert [line.split()[0] for line in printed.splitlines()[:3]] == ["0", "1", "2"]
    assert "accuracy" in printed
    assert printed.count("<think>") == 4  # a group of each of the four prompts
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
