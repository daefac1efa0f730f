"""Per-token estimators of KL(policy || reference) from the sampled token's log-probs, for the loss or the reward."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megarl.algorithms.presets import KLEstimator

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to ±20 before `exp`, so that one extreme token cannot make the whole loss infinite.

k3 goes on along its tangent there: a token far below the reference is still pulled towards it."""


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Schulman's estimators (joschu.net/blog/kl-approx.html); all tensors of one shape, in nats.

    With d = logprobs - reference: `k1` = d; `k2` = d² / 2; `k3` = exp(-d) + d - 1. The values of k1 and k3 are
    unbiased. As a loss, on-policy, their expected gradients are: k1 zero (it belongs in the reward), k2 that of
    KL(policy || reference), k3 that of KL(reference || policy).
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    inside = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.exp(-inside) * (1 + inside - difference) + difference - 1


def kl_penalty(logprobs: np.ndarray, reference: np.ndarray, coef: float, estimator: KLEstimator) -> float:
    """The KL penalty on a completion's reward: coef * sum over its n tokens. Both arrays are [n], in nats."""
    estimate = kl_estimate(torch.from_numpy(np.float64(logprobs)), torch.from_numpy(np.float64(reference)), estimator)
    return coef * float(estimate.sum())
