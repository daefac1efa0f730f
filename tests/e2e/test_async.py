"""Rollouts that run ahead of training, on the local engine: they overlap, staleness is bounded, nothing is drawn twice.

Says nothing about speed: learner and engine share this machine's cores.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from megarl import config
from megarl.data.ledger import Ledger
from megarl.errors import RunError
from megarl.run.directory import read_metrics
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]

AHEAD = ["async_steps=1", "algorithm.tis_cap=2"]


def settings(folder: Path, *overrides: str) -> config.Settings:
    return runs.settings(folder, "parallel={}", "optimizer.lr=1e-3", *AHEAD, *overrides)


def train_holding_back(wanted: config.Settings) -> list[int]:
    """Train; each update but the last waits until the engine has sampled for the step after it. Returns the tokens that
    were sampled during each update."""
    from megarl.learner.learner import Learner
    from megarl.rollout.local.engine import LocalEngine

    update, step = Learner.train_step, LocalEngine.step
    stepped, steps, during = threading.Event(), [0], []

    def noticed(self: LocalEngine) -> bool:
        steps[0] += 1
        stepped.set()
        return step(self)

    def held(self: Learner, *arguments: Any) -> Any:
        before = steps[0]
        stepped.clear()
        if len(during) + 1 < wanted.steps:
            assert stepped.wait(60), "no rollout goes on while the learner trains"
        result = update(self, *arguments)
        during.append(steps[0] - before)
        return result

    Learner.train_step, LocalEngine.step = held, noticed
    train(wanted)
    return during


def test_the_next_rollout_goes_on_while_a_step_trains(tmp_path: Path) -> None:
    """Proves the overlap, and that each step after the first is trained one update after the weights that sampled it;
    whole completions have one version each."""
    wanted = settings(tmp_path / "run", "steps=3")
    (during,) = spawn(train_holding_back, 1, (wanted,), runs.DEADLINE)
    assert all(during[:-1]) and not during[-1]
    metrics = read_metrics(wanted.run)
    assert [line["weight_version"] for line in metrics] == [0, 0, 1]
    assert [line["staleness_max"] for line in metrics] == [0, 1, 1]
    assert metrics[0]["mismatch_mean"] < 1e-3 < metrics[2]["mismatch_mean"]  # the policy moved since the rollout
    for step in (1, 2, 3):
        assert all(len(row["spans"]) == 1 for row in rows(wanted.run, step))


def test_a_resumed_run_trains_what_was_drawn_ahead(tmp_path: Path) -> None:
    """Cut back to a checkpoint made while the next step was being rolled out: the resumed run takes the very prompts of
    the uninterrupted one, and its ledger has each taken prompt once."""
    folder, again = tmp_path / "run", tmp_path / "again"
    pruned = ("steps=4", "checkpoint.every=2", "pruning={prompts: 0.5, completions: 0.5}")
    runs.run(settings(folder, *pruned))
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step_000004")
    runs.run(settings(again, *pruned), resume=True)
    ledgers = [Ledger.load(place / "checkpoints" / "step_000004") for place in (folder, again)]
    taken = [[[(e.index, e.epoch) for e in step.entries] for step in ledger] for ledger in ledgers]
    assert [step.step for step in ledgers[1]] == [1, 2, 3, 4]
    assert taken[0][:3] == taken[1][:3]  # step 3 was drawn ahead; step 4 is drawn by what step 2 or 3 has taught
    flat = [entry for step in taken[1] for entry in step]
    assert len(set(flat)) == len(flat)


def test_partial_completions_go_on_under_the_new_weights(tmp_path: Path) -> None:
    """Two steps ahead, with updates in mid-completion: spans of several versions, none staler than two updates."""
    wanted = settings(tmp_path / "run", "steps=4", "async_steps=2", "rollout={partial: true}")
    metrics = runs.run(wanted)
    found = [row["spans"] for step in range(1, 5) for row in rows(wanted.run, step)]
    assert any(len(spans) > 1 for spans in found)
    assert all(a[0] < b[0] and a[2] == b[1] for spans in found for a, b in zip(spans, spans[1:], strict=False))
    assert max(line["staleness_max"] for line in metrics) in (1, 2)


def test_a_policy_that_left_its_rollouts_behind_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="rollout.mismatch_limit: train and rollout log-probs differ"):
        runs.run(settings(tmp_path / "run", "steps=3", "rollout.mismatch_limit=1e-4"))


def rows(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]
