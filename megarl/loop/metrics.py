"""The metrics of one step, under their names in metrics.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megarl.algorithms import pruning
from megarl.algorithms.metrics import combine
from megarl.config import Settings
from megarl.errors import RunError
from megarl.loop.rollout_engine import RolloutEngine
from megarl.loop.scoring import Collected
from megarl.rollout.early_exit import metrics as early_exit
from megarl.runtime import device
from megarl.types import Batch, Completion, ScoredCompletion, ScoredGroup


def of_step(
    step: int,
    collected: Collected,
    batches: Sequence[Batch | None],
    updates: Sequence[dict[str, float]],
    unseen_mismatch: dict[str, float],
    engine: RolloutEngine,
    settings: Settings,
) -> dict[str, Any]:
    """Every metric of a step except its timings.

    What was rolled out is counted over all completions made, also those that dynamic sampling replaced; pruning over
    the others. `unseen_mismatch` is that of a step which trained nothing. Raises RunError when train and rollout
    log-probs drifted apart, or tokens are staler than the settings allow.
    """
    made = [c for group in collected.made for c in group.completions]
    completions = [c.completion for c in made]
    trained = (combine(updates) if updates else {"tokens_trained": 0.0}) | unseen_mismatch
    if not trained.get("mismatch_mean", 0.0) <= settings.rollout.mismatch_limit:
        raise RunError(
            f"rollout.mismatch_limit: train and rollout log-probs differ by {trained['mismatch_mean']:.3g} on average, "
            f"more than {settings.rollout.mismatch_limit:g}: the engine does not sample from the policy that is trained"
        )
    stale = staleness(step, completions)
    if stale["staleness_max"] > settings.async_steps:
        raise RunError(
            f"async_steps: {settings.async_steps}, but step {step} has tokens of weights {stale['staleness_max']:.0f} "
            "updates old"
        )
    packed = any(batch and batch.samples for batch in batches)
    return {
        **of_rewards(collected.made),
        "response_tokens": float(np.mean([len(c) for c in completions])),
        "overlong": sum(c.finish == "length" for c in completions) / len(completions),
        "steps_per_response": float(np.mean([c.steps for c in made])),
        **early_exit.summarise(collected.made),
        "tokens_generated": sum(map(len, completions)),
        "prompts_drawn": collected.num_drawn,
        "prompts_pruned": collected.num_drawn - collected.num_kept,
        "prompts_replaced": len(collected.replaced),
        "completions_replaced": len(made) - len(collected.completions),
        **of_pruning(collected.completions),
        **({"packing_density": density(batches, settings.batch.tokens_per_row)} if packed else {}),
        **trained,
        **stale,
        "canary_difference": engine.canary_difference,
        "canary_rounding": engine.canary_rounding,
        "memory_gib": device.peak_memory() / 2**30,
        "weight_version": completions[0].spans[0].version if completions[0].spans else -1,
    }


def of_rewards(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What graders and shaping gave.

    `accuracy` is the share of right verdicts, `score` the mean of the graders' numbers. `reward_std` is over all
    completions, `equal_groups` the share of groups whose rewards are all equal.
    """
    scored = [c for group in groups for c in group.completions]
    verdicts = Counter(c.verdict for c in scored)
    rewards = [np.array([c.reward for c in group.completions]) for group in groups]
    return {
        "reward": float(np.mean([c.reward for c in scored])),
        "reward_std": float(np.std([c.reward for c in scored])),
        "equal_groups": sum(np.ptp(group) <= 1e-12 * np.abs(group).max() for group in rewards) / len(rewards),
        "accuracy": verdicts["right"] / len(scored),
        "score": float(np.mean([c.score for c in scored])),
        **{f"verdict_{name}": verdicts[name] for name in ("right", "wrong", "timeout", "error")},
    }


def of_pruning(completions: Sequence[ScoredCompletion]) -> dict[str, float]:
    """How much was dropped, and what it cost. Dynamic sampling's completions do not count."""
    weights = np.array([c.weight for c in completions])
    return {
        "completions_dropped": int((weights == 0).sum()),
        "effective_sample_size": pruning.effective_sample_size(weights[weights > 0]),
        "added_variance": pruning.added_variance(np.abs([c.advantage for c in completions]), weights),
    }


def staleness(step: int, completions: Sequence[Completion]) -> dict[str, float]:
    """Updates between the weights that sampled a step's tokens and those that it trains: maximum and token mean."""
    updates = np.array([step - 1 - span.version for c in completions for span in c.spans])
    tokens = np.array([span.end - span.start for c in completions for span in c.spans])
    if not tokens.sum():
        return {"staleness_max": 0.0, "staleness_mean": 0.0}
    return {"staleness_max": float(updates.max()), "staleness_mean": float((updates * tokens).sum() / tokens.sum())}


def density(batches: Sequence[Batch | None], tokens_per_row: int) -> float:
    """Valid tokens over the capacity of all non-empty rows."""
    built = [batch for batch in batches if batch]
    used = [row for batch in built for rank in batch.rows for row in rank if row]
    tokens = sum(sample.input_length for batch in built for sample in batch.samples)
    return tokens / (len(used) * tokens_per_row) if used else 0.0


def due(step: int, every: int, last: int) -> bool:
    """Whether `step` is the last one or a multiple of `every`; 0 means only the last."""
    return step == last or (every > 0 and step % every == 0)
