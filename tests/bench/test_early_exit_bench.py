"""`megarl bench early_exit`: what it compares is what it says. Its figures are a benchmark's affair, not a test's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_declined_probes_change_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., None]
) -> None:
    """Four problems, both schedules: at threshold 1 probes are asked and none exits; at the trained one some may."""
    monkeypatch.chdir(Path(__file__).parents[2])
    bench("early_exit", "--json", tmp_path / "early_exit.json", "--batch", 4, "--repeats", 1)
    rows = json.loads((tmp_path / "early_exit.json").read_text())["rows"]
    kinds = [(row["probes"], row["schedule"]) for row in rows]
    assert kinds == [(p, s) for p in ("declined", "once", "trained") for s in ("blocking", "speculative")]
    blocking, speculative = rows[:2]
    assert blocking["exits"] == speculative["exits"] == 0
    assert blocking["probes_each"] == speculative["probes_each"] > 0
    assert blocking["tokens"] == speculative["tokens"]
    assert all(row["exits"] == 0 and row["probes_each"] <= 1 for row in rows[2:4])
