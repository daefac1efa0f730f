"""From the loss's sums over rows and ranks to the metrics of one update."""

from __future__ import annotations

from collections.abc import Mapping


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of one update from the combined sums of `policy_loss`.

    `loss` and `policy_loss` are sums that `scale` has normalised; `tokens_trained` counts response tokens. The others
    are means over tokens, those of log-probs in nats per token:

    - `entropy`, `ratio_mean`, and `clip_fraction` with its parts `clip_low_fraction` and `clip_high_fraction`;
    - `dual_clip_fraction` and `tis_clip_fraction` if these are on, `kl` if there is a reference;
    - with rollout log-probs, `mismatch_mean` = mean |train - rollout|, `mismatch_max`, and `mismatch_kl` = the k3
      estimate of KL(rollout || train).
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
    return metrics
