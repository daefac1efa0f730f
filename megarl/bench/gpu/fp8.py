"""Loss curves of the FP8 recipes that this device supports, against bf16."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from megarl.bench.common.learners import new_learner, settings
from megarl.bench.common.models import write_model
from megarl.bench.gpu.batches import chain
from megarl.bench.gpu.part import Scale, Unsupported
from megarl.learner.learner import sft_objective
from megarl.runtime import device

LAST = 5  # updates whose loss is averaged at the end of a curve


def curve(scale: Scale, folder: Path, recipe: str, high_precision_layers: int = 0) -> dict[str, Any]:
    """The losses at the end of `scale.curve` updates on a noisy chain, in FP8 and in bf16.

    `quantised_difference`: mean difference of the log-probs computed in FP8 and in bf16 from the same weights.
    """
    precision = {"dtype": "fp8", "recipe": recipe, "high_precision_layers": high_precision_layers}
    check_recipe(precision)
    write_model(folder, **scale.small)
    base, _ = _losses(scale, folder, {"dtype": "bf16"})
    losses, learner = _losses(scale, folder, precision)
    quantised, plain = (learner.logprobs(chain(0), "policy", quantised=wanted) for wanted in (True, False))
    ends = [statistics.mean(each[-LAST:]) for each in (base, losses)]
    return {
        "loss_bf16": ends[0],
        "loss": ends[1],
        "against_bf16": ends[1] / ends[0] - 1,
        "quantised_difference": float(np.mean([np.abs(quantised[i] - plain[i]).mean() for i in plain])),
    }


def check_recipe(precision: dict[str, Any] | None) -> None:
    """Raise Unsupported where Transformer Engine says that this device cannot compute with a recipe."""
    if not precision or precision["dtype"] != "fp8" or not device.on_cuda():
        return
    from transformer_engine import pytorch as te

    answers = {"blockwise": te.is_fp8_block_scaling_available, "mxfp8": te.is_mxfp8_available}
    able, reason = answers.get(precision["recipe"], te.is_fp8_available)(return_reason=True)
    if not able:
        raise Unsupported(f"Transformer Engine: {reason}")


def _losses(scale: Scale, folder: Path, precision: dict[str, Any]) -> tuple[list[float], Any]:
    learner = new_learner(settings(folder, precision=precision, optimizer={"lr": 2e-3}), total_updates=1000)
    losses = [learner.train_step(chain(step), sft_objective)["loss"] for step in range(scale.curve)]
    if precision["dtype"] != "fp8":
        learner.world.release()
    return losses, learner
