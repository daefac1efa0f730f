"""A study does each cell once, whatever interrupts it; its mistakes are named; Slurm gets what is missing.

Not proven here: a real Slurm (the array's task is run by hand)."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

from megarl import bench
from megarl.errors import UserError
from megarl.scaling import cells, plot, study, table

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "scaling"
TRAINED = {
    "name": "tiny", "how": "local", "base": "examples/quickstart/train.yaml", "skip": 0, "y": ["grad_norm"],
    "settings": {
        "steps": 1, "parallel.tp": 1, "data.eval": [], "checkpoint.every": 0, "batch.prompts_per_step": 2,
        "rollout.max_response_tokens": 24,
    },
    "vary": {"batch.completions_per_prompt": [2, 4]}, "x": "batch.completions_per_prompt",
}  # fmt: skip
MANY = {
    "name": "many", "how": "predicted", "base": "examples/scaling/qwen3_32b/run.yaml", "x": "gpus", "y": ["mfu"],
    "vary": {"gpus": [32 * n for n in range(1, 101)], "batch.tokens_per_row": [18432 + 512 * n for n in range(10)]},
}  # fmt: skip
DEADLINE = 280.0


def write(folder: Path, tree: dict) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def tool(*arguments: object, path: str = os.defpath) -> subprocess.Popen[str]:
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "tools" / "scaling.py"), *map(str, arguments)], cwd=ROOT,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)  # fmt: skip


def test_a_killed_study_does_only_what_is_missing(tmp_path: Path) -> None:
    """Killed (SIGKILL) amid 1,000 cells; started again, it does the others alone: what was done keeps its time."""
    file, out = write(tmp_path, MANY), tmp_path / "out"
    begun = tool("run", file, "--out", out)
    until = time.monotonic() + DEADLINE
    while not list((out / "cells").glob("*.json")):
        assert begun.poll() is None, begun.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.001)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.communicate()
    done = {cell: cell.stat().st_mtime_ns for cell in (out / "cells").glob("*.json")}
    assert 0 < len(done) < 1000

    again = tool("run", file, "--out", out)
    printed, errors = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0, errors
    assert "1000 cells done, 0 missing" in printed.replace("\n", " ")
    assert {cell: cell.stat().st_mtime_ns for cell in done} == done
    assert len(list(csv.DictReader((out / "results.csv").open()))) == 1000


def test_the_figures_of_a_run_leave_evaluation_and_warm_up_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic on made-up metrics; that cells train for real, examples/scaling/group_size.yaml shows."""
    line = {
        "seconds_total": 10.0, "seconds_evaluation": 6.0, "seconds_rollout": 2.0, "seconds_train": 1.0,
        "seconds_logprobs": 1.0, "tokens_generated": 400, "tokens_trained": 100, "reward": 0.5, "response_tokens": 9.0,
        "packing_density": 0.9, "effective_sample_size": 8.0, "grad_norm": 1.0,
    }  # fmt: skip
    metrics = [{"step": 0, "eval/accuracy": 0.1}, {**line, "step": 1, "seconds_total": 99.0}, {**line, "step": 2},
               {**line, "step": 3, "grad_norm": 3.0, "eval/accuracy": 0.7}]  # fmt: skip
    trainer = SimpleNamespace(trained=lambda settings, ranks: metrics)
    monkeypatch.setitem(sys.modules, "megarl.bench._study", trainer)
    monkeypatch.setattr(bench, "_study", trainer, raising=False)
    monkeypatch.chdir(ROOT)
    wanted = study.Study.model_validate(TRAINED | {"skip": 1})
    figures = cells.do(wanted, 0, tmp_path)
    expected = {"step_seconds": 4.0, "tokens_per_second": 100.0, "train_tokens_per_second": 50.0, "accuracy": 0.7}
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert figures["rollout_tokens_per_second"] == 200.0 and figures["grad_norm"] == 2.0
    assert cells.missing(wanted, tmp_path) == [1]


