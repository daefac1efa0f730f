"""The arithmetic of `megarl bench dppo` on made-up curves; the trainings themselves are its own business."""

from __future__ import annotations

import pytest

from examples.dppo import bench as dppo
from megarl.bench.common.curve import learning_curve, reached


def test_time_to_an_accuracy_lies_between_two_evaluations() -> None:
    """In proportion, evaluation and checkpoints apart; one above the target costs nothing, one never there is None."""
    line = {"seconds_total": 10.0, "seconds_rollout": 4.0, "tokens_generated": 100, "tokens_trained": 50}
    metrics = [
        {"step": 0, "eval/accuracy": 0.5},
        {**line, "step": 1},
        {**line, "step": 2, "seconds_total": 13.0, "seconds_evaluation": 2.0, "seconds_checkpoint": 1.0}
        | {"eval/accuracy": 0.6},
        {**line, "step": 3, "eval/accuracy": 0.8},
    ]
    curve = learning_curve(metrics)
    assert [(point["accuracy"], point["seconds"]) for point in curve] == [(0.5, 0.0), (0.6, 20.0), (0.8, 30.0)]
    there = reached(curve, 0.7)
    assert there == pytest.approx({"accuracy": 0.7, "seconds": 25.0, "rollout": 10.0, "generated": 250, "trained": 125})
    assert reached(curve, 0.5)["seconds"] == 0 and reached(curve, 0.9) is None


def test_a_lucky_evaluation_is_smoothed() -> None:
    smoothed = dppo.smooth([{"accuracy": value, "seconds": 0.0} for value in (0.5, 0.8, 0.5, 0.8)])
    assert [point["accuracy"] for point in smoothed] == pytest.approx([0.5, 0.65, 0.6, 0.7])


def test_speed_ups_are_of_the_same_seed() -> None:
    """A seed that never gets there counts as not reached, and has no ratio."""
    times = {"grpo": [30.0, 60.0, 90.0], "grpo_strong": [20.0, 20.0, 20.0], "dppo": [10.0, 30.0, None]}
    rest = dict.fromkeys(("accuracy", "seconds", "seconds_rollout", "tokens_generated", "tokens_trained"), 1.0)
    rows = [
        {"method": method, "rate": 0.5 * (method == "dppo"), "seed": seed, "seconds_to_target": value, **rest}
        for method, values in times.items()
        for seed, value in enumerate(values)
    ]
    found = {line["method"]: line for line in dppo.summary(rows)}
    assert found["dppo"]["reached"] == "2/3"
    assert (found["dppo"]["speedup"], found["dppo"]["over_strong"]) == (2.5, pytest.approx((2 + 2 / 3) / 2))
    assert (found["grpo_strong"]["speedup_min"], found["grpo_strong"]["speedup_max"]) == (1.5, 4.5)


def test_methods_that_prune_have_rates() -> None:
    assert set(dppo.RATES) == {name for name, switches in dppo.METHODS.items() if any("{rate}" in s for s in switches)}
    assert dppo.variants(["grpo", "dppo"], [0.5]) == [("grpo", 0.0), ("dppo", 0.5)]
