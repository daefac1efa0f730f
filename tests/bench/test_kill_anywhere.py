"""`megarl bench kill_anywhere` with a few kills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.bench.kill_anywhere import VICTIMS

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]


def test_nothing_is_lost_or_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., None]
) -> None:
    """Real processes die by SIGKILL; the ledger's audit is clean, and metrics and ledger equal the untouched run's.

    Checkpoints are written asynchronously. Moments are random in time: no two runs of this test kill at the same point.
    """
    monkeypatch.chdir(Path(__file__).parents[2])
    file = tmp_path / "kills.json"
    asked = ("--variant", "async_saves", "--overrides", "steps=4", "--runs", tmp_path / "runs")
    bench("kill_anywhere", "--kills", 4, "--json", file, *asked)
    (row,) = json.loads(file.read_text())["rows"]
    assert row["kills"] == sum(row[victim] for victim in VICTIMS) == 4 and row["engine"] == 0
    deadly = row["kills"] - row["grader"]
    assert row["resumes"] in (deadly, deadly - 1)  # the last may fall on a run that has just come to its end
    assert row["prompts"] >= 16
    assert row["lost"] == row["repeated"] == row["missing_steps"] == row["differing"] == row["left_behind"] == 0
