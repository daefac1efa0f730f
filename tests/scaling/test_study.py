"""A study does each cell once, whatever interrupts it, and its mistakes are named.

Not proven here: training cells (tests/docs runs the studies of examples/scaling).
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megarl.bench.common import training_runs
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.scaling import cells, plot, study, table
from tests.support.studies import LINE, SOME, TRAINED, Tool, write

ROOT = Path(__file__).parents[2]
EXAMPLES, RESULTS = ROOT / "examples" / "scaling", ROOT / "docs" / "results"
SVG = "{http://www.w3.org/2000/svg}"
KILLED = """
import os, signal
from megarl import cli
from megarl.scaling import cells
plan, begun = cells.plan, []
def killed(*arguments):
    begun.append(arguments)
    if len(begun) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return plan(*arguments)
cells.plan = killed
cli.main()
"""
TIMEOUT = 280.0


def test_a_killed_study_does_only_what_is_missing(tmp_path: Path, tool: Tool) -> None:
    """Killed (SIGKILL) amid the third of four cells; started again, it does the other two alone: what was done keeps
    its time. Not shown: a training run cut amid its steps, which is resumed as any run (tests/e2e)."""
    file, out = write(tmp_path, SOME), tmp_path / "out"
    words = [sys.executable, "-c", KILLED, "scaling", "run", str(file), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begun = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=TIMEOUT)
    assert begun.returncode == -signal.SIGKILL, begun.stderr
    done = {cell: cell.stat().st_mtime_ns for cell in (out / "cells").glob("*.json")}
    assert len(done) == 2

    assert "4 cells done, 0 missing" in tool("run", file, "--out", out).replace("\n", " ")
    assert {cell: cell.stat().st_mtime_ns for cell in done} == done
    assert len(list(csv.DictReader((out / "results.csv").open()))) == 4


def test_a_runs_metrics_leave_out_evaluation_and_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic on made-up metrics; examples/scaling/group_size.yaml shows that cells train for real."""
    metrics = [{"step": 0, "eval/accuracy": 0.1}, {**LINE, "step": 1, "seconds_total": 99.0}, {**LINE, "step": 2},
               {**LINE, "step": 3, "grad_norm": 3.0, "eval/accuracy": 0.7}]  # fmt: skip
    monkeypatch.setattr(training_runs, "trained", lambda settings, ranks: metrics)
    monkeypatch.chdir(ROOT)
    wanted = study.Study.model_validate(TRAINED | {"skip": 1})
    found = cells.do(wanted, 0, tmp_path)
    expected = {"step_seconds": 4.0, "tokens_per_second": 100.0, "train_tokens_per_second": 50.0, "accuracy": 0.7}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert (found["rollout_tokens_per_second"], found["grad_norm"], found["sync_seconds"]) == (200.0, 2.0, 0.5)
    assert cells.missing(wanted, tmp_path) == [1]


def test_a_prediction_to_1024_gpus_is_plotted_with_its_law(tmp_path: Path, tool: Tool) -> None:
    """The committed study, made anew: the same metrics and laws, SVG that parses, efficiency at most 1."""
    tool("run", EXAMPLES / "to_1024_gpus.yaml", "--out", tmp_path, "--json", tmp_path / "made.json")
    made = json.loads((tmp_path / "made.json").read_text())
    committed = json.loads((RESULTS / "scaling_to_1024_gpus.json").read_text())
    assert made["missing"] == 0 and len(made["rows"]) == 12
    for ours, theirs in zip(made["rows"], committed["rows"], strict=True):
        assert ours.pop("precision.dtype") == theirs.pop("precision.dtype")
        assert ours == pytest.approx(theirs, rel=1e-6), committed["command"]
    for metric, lines in committed["laws"].items():
        for line, law in lines.items():
            assert made["laws"][metric][line] == pytest.approx(law, rel=1e-6)
        ElementTree.parse(tmp_path / f"made_{metric}.svg")
    assert {row["gpus"]: row["efficiency"] for row in made["rows"]}[32] == 1.0
    assert all(row["efficiency"] <= 1.0 + 1e-9 for row in made["rows"])