def test_a_prediction_to_1024_gpus_is_plotted_with_its_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed study, made anew: tables, SVG that parses, efficiency 1 at the smallest size and never above."""
    monkeypatch.chdir(ROOT)
    wanted = study.read(EXAMPLES / "to_1024_gpus.yaml")
    for number in cells.missing(wanted, tmp_path):
        cells.do(wanted, number, tmp_path)
    rows = cells.results(wanted, tmp_path)
    points = table.summary(wanted, rows)
    assert {row["gpus"] for row in points} == {32, 64, 128, 256, 512, 1024}
    for line in table.lines(wanted, points).values():
        assert line[0]["efficiency"] == 1.0
        assert all(row["efficiency"] <= 1.0 + 1e-9 for row in line)
    for figure in wanted.y:
        assert len(plot.laws(wanted, rows, figure)) == 2
        ElementTree.fromstring(plot.svg(wanted, rows, points, figure))
    kept = {row["gpus"]: row["tokens_per_second"] for row in rows if row["precision.dtype"] == "bf16"}
    committed = csv.DictReader((EXAMPLES / "results" / "to_1024_gpus" / "results.csv").open())
    quoted = {int(r["gpus"]): float(r["tokens_per_second"]) for r in committed if r["precision.dtype"] == "bf16"}
    assert kept == pytest.approx(quoted, rel=1e-4), "python tools/scaling.py run examples/scaling/to_1024_gpus.yaml"


def test_cells_of_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wanted = study.read(EXAMPLES / "to_1024_gpus.yaml")
    cells.do(wanted, 0, tmp_path)
    other = wanted.model_copy(update={"settings": {"batch.tokens_per_row": 20480}})
    with pytest.raises(UserError, match="other settings"):
        cells.do(other, 0, tmp_path)


def test_the_summary_has_standard_errors_over_seeds() -> None:
    wanted = study.Study.model_validate(TRAINED | {"seeds": [0, 1]})
    rows = [{"batch.completions_per_prompt": g, "seed": s, "grad_norm": g + 2.0 * s} for g in (2, 4) for s in (0, 1)]
    assert [(r["grad_norm"], r["grad_norm_error"], r["seeds"]) for r in table.summary(wanted, rows)] == [
        (3.0, 1.0, 2),
        (5.0, 1.0, 2),
    ]


def test_slurm_gets_an_array_of_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sbatch` is replaced by one that writes its arguments down; the task that it was given does the missing cell."""
    monkeypatch.chdir(ROOT)
    file, out = EXAMPLES / "to_1024_gpus.yaml", tmp_path / "out"
    wanted = study.read(file)
    for number in range(12):
        if number not in (3, 7):
            cells.do(wanted, number, out)
    stub = tmp_path / "sbatch"
    stub.write_text(f'#!/bin/sh\nfor a in "$@"; do echo "$a" >> {tmp_path}/asked; done\necho Submitted batch job 1\n')
    stub.chmod(0o755)
    sent = tool("submit", file, "--out", out, "--sbatch", "--partition cpu", path=str(tmp_path))
    assert sent.wait(timeout=DEADLINE) == 0, sent.stderr.read()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--array=3,7%4" in asked and "--partition" in asked
    line = next(a for a in asked if a.startswith("--wrap=")).removeprefix("--wrap=")
    subprocess.run(["sh", "-c", line], env=os.environ | {"SLURM_ARRAY_TASK_ID": "7"}, check=True, timeout=DEADLINE)
    assert cells.missing(wanted, out) == [3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vary": {"batch.completions_per_promt": [2]}}, ["completions_per_promt", "'batch.completions_per_prompt'"]),
        ({"x": "gpus"}, ["x", "does not vary"]),
        ({"how": "predicted", "seeds": [0, 1]}, ["seeds", "no seed"]),
        ({"hwo": "local"}, ["hwo"]),
    ],
)
def test_mistakes_are_named(change: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        study.read(write(tmp_path, TRAINED | change))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)
