"""Group-relative advantages of whole groups, computed before anything is pruned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megarl.algorithms.presets import Advantage
from megarl.errors import UserError

EPSILON = 1e-6
"""Added to the standard deviation, as in GRPO's and Step-GRPO's released code."""


def advantages(
    rewards: Sequence[np.ndarray], kind: Advantage, keep: Sequence[float] | np.ndarray | None = None
) -> list[np.ndarray]:
    """One advantage per completion: float64 arrays with the shapes of `rewards`, one per group; sizes may differ.

    With R the rewards of a group of G:

    - `grpo`: (R - mean) / (std + 1e-6), std with Bessel's correction (arXiv 2402.03300);
    - `dr_grpo`: R - mean (2503.20783);
    - `rloo`: R - mean of the other G - 1 = G / (G - 1) * (R - mean) (2402.14740);
    - `reinforce_pp`: (R - mean) / (std + 1e-6), std over all completions of the batch (2501.03262, the variant with a
      group baseline). The batch mean of R - mean is 0.

    A group with equal rewards, or with one completion only, has advantages of exactly 0. `keep` is each group's chance
    of not being pruned by its prompt (default 1). The batch statistic of `reinforce_pp` weights the group by its
    inverse, so that it estimates the unpruned batch's. The other kinds use one group at a time.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in rewards]
    for number, group in enumerate(groups):
        if not np.isfinite(group).all():
            bad = group[~np.isfinite(group)][0]
            raise UserError(f"reward.function: returned {bad} in group {number}; rewards are finite numbers")
    centred = [_centred(group) for group in groups]
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":
        return [c * (len(c) / (len(c) - 1)) if len(c) > 1 else c for c in centred]
    if kind == "grpo":
        return [c / (_bessel_std(c) + EPSILON) for c in centred]
    weights = np.ones(len(groups)) if keep is None else 1.0 / np.asarray(keep, dtype=np.float64)
    return _batch_normalised(centred, weights)


def _centred(group: np.ndarray) -> np.ndarray:
    """R - mean; exactly 0 where all rewards are equal to rounding."""
    if len(group) == 0 or np.ptp(group) <= 1e-12 * np.abs(group).max():
        return np.zeros_like(group)
    return group - group.mean()


def _bessel_std(centred: np.ndarray) -> float:
    return float(np.sqrt((centred**2).sum() / (len(centred) - 1))) if len(centred) > 1 else 0.0


def _batch_normalised(centred: list[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    count = sum(w * len(c) for w, c in zip(weights, centred, strict=True))
    square = sum(w * float((c**2).sum()) for w, c in zip(weights, centred, strict=True))
    std = np.sqrt(square / count) if count else 0.0
    return [c / (std + EPSILON) for c in centred]
