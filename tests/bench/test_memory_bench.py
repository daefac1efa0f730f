"""`megarl bench memory`: what it plans and measures, on the smallest of its layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parallel
def test_one_rank_takes_the_memory_that_was_planned(tmp_path: Path, bench: Callable[..., None]) -> None:
    """One rank, one stage. The benchmark's own claim is 10 % on a quiet machine; here a lost or doubled part shows."""
    bench("memory", "--layout", "tp1", "--json", tmp_path / "memory.json")
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert (row["layout"], row["stage"]) == ("tp1", 0)
    assert row["error"] == pytest.approx(row["planned_mib"] / row["measured_mib"] - 1)
    assert abs(row["error"]) < 0.1


def test_an_unknown_layout_is_refused(bench: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=r"--layout: 'tp3' is not one of tp1, .*did you mean 'tp"):
        bench("memory", "--layout", "tp3")
