"""Grading beside the rollout: it begins when a completion is done, is timed apart, and changes no reward."""

from __future__ import annotations

import asyncio
import json
import os
import select
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from megarl import config
from megarl.errors import UserError
from megarl.run.directory import read_metrics
from megarl.run.timeline import read_phases
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support import graders, runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]

COMPLETIONS = 16
PATIENCE = 100.0  # seconds for what must happen at all; below rollout.timeout


def settings(folder: Path, grader: str, *overrides: str) -> config.Settings:
    return runs.settings(
        folder, "parallel={}", f"reward.function=tests.support.{grader}", "reward.shaping=none", "steps=1", *overrides
    )


def scores(run: Path) -> list[dict[str, Any]]:
    """What grading made of each completion, and its tokens."""
    names = ("uid", "response_ids", "verdict", "reward", "advantage", "weight", "replaced")
    records = map(json.loads, (run / "rollouts" / "step_000001.jsonl").read_text().splitlines())
    return [{name: record[name] for name in names} for record in records]


def train_holding_one_back(wanted: config.Settings, pipe: str | None) -> None:
    """Train. The first completion waits for a byte in `pipe` from every other one's grader; without it for ever."""
    from megarl.rollout.local.engine import LocalEngine

    original, held = LocalEngine.generate, []
    end = os.open(pipe, os.O_RDWR) if pipe else -1

    def wait_for_grades() -> None:
        for _ in range(COMPLETIONS - 1):
            assert select.select([end], [], [], PATIENCE)[0], "no completion is graded before all are rolled out"
            os.read(end, 1)

    async def generate(self: LocalEngine, token_ids: Any, sampling: Any, request_id: str) -> Any:
        if request_id.startswith("1/") and not held:
            held.append(request_id)
            await (asyncio.to_thread(wait_for_grades) if pipe else asyncio.Event().wait())
        return await original(self, token_ids, sampling, request_id)

    LocalEngine.generate = generate
    train(wanted)


def test_completions_are_graded_while_others_are_rolled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One completion ends after all others were graded: its own grade is what the reward phase waits for.

    Rewards, advantages and weights are those of a grader that answers at once, in another order.
    """
    pipe = tmp_path / "graded"
    os.mkfifo(pipe)
    monkeypatch.setenv("MEGARL_TEST_GRADED", str(pipe))
    slow = settings(tmp_path / "slow", "graders:slow", "reward.workers=1")
    spawn(train_holding_one_back, 1, (slow, str(pipe)), runs.DEADLINE)
    (line,) = read_metrics(slow.run)
    others = (COMPLETIONS - 1) * graders.SLOW_SECONDS
    assert line["seconds_rollout"] > others
    assert graders.SLOW_SECONDS <= line["seconds_reward"] < others
    quick = settings(tmp_path / "quick", "graders:odd")
    (same,) = runs.run(quick)
    assert line["accuracy"] == same["accuracy"] not in (0, 1)
    assert scores(slow.run) == scores(quick.run)


def test_dynamic_sampling_times_its_graders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of equal rewards are replaced in further rounds. Each round waits for its grades, in the reward phase."""
    monkeypatch.setenv("MEGARL_TEST_GRADED", os.devnull)
    pairs = "batch={prompts_per_step: 4, completions_per_prompt: 2, tokens_per_row: 512}"
    wanted = settings(tmp_path / "run", "graders:slow", "reward.workers=8", "algorithm.dynamic_sampling=true", pairs)
    spawn(train, 1, (wanted,), runs.DEADLINE)
    (line,) = read_metrics(wanted.run)
    assert line["prompts_drawn"] > 4, "no group was replaced"
    groups = [list(group) for _, group in groupby(scores(wanted.run), key=lambda record: record["uid"])]
    assert len(groups) == line["prompts_drawn"]
    for group in groups:
        assert len({record["verdict"] for record in group}) == (1 if group[0]["replaced"] else 2)
    spans = [span.phase for span in read_phases(wanted.run) if span.step == 1]
    assert spans[: spans.index("logprobs")].count("reward") > 2  # one of each round, and the last, which builds
    assert line["seconds_reward"] >= graders.SLOW_SECONDS


def test_graders_that_cannot_go_on_end_the_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One completion would be rolled out for ever: the run ends with the grader's error, not with rollout.timeout."""
    monkeypatch.setenv("MEGARL_TEST_DIED", str(tmp_path / "died"))
    wanted = settings(tmp_path / "run", "dying_grader:grade", "reward.workers=1")
    with pytest.raises(UserError, match="cannot import tests.support.dying_grader: RuntimeError: the judge is gone"):
        spawn(train_holding_one_back, 1, (wanted, None), PATIENCE)
