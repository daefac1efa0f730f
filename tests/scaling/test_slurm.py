"""Slurm gets the cells that are missing: an array of one-node cells, or one job per cell of several nodes.

`sbatch` is replaced by a script that records its arguments. Not proven here: a real Slurm (tests/slurm has one).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megarl.errors import DeadlineExceeded, UserError
from megarl.scaling import cells, command, study
from tests.support.studies import LINE, SOME, Tool, write

TIMEOUT = 280.0
NODES = {
    "name": "nodes", "how": "slurm", "base": "slurm/configs/qwen3_32b.yaml", "script": "slurm/train_qwen3_32b.sh",
    "settings": {"steps": 3, "data.eval": []}, "vary": {"nodes": [4, 6]}, "x": "nodes", "y": ["efficiency"],
}  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which `sbatch` writes RUN and its arguments, one job a line, with tabs between."""
    stub = tmp_path / "sbatch"
    stub.write_text(f'#!/bin/sh\n(printf "$RUN"; printf "\\t%s" "$@"; echo) >> {tmp_path}/asked\necho Submitted job\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("RUN", raising=False)
    return tmp_path / "asked"


def test_slurm_gets_an_array_of_what_is_missing(tmp_path: Path, tool: Tool, asked: Path) -> None:
    """The array's task, run by hand, does the cell of its number."""
    file, out = write(tmp_path, SOME), tmp_path / "out"
    wanted = study.read(file)
    for number in (0, 2):
        cells.do(wanted, number, out)
    assert "2 cells" in tool("submit", file, "--out", out, "--sbatch", "--partition cpu")
    (job,) = asked.read_text().splitlines()
    words = job.split("\t")
    assert "--array=1,3%4" in words and "--partition" in words
    line = next(word for word in words if word.startswith("--wrap=")).removeprefix("--wrap=")
    subprocess.run(["sh", "-c", line], env=os.environ | {"SLURM_ARRAY_TASK_ID": "3"}, check=True, timeout=TIMEOUT)
    assert cells.missing(wanted, out) == [1]


def test_each_cell_is_a_job_of_its_nodes(tmp_path: Path, tool: Tool, asked: Path) -> None:
    """A job has its nodes, its run directory and the settings. `show` reads the finished run and skips the other."""
    file, out = write(tmp_path, NODES), tmp_path / "out"
    assert "2 cells" in tool("submit", file, "--out", out, "--sbatch", "--time 60")
    jobs = [line.split("\t") for line in asked.read_text().splitlines()]
    for (run, *words), nodes in zip(jobs, (4, 6), strict=True):
        assert run.startswith(f"{out}/runs/") and f"--nodes={nodes}" in words and "--time" in words
        assert words[-4:] == ["slurm/train_qwen3_32b.sh", "data.eval=[]", "steps=3", "seed=0"]
    for (run, *_), steps, seconds in zip(jobs, (3, 2), (10.0, 8.0), strict=True):
        Path(run).mkdir(parents=True)
        lines = [{**LINE, "seconds_total": seconds, "step": step + 1} for step in range(steps)]
        (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "1 cells done, 1 missing" in tool("show", file, "--out", out).replace("\n", " ")

    with (Path(jobs[1][0]) / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({**LINE, "seconds_total": 8.0, "step": 3}) + "\n")
    tool("show", file, "--out", out, "--json", tmp_path / "made.json")
    four, six = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert (four["efficiency"], six["efficiency"]) == (1.0, pytest.approx(2.0 * 4 / 6))  # 4 s without evaluation, 2 s


def test_a_script_that_trains_something_else_is_refused(tmp_path: Path, tool: Tool, asked: Path) -> None:
    file = write(tmp_path, NODES | {"script": "slurm/train_qwen3_4b.sh"})
    with pytest.raises(UserError, match=r"script: .*qwen3_32b\.yaml"):
        tool("submit", file, "--out", tmp_path / "out")
    assert not asked.exists()


def test_run_is_refused_for_jobs_of_several_nodes(tmp_path: Path, tool: Tool) -> None:
    with pytest.raises(UserError, match="megarl scaling submit"):
        tool("run", write(tmp_path, NODES), "--out", tmp_path / "out")


def test_a_slurm_that_does_not_answer_is_given_up(
    tmp_path: Path, tool: Tool, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(command, "SBATCH_TIMEOUT", 0.2)
    with pytest.raises(DeadlineExceeded, match="waiting for sbatch to take the job"):
        tool("submit", write(tmp_path, SOME), "--out", tmp_path / "out")
