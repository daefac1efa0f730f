"""When which rank was in which phase, and the trace made from it. Not proven: that Perfetto draws it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megarl.errors import UserError
from megarl.run.timeline import PhaseLog, read_phases
from megarl.view import trace
from megarl.view.progress import RunProgress, Stopwatch


def logged(run: Path, rank: int, steps: range) -> None:
    log = PhaseLog(run, rank)
    watch = Stopwatch(RunProgress(9, quiet=True), log, 60.0)
    for step in steps:
        watch.step = step
        for phase in ("rollout", "train"):
            with watch(phase):
                pass
    log.close()


def test_every_rank_and_phase_is_a_slice_with_its_duration(tmp_path: Path) -> None:
    for rank in (0, 1):
        logged(tmp_path, rank, range(1, 4))
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "reward": 0.5}\n')
    spans = read_phases(tmp_path)
    events = json.loads(trace.write(tmp_path).read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert sorted((e["pid"], e["args"]["step"], e["name"]) for e in slices) == sorted(
        (rank, step, phase) for rank in (0, 1) for step in (1, 2, 3) for phase in ("rollout", "train")
    )
    for span, event in zip(spans, slices, strict=True):
        assert event["ts"] == round(1e6 * (span.begin - spans[0].begin))
        assert event["dur"] == round(1e6 * (span.end - span.begin)) >= 0
    assert [e["args"] for e in events if e["ph"] == "C"] == [{"reward": 0.5}]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"rank 0", "rank 1"}


def test_a_killed_run_shows_where_it_was_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    """The begin without an end, and the line cut in its middle, of the first attempt."""
    logged(tmp_path, 0, range(1, 2))
    file = tmp_path / "phases" / "rank_00000.jsonl"
    began = json.loads(file.read_text().splitlines()[-1])[3] + 1
    with file.open("a") as out:
        out.write(json.dumps(["B", "rollout", 2, began]) + "\n" + '["E", "rol')
    assert [(s.phase, s.step, s.end is None) for s in read_phases(tmp_path)][-1] == ("rollout", 2, True)
    logged(tmp_path, 0, range(2, 3))
    again = [(s.phase, s.step, s.end is None) for s in read_phases(tmp_path)]
    assert again.count(("rollout", 2, True)) == 1
    assert again.count(("rollout", 2, False)) == again.count(("train", 2, False)) == 1


def test_a_clock_that_jumps_bends_no_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour back in mid-phase."""
    log = PhaseLog(tmp_path, 0)
    with log.span("train", 1):
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 3600)
    log.close()
    (span,) = read_phases(tmp_path)
    assert span.end is not None and 0 <= span.end - span.begin < 60


def test_a_run_without_phases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no phases"):
        trace.write(tmp_path)
