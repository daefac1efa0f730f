"""The one policy loss. Presets are rows of switches (presets.py); the loss of any set of samples is a sum.

Denominators are fixed before anything is dropped, packed or sharded (`token_scale`). `policy_loss` never counts its
samples, so micro-batches, ranks and pruning do not change the expected gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megarl.algorithms.kl import LOG_RATIO_BOUND, kl_estimate
from megarl.algorithms.presets import Aggregation, Switches
from megarl.types import MicroBatch

SequenceSum = Callable[[Tensor], Tensor]
"""values [T] -> [T]: each sequence's sum over all ranks that have a part of it, at each of its positions."""


def token_scale(
    aggregation: Aggregation,
    lengths: np.ndarray,
    weights: np.ndarray,
    total_sequences: float,
    total_tokens: float,
    constant: float,
) -> np.ndarray:
    """The factor of each response token's loss, one per sample: float64 [n].

    `lengths` [n] are response tokens, `weights` [n] the Horvitz-Thompson weights (1 = certain, 0 = dropped).
    `total_sequences` and `total_tokens` belong to the *unpruned* batch; `constant` is in tokens.

    - `token_mean`: w / total_tokens (DAPO)
    - `sequence_mean`: w / (length * total_sequences) (GRPO)
    - `constant`: w / (constant * total_sequences) (Dr.GRPO)
    """
    weights = np.asarray(weights, dtype=np.float64)
    if aggregation == "token_mean":
        return weights / total_tokens
    if aggregation == "sequence_mean":
        return weights / (np.maximum(lengths, 1) * total_sequences)
    return weights / (constant * total_sequences)


def policy_loss(
    logprobs: Tensor, entropy: Tensor, micro: MicroBatch, sequence_sum: SequenceSum, switches: Switches
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one row, a sum over its tokens, and sums for the metrics (see metrics.py).

    Args:
        logprobs: [T], the policy's log-prob of each label, with gradient. Positions of scale 0 may have any value.
        entropy: [T], of the policy's distribution, in nats; differentiable if `entropy_coef` is not 0.
        micro: the row. nan in `old_logprobs` means the policy's own, detached (ratio 1, on-policy). nan in
            `rollout_logprobs` means no behaviour log-prob (weight 1, no mismatch), nan in `ref_logprobs` no KL.
        sequence_sum: sums over each sequence, across context-parallel ranks too; called for `ratio: sequence` only.
        switches: partially applied by the caller.

    Per token, with A the advantage, r the importance ratio and w the truncated-importance weight:

        loss = sum of scale * (w * surrogate(r, A) + kl_loss_coef * KL - entropy_coef * entropy)

    The metrics' sums are detached scalars to add over rows and ranks; of those ending in `_max` take the maximum.
    """
    learned = micro.scale != 0
    # Mask inputs, not outputs: 0 * nan would put nan into the gradient.
    logprobs = torch.where(learned, logprobs, 0)
    entropy = torch.where(learned, entropy, 0)
    advantage = torch.where(learned, micro.advantage, 0)
    own = logprobs.detach()
    old = torch.where(learned & ~torch.isnan(micro.old_logprobs), micro.old_logprobs, own)

    ratio = _importance_ratio(logprobs, old, learned, sequence_sum, switches)
    surrogate, clipped = _surrogate(ratio, logprobs, advantage, switches)

    # Compare the rollout engine with the learner's log-probs under the same weights: `old`, if recomputed.
    trainer = own if switches.old_logprobs == "rollout" else old
    behaved = learned & ~torch.isnan(micro.rollout_logprobs)
    mismatch = torch.where(behaved, trainer - micro.rollout_logprobs, 0)
    if switches.tis_cap is not None:
        weight = torch.exp(mismatch.clamp(max=LOG_RATIO_BOUND))
        clipped["tis_clip"] = behaved & (weight > switches.tis_cap)
        surrogate = surrogate * torch.where(behaved, weight.clamp(max=switches.tis_cap), 1)

    referred = learned & ~torch.isnan(micro.ref_logprobs)
    kl = kl_estimate(logprobs, torch.where(referred, micro.ref_logprobs, own), switches.kl_estimator)
    kl = torch.where(referred, kl, 0)

    per_token = surrogate
    if switches.kl_loss_coef:
        per_token = per_token + switches.kl_loss_coef * kl
    if switches.entropy_coef:
        per_token = per_token - switches.entropy_coef * entropy
    loss = (micro.scale * per_token).sum()

    with torch.no_grad():
        sums = {
            "loss": loss,
            "policy_loss": (micro.scale * surrogate).sum(),
            "tokens": learned.sum(),
            "entropy": entropy.sum(),
            "ratio": torch.where(learned, ratio, 0).sum(),
            "kl": kl.sum(),
            "kl_tokens": referred.sum(),
            "mismatch": mismatch.abs().sum(),
            "mismatch_kl": (torch.exp(mismatch.clamp(max=LOG_RATIO_BOUND)) - mismatch - 1).sum(),
            "mismatch_tokens": behaved.sum(),
            "mismatch_max": mismatch.abs().max() if len(mismatch) else mismatch.sum(),
            **{name: where.sum() for name, where in clipped.items()},
        }
    return loss, {name: value.detach().to(loss.dtype) for name, value in sums.items()}


def within_row(sequence: Tensor) -> SequenceSum:
    """The `sequence_sum` of a row that is whole on one rank; `sequence` [T] is `MicroBatch.sequence`."""

    def sequence_sum(values: Tensor) -> Tensor:
        size = int(sequence.max()) + 1 if len(sequence) else 0
        return values.new_zeros(size).index_add(0, sequence, values)[sequence]

    return sequence_sum


def _importance_ratio(
    logprobs: Tensor, old: Tensor, learned: Tensor, sequence_sum: SequenceSum, switches: Switches
) -> Tensor:
    """policy / old, [T]: per token, or for `sequence` the geometric mean over the sequence's response tokens.

    The sequence ratio has the GSPO-token form (arXiv 2507.18071, eq. 14): the value of the sequence's ratio and the
    gradient of the token's. Advantages may then differ between tokens; if they are equal, the gradient is GSPO's.
    """
    log_ratio = (logprobs - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if switches.ratio != "sequence":
        return torch.exp(log_ratio)
    length = sequence_sum(learned.to(logprobs.dtype))
    mean = sequence_sum(log_ratio.detach()) / length.clamp(min=1)
    return torch.exp(mean + logprobs - logprobs.detach())


def _surrogate(
    ratio: Tensor, logprobs: Tensor, advantage: Tensor, switches: Switches
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy term of each token [T], to minimise, and where it was clipped (bool [T] per kind of clip)."""
    low, high = 1 - switches.clip_low, 1 + switches.clip_high
    bounded = ratio.clamp(low, high)
    if switches.ratio == "cispo":
        acts = advantage != 0
        clipped = {"clip_low": acts & (ratio < low), "clip_high": acts & (ratio > high)}
        return -bounded.detach() * advantage * logprobs, clipped
    surrogate = torch.maximum(-advantage * ratio, -advantage * bounded)
    clipped = {"clip_low": (advantage < 0) & (ratio < low), "clip_high": (advantage > 0) & (ratio > high)}
    if switches.dual_clip is not None:  # arXiv 1912.09729
        bound = -advantage * switches.dual_clip
        clipped["dual_clip"] = (advantage < 0) & (surrogate > bound)
        surrogate = torch.where(advantage < 0, torch.minimum(surrogate, bound), surrogate)
    return surrogate, clipped
