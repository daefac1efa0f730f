"""Log-probs of a step: old and reference ones for the loss, and the mismatch of a step that trains nothing.

Every rank computes them. The controller fills them in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megarl.algorithms.kl import kl_penalty
from megarl.algorithms.metrics import mismatch
from megarl.algorithms.presets import Switches
from megarl.learner.learner import Learner
from megarl.learner.parallel import World
from megarl.loop.batching import BatchBuilder
from megarl.loop.collectives import broadcast
from megarl.loop.scoring import Collected
from megarl.types import Batch, Sample, ScoredGroup


def fill(batches: Sequence[Batch | None], learner: Learner, switches: Switches) -> None:
    """Fill `old_logprobs` and `ref_logprobs` of every sample, if the loss reads them. Collective."""
    for batch in batches:
        samples = batch.samples if batch else []
        if switches.old_logprobs == "recompute":
            for i, values in learner.logprobs(batch, "policy").items():
                samples[i].old_logprobs = values
        elif switches.old_logprobs == "rollout":
            for sample in samples:
                sample.old_logprobs = sample.rollout_logprobs
        if switches.kl_loss_coef:
            for i, values in learner.logprobs(batch, "reference").items():
                samples[i].ref_logprobs = values


def penalise(groups: Sequence[ScoredGroup], learner: Learner, switches: Switches, builder: BatchBuilder) -> None:
    """Subtract the KL penalty from every completion's reward, if the reward bears it. Collective."""
    if not switches.kl_reward_coef:
        return
    batch = builder.unweighted(groups) if groups else None
    policy, reference = learner.logprobs(batch, "policy"), learner.logprobs(batch, "reference")
    for i, c in enumerate(c for group in groups for c in group.completions):
        c.reward -= kl_penalty(policy[i], reference[i], switches.kl_reward_coef, switches.kl_estimator)


def unseen_mismatch(
    collected: Collected, batches: Sequence[Batch | None], learner: Learner, builder: BatchBuilder, world: World
) -> dict[str, float]:
    """The mismatch of a step that trains no sampled token, over those that it has; on the controller. Collective.

    Empty in other steps: there the updates measure it. At most `prompts_per_step` groups are scored, which dynamic
    sampling may have exceeded ten times.
    """
    samples = [sample for batch in batches if batch for sample in batch.samples]
    if not broadcast(not any(map(_compared, samples)), world):
        return {}
    groups = collected.made[: builder.settings.batch.prompts_per_step]
    values = learner.logprobs(builder.unweighted(groups) if groups else None, "policy")
    rollout = [c.completion.logprobs for group in groups for c in group.completions]
    if not rollout:
        return {}
    return mismatch(np.concatenate([values[i] for i in range(len(rollout))]), np.concatenate(rollout))


def _compared(sample: Sample) -> bool:
    """Whether an update measures the mismatch on it: whether the policy sampled any of its tokens."""
    return sample.rollout_logprobs is not None and not np.isnan(sample.rollout_logprobs).all()
