"""Over several epochs, with pruning, through an interruption: every prompt is accounted for exactly once an epoch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarl.data.ledger import Fate, Ledger
from megarl.data.order import EpochOrder
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]

PROMPTS = 10


def settings(run: Path, problems: Path) -> Any:
    """Eight steps of 4 prompts out of 10: more than three epochs, some steps across their seams."""
    return runs.settings(
        run,
        f"data.train=[{problems}]",
        "parallel={}",
        "batch={prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}",
        "rollout.max_response_tokens=16",
        "steps=8",
        "checkpoint={every: 4, keep: 3}",
        "pruning={prompts: 0.5, completions: 0.5}",
    )


def test_every_prompt_once_an_epoch(tmp_path: Path) -> None:
    """Cut back to step 4 and resumed, the ledger equals the uninterrupted run's and agrees with the epochs' orders.

    One process, ended between steps; kills at any moment are for the Slurm tests.
    """
    problems = tmp_path / "problems.jsonl"
    lines = (runs.QUICKSTART / "problems" / "train.jsonl").read_text().splitlines(keepends=True)
    problems.write_text("".join(lines[:PROMPTS]))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = settings(whole, problems)
    metrics = runs.run(wanted)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_000008")
    assert runs.run(settings(cut, problems), resume=True) == metrics

    ledger = Ledger.load(whole / "checkpoints" / "step_000008")
    assert list(ledger) == list(Ledger.load(cut / "checkpoints" / "step_000008"))
    with np.load(whole / "checkpoints" / "step_000008" / "data.npz", allow_pickle=False) as state:
        position = int(state["position"])
    assert ledger.audit(EpochOrder(PROMPTS, wanted.seed, wanted.data.shuffle), position).clean
    entries = [entry for step in ledger for entry in step.entries]
    assert len(entries) == position == sum(line["prompts_drawn"] for line in metrics)
    assert sum(entry.fate is Fate.PRUNED for entry in entries) == sum(line["prompts_pruned"] for line in metrics) > 0
    dropped = sum(entry.completions - entry.trained for entry in entries)
    assert dropped == sum(line["completions_dropped"] for line in metrics)
    assert [step.version for step in ledger] == [line["weight_version"] for line in metrics] == list(range(8))
