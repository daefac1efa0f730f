"""`megarl bench early_exit`: what it compares is what it says. Its figures are a benchmark's affair, not a test's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_schedules_and_refusals_change_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., None]
) -> None:
    """Four problems: both schedules make the same completions, and so do trials that are refused early."""
    monkeypatch.chdir(Path(__file__).parents[2])
    bench("early_exit", "--json", tmp_path / "early_exit.json", "--batch", 4, "--repeats", 1)
    rows = json.loads((tmp_path / "early_exit.json").read_text())["rows"]
    kinds = [(row["probes"], row["schedule"]) for row in rows]
    assert kinds == [(p, s) for p in ("every", "once", "once_whole") for s in ("blocking", "speculative")]
    for blocking, speculative in (rows[:2], rows[2:4], rows[4:]):
        for figure in ("exits", "probes_each", "tokens", "tokens_a_probe"):
            assert blocking[figure] == speculative[figure], figure
    every, once, whole = rows[0], rows[2], rows[4]
    assert 0 < once["probes_each"] <= 1 < every["probes_each"]
    assert once["tokens"] == whole["tokens"] and once["tokens_a_probe"] < whole["tokens_a_probe"]