@pytest.mark.parametrize("other", [{"settings": {"batch.tokens_per_row": 20480}}, {"gpu": "b200"}])
def test_cells_made_otherwise_are_refused(other: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are kept makes no difference, nor does a setting that was added since, at its default."""
    monkeypatch.chdir(ROOT)
    wanted = study.Study.model_validate(SOME)
    metrics = cells.do(wanted, 0, tmp_path / "here")
    with pytest.raises(UserError, match="other settings"):
        cells.do(wanted.model_copy(update=other), 0, tmp_path / "here")
    [file] = (tmp_path / "here" / "cells").iterdir()
    kept = json.loads(file.read_text())
    del kept["made"]["settings"]["heartbeat_timeout"]
    file.write_text(json.dumps(kept | {"metrics": metrics | {"mfu": 0.123}}))  # not made again
    (tmp_path / "here").rename(tmp_path / "there")
    assert cells.do(wanted, 0, tmp_path / "there")["mfu"] == 0.123


def test_what_cannot_run_is_refused_before_the_first_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three cells asks for a layout that the model's heads do not allow."""
    monkeypatch.chdir(ROOT)
    wanted = study.Study.model_validate(TRAINED | {"vary": {"parallel.tp": [1, 2, 3]}, "x": "parallel.tp"})
    with pytest.raises(UserError, match="tp=3.*parallel.tp"):
        cells.check(wanted, tmp_path)


def test_the_summary_has_standard_errors_over_seeds() -> None:
    """A metric that a seed lacks (an accuracy it never reached) has no mean."""
    wanted = study.Study.model_validate(TRAINED | {"seeds": [0, 1]})
    rows = [
        {"batch.completions_per_prompt": g, "seed": seed, "grad_norm": g + 2.0 * seed, "seconds_to_target": seconds}
        for g, seed, seconds in ((2, 0, 9.0), (2, 1, None), (4, 0, 9.0), (4, 1, 9.0))
    ]
    found = table.summary(wanted, rows)
    assert [(r["grad_norm"], r["grad_norm_error"], r["seeds"]) for r in found] == [(3.0, 1.0, 2), (5.0, 1.0, 2)]
    assert [r["seconds_to_target"] for r in found] == [None, 9.0]


def test_zero_and_negative_metrics_are_plotted_without_a_law() -> None:
    """Pruning rates start at 0, rewards may be negative: linear axes; error bars are Student's, of two seeds 12.7."""
    wanted = study.Study.model_validate(TRAINED | {"seeds": [0, 1], "vary": {"pruning.prompts": [0, 0.5]},
                                                   "x": "pruning.prompts", "y": ["reward"]})  # fmt: skip
    rows = [{"pruning.prompts": p, "seed": s, "reward": p - 0.2 + 0.1 * s} for p in (0, 0.5) for s in (0, 1)]
    points = table.summary(wanted, rows)
    assert plot.laws(wanted, rows, "reward") == {}
    picture = ElementTree.fromstring(plot.svg(wanted, rows, points, "reward"))
    heights = [float(dot.get("cy")) for dot in picture.iter(f"{SVG}circle")]
    bars = [bar.get("d").replace("M", "").replace("V", " ").split() for bar in picture.iter(f"{SVG}path")]
    spans = [float(low) - float(high) for _, low, high in bars]
    assert len(heights) == 2 and heights[0] > heights[1]
    assert spans[0] / (heights[0] - heights[1]) == pytest.approx(2 * 12.706 * 0.05 / 0.5, rel=0.01)


def test_models_are_told_apart_by_their_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`x: parameters` where model.path varies: each row has its model's number, and the summary keeps it."""
    monkeypatch.chdir(ROOT)
    models = [f"examples/scaling/sizes/h{width}" for width in (128, 256)]
    wanted = study.Study.model_validate(SOME | {"vary": {"model.path": models}, "x": "parameters",
                                                "settings": {"parallel.tp": 1, "parallel.pp": 1}})  # fmt: skip
    for number in range(2):
        cells.do(wanted, number, tmp_path)
    points = table.summary(wanted, cells.results(wanted, tmp_path))
    count = {width: read_shape(Path(f"examples/scaling/sizes/h{width}")).parameters() for width in (128, 256)}
    assert [point["parameters"] for point in points] == [count[128], count[256]]
    assert 200_000 < count[128] < count[256] / 3
    assert ">300k<" in plot.svg(wanted, cells.results(wanted, tmp_path), points, "mfu") and count[128] == 300_288
    with pytest.raises(ValueError, match="model.path"):
        study.Study.model_validate(SOME | {"x": "parameters"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vary": {"batch.completions_per_promt": [2]}}, ["completions_per_promt", "'batch.completions_per_prompt'"]),
        ({"x": "gpus"}, ["x", "does not vary"]),
        ({"how": "predicted", "seeds": [0, 1], "y": ["mfu"]}, ["seeds", "no seed"]),
        ({"hwo": "local"}, ["hwo"]),
        ({"y": ["grad_nrom"]}, ["y", "'grad_norm'"]),
        ({"y": ["seconds_to_target"]}, ["target"]),
        ({"vary": {"precision.dtype": ["fp32"]}, "x": "precision.dtype"}, ["x", "fp32", "not a number"]),
        ({"settings": {"seed": 3}}, ["seed", "seeds"]),
        ({"how": "slurm", "vary": {"nodes": [2]}, "x": "nodes"}, ["script"]),
        ({"how": "slurm", "script": "slurm/train_qwen3_4b.sh"}, ["slurm study varies nodes"]),
        ({"vary": {"nodes": [2]}, "x": "nodes"}, ["others vary gpus"]),
        ({"vary": {}, "points": [{"gpus": 1}, {"parallel.tp": 2}], "x": "gpus"}, ["x", "gpus", "every point"]),
    ],
)
def test_mistakes_are_named(change: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        study.read(write(tmp_path, TRAINED | change))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)
