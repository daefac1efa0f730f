"""Step-GRPO's table: on which problems a row is evaluated, and what the summary makes of rows with and without
the longer lists. Says nothing about the figures themselves; tests/docs runs the command."""

from pathlib import Path

import pytest

from examples.step_grpo import bench as step_grpo
from megarl.bench.common import training_runs

VALIDATION = "data.eval=[examples/quickstart/problems/validation.jsonl]"


@pytest.mark.parametrize(("overrides", "longer"), [([], True), ([VALIDATION], False)])
def test_longer_lists_go_with_the_held_out_problems_alone(monkeypatch, tmp_path, overrides, longer):
    """Whoever chooses a setting on the validation problems sees no figure of problems that are held out."""
    seen: list[Path] = []

    def evaluated(settings, temperatures, after_training, name="evaluation"):
        seen.extend(settings.data.eval)
        accuracy = 0.5 if name == "longer" else 0.75
        figures = {"eval/accuracy": accuracy, "eval/response_tokens": 60.0, "eval/steps_per_response": 6.0}
        return [figures, {**figures, "eval/accuracy": accuracy / 2}]

    monkeypatch.setattr(training_runs, "evaluated", evaluated)
    rows = [step_grpo.measure("vanilla", seed, training_runs.QUICKSTART, tmp_path, overrides) for seed in (0, 1)]
    (summary,) = step_grpo.summary(rows)
    assert (step_grpo.LONGER in seen) is longer
    assert (summary["accuracy"], summary["accuracy_t1"], summary["seeds"]) == (0.75, 0.375, 2)
    assert (summary.get("accuracy_longer"), summary.get("accuracy_longer_t1")) == (
        (0.5, 0.25) if longer else (None, None)
    )
