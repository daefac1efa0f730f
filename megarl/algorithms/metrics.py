"""From the loss's sums over rows and ranks to the metrics of one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megarl.algorithms.kl import LOG_RATIO_BOUND

TOKEN_MEANS = (
    "entropy", "ratio_mean", "clip_fraction", "clip_low_fraction", "clip_high_fraction", "dual_clip_fraction",
    "tis_clip_fraction", "kl",
)  # fmt: skip
"""Means over the tokens that an update trained."""
MISMATCH_MEANS = ("mismatch_mean", "mismatch_kl")
"""Means over `mismatch_tokens`."""
OF_AN_IDLE_UPDATE = ("tokens_trained", "grad_norm", "lr")
"""What an update that trained nothing has: its loss, entropy and ratio are of no token, and would read as 0."""


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of one update from the combined sums of `policy_loss`.

    `loss` and `policy_loss` are sums that `scale` has normalised; `tokens_trained` counts response tokens. The others
    are means over tokens, those of log-probs in nats per token:

    - `entropy`, `ratio_mean`, and `clip_fraction` with its parts `clip_low_fraction` and `clip_high_fraction`;
    - `dual_clip_fraction` and `tis_clip_fraction` if these are on, `kl` if there is a reference;
    - with rollout log-probs, `mismatch_mean` = mean |train - rollout|, `mismatch_max`, and `mismatch_kl` = the k3
      estimate of KL(rollout || train), over `mismatch_tokens` tokens: the sampled ones.
    """
    tokens = max(sums["tokens"], 1.0)
    metrics = {
        "loss": sums["loss"],
        "policy_loss": sums["policy_loss"],
        "tokens_trained": sums["tokens"],
        "entropy": sums["entropy"] / tokens,
        "ratio_mean": sums["ratio"] / tokens,
        "clip_fraction": (sums["clip_low"] + sums["clip_high"]) / tokens,
        "clip_low_fraction": sums["clip_low"] / tokens,
        "clip_high_fraction": sums["clip_high"] / tokens,
    }
    for name in ("dual_clip", "tis_clip"):
        if name in sums:
            metrics[f"{name}_fraction"] = sums[name] / tokens
    if sums["kl_tokens"]:
        metrics["kl"] = sums["kl"] / sums["kl_tokens"]
    if sums["mismatch_tokens"]:
        metrics["mismatch_mean"] = sums["mismatch"] / sums["mismatch_tokens"]
        metrics["mismatch_kl"] = sums["mismatch_kl"] / sums["mismatch_tokens"]
        metrics["mismatch_max"] = sums["mismatch_max"]
        metrics["mismatch_tokens"] = sums["mismatch_tokens"]
    return metrics


def combine(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its updates.

    Token counts are added up, means over tokens are weighted by them, `mismatch_max` is the largest. The others (loss,
    gradient norm, learning rate) are means over the updates that trained something. Without such an update, only
    `OF_AN_IDLE_UPDATE` is left, of the first.
    """
    trained = [update for update in updates if update["tokens_trained"]]
    if not trained:
        return {name: updates[0][name] for name in OF_AN_IDLE_UPDATE if updates and name in updates[0]}
    tokens = [update["tokens_trained"] for update in trained]
    sampled = [update.get("mismatch_tokens", update["tokens_trained"]) for update in trained]
    return {name: _combined(name, trained, tokens, sampled) for name in trained[0]}


def _combined(
    name: str, updates: Sequence[Mapping[str, float]], tokens: Sequence[float], sampled: Sequence[float]
) -> float:
    present = [i for i, update in enumerate(updates) if name in update]
    values = [updates[i][name] for i in present]
    if len(values) == 1:
        return values[0]
    if name in ("tokens_trained", "mismatch_tokens"):
        return sum(values)
    if name == "mismatch_max":
        return float(np.max(values))  # nan stays nan
    weights = tokens if name in TOKEN_MEANS else sampled if name in MISMATCH_MEANS else [1.0] * len(updates)
    return float(np.average(values, weights=[weights[i] for i in present]))


def mismatch(train: np.ndarray, rollout: np.ndarray) -> dict[str, float]:
    """`summarise`'s mismatch metrics of log-probs [n] of the same tokens, in nats. nan in `rollout`: not sampled."""
    sampled = ~np.isnan(rollout)
    if not sampled.any():
        return {}
    difference = (train - rollout)[sampled].astype(np.float64)
    kl = np.exp(np.minimum(difference, LOG_RATIO_BOUND)) - difference - 1
    return {
        "mismatch_mean": float(np.abs(difference).mean()),
        "mismatch_kl": float(kl.mean()),
        "mismatch_max": float(np.abs(difference).max()),
        "mismatch_tokens": float(sampled.sum()),
    }
