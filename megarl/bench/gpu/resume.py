"""An update after loading a checkpoint against the one that would have followed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megarl.bench.common.learners import new_learner, samples, settings, split
from megarl.bench.common.models import write_model
from megarl.bench.gpu.part import Scale
from megarl.learner import checkpoint
from megarl.learner.learner import sft_objective


def resume(scale: Scale, folder: Path) -> dict[str, Any]:
    """Two updates, a save, a third; then load and the third again. `bit_equal` is of its metrics and all weights."""
    write_model(folder / "model", **scale.small)
    saved = folder / "checkpoint"
    saved.mkdir()
    learner = new_learner(settings(folder / "model", precision={"dtype": "bf16"}), total_updates=10)
    batch = split(samples(), 1, 2)
    for _ in range(2):
        learner.train_step(batch, sft_objective)
    checkpoint.save(learner, saved)
    third = learner.train_step(batch, sft_objective)
    before = _weights(learner)
    checkpoint.load(learner, saved)
    again = learner.train_step(batch, sft_objective)
    apart = {name: float((weight - before[name]).abs().max()) for name, weight in _weights(learner).items()}
    return {
        "bit_equal": third == again and not any(apart.values()),
        "loss": third["loss"],
        "dloss": abs(again["loss"] - third["loss"]),
        "largest_weight_difference": max(apart.values()),
        "tensors_that_differ": sum(map(bool, apart.values())),
    }


def _weights(learner: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.float().cpu().clone() for name, tensor in learner.named_tensors()}
