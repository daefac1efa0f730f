"""`megarl bench learner`: both trainers do the same work. Its ratios are a benchmark's affair, not a test's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.bench import learner

pytestmark = pytest.mark.slow


@pytest.mark.parallel
def test_trainers_compute_the_same(tmp_path: Path, bench: Callable[..., None]) -> None:
    """Four trainings of 6 sequences: first losses equal to 1e-4 (the benchmark refuses otherwise), all rates there."""
    bench("learner", "--json", tmp_path / "learner.json", "--sequences", 6, "--repeats", 1)
    rows = json.loads((tmp_path / "learner.json").read_text())["rows"]
    assert [(row["trainer"], row["work"]) for row in rows] == [
        ("megarl", "packed"), ("transformers", "packed"), ("megarl", "padded"), ("transformers", "padded"),
    ]  # fmt: skip
    first = [row["first_loss"] for row in rows]
    assert max(first) - min(first) < 1e-4 < first[0]
    assert all(row["ratio"] > 0 and row["over_padded"] > 0 for row in rows)


def test_rows_have_every_sequence_once_and_filling_trains_nothing() -> None:
    samples = learner.draw(20)
    for rows in (learner.packed(samples), learner.padded(samples)):
        assert sorted(id(s) for row in rows for s in row) == sorted(map(id, samples))
    for row in learner.padded(samples):
        filled = learner.filled(row)
        longest = max(s.input_length for s in row)
        assert sum(s.input_length for s in filled) == len(row) * longest <= learner.ROOM
        assert sum(s.scale > 0 for s in filled) == len(row)
