"""Held-out accuracy against what was spent on it, from a run's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def train_seconds(line: dict[str, Any]) -> float:
    """Seconds of one step without its evaluation and its checkpoint."""
    return line["seconds_total"] - line.get("seconds_evaluation", 0.0) - line.get("seconds_checkpoint", 0.0)


def learning_curve(metrics: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """One point per evaluation, the one before training first: held-out accuracy, and what was spent before it.

    Spent are `seconds` (see `train_seconds`), `rollout` (seconds), `generated` and `trained` (tokens).
    """
    curve, seconds, rollout, generated, trained = [], 0.0, 0.0, 0, 0.0
    for line in metrics:
        if line["step"]:
            seconds += train_seconds(line)
            rollout += line["seconds_rollout"]
            generated += line["tokens_generated"]
            trained += line["tokens_trained"]
        if "eval/accuracy" in line:
            spent = {"seconds": seconds, "rollout": rollout, "generated": generated, "trained": trained}
            curve.append({"accuracy": line["eval/accuracy"], **spent})
    return curve


def reached(curve: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """The point where the accuracy first reaches `target`, by linear interpolation; None if it never does."""
    if curve and curve[0]["accuracy"] >= target:
        return curve[0]
    for before, after in pairwise(curve):
        if after["accuracy"] >= target:
            share = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return {key: before[key] + share * (after[key] - before[key]) for key in after}
    return None
