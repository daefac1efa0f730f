"""The learning rate as a function of the update."""

from __future__ import annotations

import math

from megarl.config import Optimizer


def learning_rate(update: int, total: int, settings: Optimizer) -> float:
    """The rate of update number `update` (0, 1, …) in a run of `total` updates.

    The warm-up rises linearly and reaches `lr` at its last update. The decay then falls from `lr` to `min_lr`, which it
    would reach at update `total`. Updates beyond `total` keep the final rate.
    """
    warmup = settings.warmup_steps
    if update < warmup:
        return settings.lr * (update + 1) / warmup
    if settings.decay == "constant":
        return settings.lr
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    share = 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_lr + (settings.lr - settings.min_lr) * share
