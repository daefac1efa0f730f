"""The end-to-end tests share `runs.py`; the graders import the quick start's module from the repository's root."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reward.function: examples.quickstart…` is importable from the root, as in the README's commands."""
    monkeypatch.chdir(Path(__file__).parents[2])
