"""Learners of tiny models, the sequences that they train on, and gradients under Hugging Face's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl import config
from megarl.types import Batch, Sample

TIMEOUT = 500.0  # seconds, of the ranks of a benchmark
LENGTHS = (7, 33, 5, 60, 21)  # response tokens
PROMPT = 6


def settings(folder: Path, parallel: dict[str, Any] | None = None, **more: Any) -> config.Settings:
    """Settings of a learner for the model in `folder`, in float32 unless `more` gives a precision."""
    tree = {"run": folder / "run", "model": {"path": folder}, "data": {"train": []}, "parallel": parallel or {}}
    return config.parse({**tree, "precision": {"dtype": "fp32"}, **more})


def new_learner(chosen: config.Settings, total_updates: int = 1) -> Any:
    """A learner on the ranks of this process's group; `learner.world` is new too."""
    from megarl.learner.learner import Learner
    from megarl.learner.parallel import start

    world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
    return Learner(chosen, world, total_updates)


def samples(seed: int = 0, vocab: int = 510) -> list[Sample]:
    """Random sequences with random weights."""
    rng = np.random.default_rng(seed)
    total = sum(LENGTHS)
    return [
        Sample(rng.integers(0, vocab, PROMPT + n).astype(np.int32), PROMPT, float(rng.uniform(0.2, 0.4)) / total)
        for n in LENGTHS
    ]


def split(samples: list[Sample], replicas: int, size: int) -> Batch:
    """A batch of rows of `size` samples each, dealt out to the data-parallel ranks."""
    rows = [list(range(i, min(i + size, len(samples)))) for i in range(0, len(samples), size)]
    rows += [[]] * (-len(rows) % replicas)
    return Batch(samples, [rows[r::replicas] for r in range(replicas)], len(samples), 1.0)


def per_expert(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor per expert, as in Hugging Face's files and our map; in memory, transformers stacks the experts."""
    found = {}
    for name, gradient in gradients.items():
        prefix, stacked, matrix = name.partition(".experts.")
        if not stacked:
            found[name] = gradient
            continue
        for i, one in enumerate(gradient):
            parts = {"gate_proj": 0, "up_proj": 1} if matrix == "gate_up_proj" else {matrix: 0}
            for part, piece in zip(parts, one.chunk(len(parts)), strict=True):
                found[f"{prefix}.experts.{i}.{part}.weight"] = piece
    return found
