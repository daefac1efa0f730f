"""examples/own_model as a newcomer runs it, in a copy of the folder: SmolLM2-135M from its package or, where that
cannot be fetched, a random model of its shape. Not proven: that four steps teach it anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.own_model.reward import grade
from tests.support import pages
from tests.support.real_model import smollm2_folder

pytestmark = pytest.mark.slow

EXAMPLE = pages.ROOT / "examples" / "own_model"
FILES = ("train.yaml", "reward.py", "problems.jsonl")
TIMEOUT = 580.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_folder(tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct")


def megarl(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    return subprocess.run([sys.executable, "-m", "megarl.cli", *map(str, words)], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=TIMEOUT)  # fmt: skip


def test_the_example_is_small() -> None:
    lines = {file: len((EXAMPLE / file).read_text().splitlines()) for file in FILES}
    assert sum(lines.values()) <= 30 and lines["train.yaml"] <= 15
    assert f"Three files, {sum(lines.values())} lines" in (EXAMPLE / "README.md").read_text()
    assert len((EXAMPLE / "README.md").read_text().split()) <= 250


@pytest.mark.timeout(600)
def test_own_model_data_and_reward_train(model: Path, tmp_path: Path) -> None:
    """The README's commands, with the model's folder for its Hub id and two steps: exit code 0, every response graded
    by the example's function, and weights that changed."""
    for file in FILES:
        shutil.copy(EXAMPLE / file, tmp_path)
    looked = megarl(tmp_path, "train", "train.yaml", f"model.path={model}", "--dry-run")
    assert looked.returncode == 0, looked.stderr[-2000:]
    assert "6 of 6 prompts" in looked.stderr and not (tmp_path / "runs").exists()
    trained = megarl(tmp_path, "train", "train.yaml", f"model.path={model}", "steps=2")
    assert trained.returncode == 0, trained.stderr[-4000:]
    run = tmp_path / "runs" / "own_model"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(0 < line["grad_norm"] < 1e4 for line in metrics if line["completions_dropped"] < 16)
    for step in (1, 2):
        rollouts = (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        assert len(rollouts) == 16
        for rollout in map(json.loads, rollouts):
            assert rollout["reward"] == pytest.approx(grade(rollout["response"], rollout["answer"]))
    assert (run / "report.html").is_file()
    advised = megarl(tmp_path, "markers", model, "--prompts", "problems.jsonl", "--samples", 2, "--tokens", 16)
    assert advised.returncode == 0 and "recipe: step_grpo" in advised.stdout, advised.stderr[-2000:]
