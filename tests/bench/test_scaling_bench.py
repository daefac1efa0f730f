"""`megarl bench scaling`: the table of runs that slurm/scaling.sh submits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.bench.scaling import rows
from megarl.errors import UserError


def write(folder: Path, nodes: int, seconds: list[float]) -> None:
    run = folder / f"nodes-{nodes}"
    run.mkdir(parents=True)
    phases = ("rollout", "train", "sync", "total")
    lines = [
        {"step": i + 1, "tokens_generated": 1000, **{f"seconds_{phase}": s for phase in phases}}
        for i, s in enumerate(seconds)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rows_compare_against_the_fewest_nodes(tmp_path: Path) -> None:
    """The first step (compilation, caches) is left out; medians; a run that has not got to a second step is too."""
    write(tmp_path, 2, [99.0, 10.0, 12.0, 11.0])
    write(tmp_path, 16, [99.0, 2.0, 2.0, 2.0])
    write(tmp_path, 4, [99.0])
    small, large = rows(tmp_path)
    assert (small["nodes"], small["seconds_total"], small["speedup"]) == (2, 11.0, 1.0)
    assert (large["nodes"], large["speedup"], large["efficiency"]) == (16, 5.5, 5.5 * 2 / 16)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nodes-N"):
        rows(tmp_path)
