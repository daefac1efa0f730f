"""`megarl bench planner` on the published runs of examples/planner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_committed_errors_are_reproduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., None]
) -> None:
    """docs/results/planner.json follows from the planner and the shipped table, to rounding."""
    monkeypatch.chdir(ROOT)
    bench("planner", "--json", tmp_path / "planner.json")
    made = json.loads((tmp_path / "planner.json").read_text())
    committed = json.loads((ROOT / "docs" / "results" / "planner.json").read_text())
    assert made["skipped"] == committed["skipped"]
    assert made["summary"] == pytest.approx(committed["summary"])
    assert made["details"] == pytest.approx(committed["details"])


def test_a_table_that_is_not_there_is_named(tmp_path: Path, bench: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=r"--runs: .*absent\.csv does not exist"):
        bench("planner", "--runs", tmp_path / "absent.csv")
