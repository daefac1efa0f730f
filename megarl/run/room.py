"""The disk space that a run's checkpoints need, from the model's size and the settings."""

from __future__ import annotations

from megarl.config import Settings
from megarl.run import atomic


def needed(settings: Settings, parameters: int, resume: bool = False) -> int:
    """Bytes of the checkpoints still to come: `keep`, and the one that is written before the oldest is deleted.

    Weights take 2 bytes a parameter in bf16 (4 in fp32); the optimizer adds a float32 copy and two moments.
    """
    saved = settings.checkpoint
    each = (4 if settings.precision.dtype == "fp32" else 2) + (12 if saved.optimizer else 0)
    saves = -(-settings.steps // saved.every) if saved.every else 1
    there = len(atomic.steps(settings.run / "checkpoints")) if resume else 0
    return max(1, min(saved.keep + 1, saves) - there) * parameters * each
