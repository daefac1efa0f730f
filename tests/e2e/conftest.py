"""The end-to-end tests share `runs.py`; the graders import the quick start's module from the repository's root."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reward.function: examples.quickstart…` is importable from the root, as in the README's commands."""
    monkeypatch.chdir(Path(__file__).parents[2])
