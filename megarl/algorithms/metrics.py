"""From the loss's sums, added up over rows and ranks, to the figures of one update."""

from __future__ import annotations

from collections.abc import Mapping


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """Figures of one update from the combined sums of `policy_loss`.

    `loss` and `policy_loss` are sums already normalised by `scale`; the others are means over the tokens they concern:
    `entropy`, `ratio_mean`, `clip_fraction` (of which `clip_low_fraction`, `clip_high_fraction`; dual clip apart),
    `dual_clip_fraction` and `tis_clip_fraction` when these are on, `kl` when there is a reference, and, when rollout
    log-probs were given, `mismatch_mean` = mean |train - rollout|, `mismatch_max`, `mismatch_kl` = the k3 estimate of
    KL(rollout || train). All log-prob figures are in nats a token. `tokens_trained` counts response tokens.
    """
    tokens = max(sums["tokens"], 1.0)
    figures = {
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
            figures[f"{name}_fraction"] = sums[name] / tokens
    if sums["kl_tokens"]:
        figures["kl"] = sums["kl"] / sums["kl_tokens"]
    if sums["mismatch_tokens"]:
        figures["mismatch_mean"] = sums["mismatch"] / sums["mismatch_tokens"]
        figures["mismatch_kl"] = sums["mismatch_kl"] / sums["mismatch_tokens"]
        figures["mismatch_max"] = sums["mismatch_max"]
    return figures
