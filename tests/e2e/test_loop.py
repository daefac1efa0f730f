"""The loop, run for real on gloo ranks with the real local engine and graders: repeatable, layout-free, resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel]

LAYOUTS = {"tp1": ([], 1), "tp2": (["parallel.tp=2"], 2), "pp3": (["parallel.pp=3"], 3), "dp2": ([], 2)}


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Four steps at tp2 with a checkpoint after the second, Step-GRPO and DPPO on."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, runs.run(reference_settings(folder))


def reference_settings(folder: Path, *more: str) -> Any:
    return runs.settings(
        folder, "parallel.tp=2", "steps=4", "checkpoint.every=2", "pruning={prompts: 0.5, completions: 0.5}", *more
    )


def test_same_seed_and_layout_repeat_bit_by_bit(reference: tuple[Path, list], tmp_path: Path) -> None:
    """Two runs give equal metrics, timings aside, and equal rollouts. Says nothing about other machines."""
    folder, metrics = reference
    again = runs.run(reference_settings(tmp_path / "run"))
    assert again == metrics
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    for step in (1, 4):
        assert rollouts(tmp_path / "run", step) == rollouts(folder, step)


def test_resumed_run_goes_on_as_if_never_stopped(reference: tuple[Path, list], tmp_path: Path) -> None:
    """Cut back to the checkpoint of step 2 and resumed, steps 3 and 4 are bit-equal: weights, optimizer, data order,
    pruning history and expected length all came back."""
    folder, metrics = reference
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    assert runs.run(reference_settings(tmp_path / "run"), resume=True) == metrics
    assert rollouts(tmp_path / "run", 4) == rollouts(folder, 4)


def test_layouts_draw_the_same_and_lose_the_same(tmp_path: Path) -> None:
    """tp1, tp2, pp3 and dp2: the same tokens are drawn, and losses and gradient norms agree to rounding."""
    seen = {}
    for name, (overrides, nproc) in LAYOUTS.items():
        folder = tmp_path / name
        metrics = runs.run(runs.settings(folder, "parallel={}", *overrides), nproc)
        seen[name] = metrics, [r["response_ids"] for step in (1, 2) for r in rollouts(folder, step)]
    expected, drawn = seen.pop("tp1")
    for name, (metrics, tokens) in seen.items():
        assert tokens == drawn, name
        for line, wanted in zip(metrics, expected, strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5), name
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4), name
