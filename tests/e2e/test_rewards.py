"""Rewards and what is said of them, in real runs: any numbers, failed grades, equal groups, an engine that is off."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megarl import config, report
from megarl.data.ledger import Fate, Ledger
from megarl.errors import RunError
from megarl.run import atomic
from megarl.run.directory import read_metrics
from megarl.run.records import EVALUATIONS, rollouts_file
from megarl.runtime.spawn import spawn
from megarl.train import train
from megarl.view.summary import summary
from tests.support import graders, runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]

MADE = 160  # completions of ten rounds of dynamic sampling
HELD_OUT = f"data.eval=[{runs.QUICKSTART / 'problems' / 'heldout.jsonl'}]"


def settings(folder: Path, grader: str, *overrides: str) -> config.Settings:
    function = f"reward.function=tests.support.graders:{grader}"
    return runs.settings(folder, "parallel={}", function, "reward.shaping=none", "reward.alpha=null", *overrides)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def train_with_an_engine_that_is_off(wanted: config.Settings, prompts: int) -> None:
    """The engine reports log-probs 3 nats off for all but the first `prompts` prompts of a step."""
    from megarl.rollout.local.engine import LocalEngine

    original, seen = LocalEngine.generate, []

    async def generate(self: LocalEngine, token_ids: Any, sampling: Any, request_id: str) -> Any:
        uid = request_id.split("/")[1]
        if request_id.startswith("1/") and uid not in seen:
            seen.append(uid)
        made = await original(self, token_ids, sampling, request_id)
        if not request_id.startswith("1/") or seen.index(uid) < prompts:
            return made
        return dataclasses.replace(made, logprobs=[x - 3 for x in made.logprobs])

    LocalEngine.generate = generate
    train(wanted)


def test_numbers_train_evaluate_and_report(tmp_path: Path) -> None:
    """7.5, -1 and 0.4: accuracy is a share, the numbers are the score, and errors keep their message."""
    wanted = settings(tmp_path / "run", "numbers", HELD_OUT, "evaluation.limit=8", "evaluation.every=1")
    metrics = runs.run(wanted, 1)
    for line in metrics[1:]:
        made = records(rollouts_file(wanted.run, line["step"]))
        assert {r["score"] for r in made} <= {*graders.NUMBERS, 0.0}
        assert line["accuracy"] == np.mean([r["verdict"] == "right" for r in made])
        assert line["score"] == pytest.approx(np.mean([r["score"] for r in made]))
        assert line["reward_std"] == pytest.approx(np.std([r["reward"] for r in made]))
        assert [r["reward"] for r in made] == [r["score"] for r in made]  # no bonus for a box with a user's function
        failed = [r for r in made if r["verdict"] == "error"]
        assert line["verdict_error"] == len(failed)
        assert all("words are too many" in r["message"] for r in failed)
    for line in metrics:
        made = records(rollouts_file(wanted.run, line["step"], EVALUATIONS))
        assert len(made) == line["eval/completions"] == 8 and all(r["response_ids"] for r in made)
        assert line["eval/accuracy"] == np.mean([r["verdict"] == "right" for r in made])
        assert line["eval/score"] == pytest.approx(np.mean([r["score"] for r in made]))
    report.write([wanted.run])
    Console(quiet=True).print(summary(wanted.run))


def test_what_is_all_wrong_is_not_trained_for_its_format(tmp_path: Path) -> None:
    """Dynamic sampling looks at the score: a bonus for boxes makes no group worth training. The run ends with what it
    saw: every completion of every round is counted and recorded, and the mismatch is measured on some."""
    more = ("algorithm.dynamic_sampling=true", "reward.alpha=0.5", "rollout.max_response_tokens=96")
    wanted = settings(tmp_path / "run", "wrong", *more)
    said = f"step 1: nothing is left to learn.* 0 of {MADE} completions are right; nothing was trained"
    with pytest.raises(RunError, match=said):
        spawn(train, 1, (wanted,), runs.DEADLINE)
    (line,) = read_metrics(wanted.run)
    made = records(rollouts_file(wanted.run, 1))
    assert len(made) == line["verdict_wrong"] == line["completions_replaced"] == MADE
    assert all(r["replaced"] and r["weight"] == 0 for r in made)
    assert len({r["reward"] for r in made}) == 2 and line["accuracy"] == 0
    assert line["tokens_generated"] == sum(len(r["response_ids"]) for r in made)
    assert line["tokens_trained"] == 0 and not {"loss", "entropy", "ratio_mean"} & line.keys()
    assert 0 < line["mismatch_mean"] < 1e-3


def test_a_solved_data_set_ends_the_run_as_a_success(tmp_path: Path) -> None:
    """After a step that trained: saved, evaluated, the reason in its metrics; resumed, it ends in the same way.

    Before any step trained, there is nothing to save, and it is a success too.
    """
    more = ("evaluation={every: 0, limit: 4}", "algorithm.dynamic_sampling=true")
    first = settings(tmp_path / "run", "odd", HELD_OUT, *more, "steps=1")
    solved = settings(tmp_path / "run", "right", HELD_OUT, *more, "steps=9")
    spawn(train, 1, (first,), runs.DEADLINE)
    (line,) = [line for line in read_metrics(first.run) if line["step"] == 1]
    assert line["tokens_trained"] and line["completions_replaced"] == 4 * line["prompts_replaced"]
    for last in (2, 3):
        assert spawn(train, 1, (solved, True), runs.DEADLINE) == [True]
        line = read_metrics(solved.run)[-1]
        assert line["step"] == last and line["eval/accuracy"] == 1.0
        assert f"{MADE} of {MADE} completions are right" in line["ended"]
        assert atomic.newest_good(solved.run / "checkpoints", pytest.fail) == last
        step = list(Ledger.load(atomic.folder_of(solved.run / "checkpoints", last)))[-1]
        assert [entry.fate for entry in step.entries] == [Fate.REPLACED] * (MADE // 4)
    new = settings(tmp_path / "new", "right", *more, "data.eval=[]")
    assert spawn(train, 1, (new,), runs.DEADLINE) == [True]
    assert not atomic.steps(new.run / "checkpoints")


def test_an_engine_that_is_off_is_found_though_nothing_is_trained(tmp_path: Path) -> None:
    """All answers are wrong, every group is dropped: the mismatch is measured on what was sampled."""
    wanted = settings(tmp_path / "run", "wrong")
    with pytest.raises(RunError, match=r"rollout.mismatch_limit: train and rollout log-probs differ by 3 on average"):
        spawn(train_with_an_engine_that_is_off, 1, (wanted, 0), runs.DEADLINE)


def test_an_engine_that_is_off_is_found_in_a_later_update(tmp_path: Path) -> None:
    """The first of two updates has prompts whose log-probs are right, the second those that are not."""
    wanted = settings(tmp_path / "run", "odd", "batch.prompts_per_update=2", "pruning={drop_zero_variance: false}")
    with pytest.raises(RunError, match=r"rollout.mismatch_limit: train and rollout log-probs differ by [12]\.\d+ on"):
        spawn(train_with_an_engine_that_is_off, 1, (wanted, 2), runs.DEADLINE)
