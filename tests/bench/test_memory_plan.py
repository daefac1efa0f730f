"""`megarl bench memory`: the plan of each of its layouts, without running any."""

from __future__ import annotations

from pathlib import Path

from megarl.bench import memory
from megarl.bench.common.models import write_model
from megarl.config import Parallel


def test_the_plan_follows_the_layout(tmp_path: Path) -> None:
    """Halving a model over two ranks, recomputing and sharding the optimizer each take memory off the fullest rank."""
    write_model(tmp_path, **memory.MODEL)
    most = {}
    for layout, (ranks, sizes) in memory.LAYOUTS.items():
        plan = memory.planned(tmp_path, Parallel(**sizes), ranks)
        assert len(plan) == sizes.get("pp", 1)
        most[layout] = max(plan)
    assert most["tp1 full recompute"] < most["tp1"]
    assert most["tp2·pp2+sp"] < most["tp2+sp"] < most["tp2"] < most["tp1"]
    assert most["pp2"] < most["tp1"]
    assert most["dp2 distributed optimizer"] < most["dp2"]
