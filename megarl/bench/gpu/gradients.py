"""Loss and gradients on this device against transformers, and of packed rows against single sequences."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from megarl.bench.common.learners import new_learner, samples, settings, split
from megarl.bench.common.models import Family, write_model
from megarl.bench.gpu.part import Scale
from megarl.bench.parity import reference
from megarl.learner.learner import sft_objective

Gradients = tuple[float, dict[str, torch.Tensor]]
"""Loss, and each parameter's gradient under Hugging Face's name, float32 on the CPU."""


def against_transformers(
    scale: Scale, folder: Path, family: Family = "qwen3", dtype: str = "fp32", parallel: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Of two or three sequences a row, against transformers in float32 on the CPU."""
    base = reference(write_model(folder, family, **scale.small), samples())
    return differences(gradients(folder, 2, dtype, parallel), base)


def packed_against_unpacked(scale: Scale, folder: Path, dtype: str = "bf16") -> dict[str, Any]:
    """Of three sequences a row, against one sequence a row."""
    write_model(folder, **scale.small)
    return differences(gradients(folder, 3, dtype), gradients(folder, 1, dtype))


def gradients(folder: Path, size: int, dtype: str, parallel: dict[str, Any] | None = None) -> Gradients:
    """Of rows of `size` sequences. `parallel`: settings of the learner."""
    learner = new_learner(settings(folder, parallel, precision={"dtype": dtype}))
    loss = learner.accumulate(split(samples(), 1, size), sft_objective)["loss"]
    found = {name: gradient.float().cpu().clone() for name, gradient in learner.named_gradients()}
    learner.world.release()
    return loss, found


def differences(found: Gradients, base: Gradients) -> dict[str, Any]:
    """`relgrad`: median over the tensors of the difference's norm over the tensor's. `worst_relgrad`: the largest."""
    (loss, got), (base_loss, wanted) = found, base
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    errors = {n: float((got[n] - g.cpu()).norm() / g.cpu().norm().clamp(min=1e-12)) for n, g in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "dloss": abs(loss - base_loss) / abs(base_loss),
        "relgrad": statistics.median(errors.values()),
        "worst_relgrad": errors[worst],
        "worst_tensor": worst,
    }
