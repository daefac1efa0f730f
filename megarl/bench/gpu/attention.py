"""Which attention kernel Transformer Engine chose, and where an update makes the host wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megarl.bench.common.learners import new_learner, samples, settings, split
from megarl.bench.common.models import write_config, write_model
from megarl.bench.gpu.batches import full_rows
from megarl.bench.gpu.part import Scale
from megarl.learner.learner import sft_objective

SHOWN = 12  # places


def kernel(scale: Scale, folder: Path) -> dict[str, Any]:
    """Transformer Engine's choice for packed rows in bf16."""
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

    write_model(folder, **scale.small)
    learner = new_learner(settings(folder, precision={"dtype": "bf16"}))
    learner.accumulate(split(samples(), 1, 3), sft_objective)
    return {name: str(value) for name, value in _attention_backends.items() if name != "attention_params"}


def host_synchronisations(scale: Scale, folder: Path) -> dict[str, Any]:
    """Of the second update of a row each: how many, how many per row and layer, and where.

    torch sees not all: none of its distributed package, and none of a library's own.
    """
    write_config(folder, **scale.medium)
    chosen = settings(folder, precision={"dtype": "bf16"}, model={"path": folder, "weights": "random"})
    learner = new_learner(chosen, total_updates=10)
    batch = full_rows(scale.rows, scale.tokens, min(1024, scale.tokens), learner.shape.vocab)
    learner.train_step(batch, sft_objective)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        learner.train_step(batch, sft_objective)
        torch.cuda.set_sync_debug_mode("default")
    places = by_place(heard)
    total = sum(places.values())
    return {
        "total": total,
        "per_row_and_layer": total / scale.rows / learner.shape.layers,
        **dict(places.most_common(SHOWN)),
    }


def by_place(heard: Sequence[warnings.WarningMessage]) -> Counter[str]:
    """How often torch warned of a host synchronisation at each `folder/file:line`."""
    found = [each for each in heard if "synchroniz" in str(each.message)]
    return Counter(f"{Path(each.filename).parent.name}/{Path(each.filename).name}:{each.lineno}" for each in found)
