"""`megarl bench memory`: what it plans and measures, on the smallest of its layouts."""

from __future__ import annotations

import pytest

from megarl.bench.memory import compare


@pytest.mark.parallel
def test_one_rank_takes_the_memory_that_was_planned() -> None:
    """One rank, one stage. The benchmark's own claim is 10 % on a quiet machine; here a lost or doubled part shows."""
    (row,) = compare(["tp1"])
    assert (row["layout"], row["stage"]) == ("tp1", 0)
    assert row["error"] == pytest.approx(row["planned_mib"] / row["measured_mib"] - 1)
    assert abs(row["error"]) < 0.1
