"""A run that is cut after any step and resumed is the uninterrupted run, bit by bit, with evaluation at every step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megarl import config
from megarl.run import atomic
from megarl.run.directory import read_metrics
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]

STEPS = 5


def settings(run: Path, held_out: Path, *more: str) -> config.Settings:
    """More held-out problems than slots. `tis_cap` brings the engine's rounding into the weights."""
    return runs.settings(
        run, f"steps={STEPS}", "checkpoint={every: 1, keep: 9}", "evaluation.every=1", f"data.eval=[{held_out}]",
        "algorithm.tis_cap=2", "rollout.local_max_sequences=16", "parallel={}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """The uninterrupted run, the held-out problems, and the metrics."""
    folder = tmp_path_factory.mktemp("whole")
    held_out = folder / "held_out.jsonl"
    problems = (runs.QUICKSTART / "problems" / "heldout.jsonl").read_text().splitlines(keepends=True)
    held_out.write_text("".join(problems[:40]))
    metrics = runs.run(settings(folder / "run", held_out))
    assert all("eval/accuracy" in line for line in metrics) and len(metrics) == STEPS + 1
    return folder / "run", held_out, metrics


def state(run: Path) -> dict[str, str]:
    """The checksums of the last checkpoint's weights, optimizer, data position and ledger."""
    manifest = json.loads((atomic.folder_of(run / "checkpoints", STEPS) / atomic.MANIFEST).read_text())
    return {name: sha for name, sha in manifest["sha256"].items() if name.endswith((".distcp", ".npz", "ledger.jsonl"))}


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_cut_after_any_step_goes_on_bit_by_bit(
    whole: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path, step: int
) -> None:
    """Beside the checkpoint lie a note, a link and half of another save, which change nothing.

    Without `Sampling.forget`, the evaluation stays in the cache of the engine, and the next step rounds otherwise.
    """
    folder, held_out, metrics = whole
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    shutil.copytree(folder, run)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(atomic.folder_of(checkpoints, later))
    (atomic.folder_of(checkpoints, step) / "notes.txt").write_text("the best one so far")
    (checkpoints / "step_best").symlink_to(atomic.folder_of(checkpoints, step))
    (atomic.partial_of(checkpoints, 77) / "learner").mkdir(parents=True)
    assert runs.run(settings(run, held_out), resume=True) == metrics
    assert state(run) == state(folder)
    assert not atomic.partial_of(checkpoints, 77).exists()


def test_with_async_steps_the_prompts_are_those_of_the_uninterrupted_run(
    whole: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """And the first resumed step is on-policy: what had run ahead is rolled out again (docs/concepts.md)."""
    ahead = settings(tmp_path / "run", whole[1], "async_steps=1")
    spawn(train, 1, (ahead,), runs.DEADLINE)
    uninterrupted = {step: _prompts(ahead.run, step) for step in range(1, STEPS + 1)}
    assert [line["staleness_max"] for line in read_metrics(ahead.run)[1:]] == [0, 1, 1, 1, 1]
    for later in range(3, STEPS + 1):
        shutil.rmtree(atomic.folder_of(ahead.run / "checkpoints", later))
    spawn(train, 1, (ahead, True), runs.DEADLINE)
    assert {step: _prompts(ahead.run, step) for step in range(1, STEPS + 1)} == uninterrupted
    assert [line["staleness_max"] for line in read_metrics(ahead.run)[1:]] == [0, 1, 0, 1, 1]


def _prompts(run: Path, step: int) -> list[str]:
    lines = (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line)["uid"] for line in lines]
