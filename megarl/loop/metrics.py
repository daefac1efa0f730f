"""The figures of one step, under the names of metrics.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megarl.algorithms import pruning
from megarl.config import Settings
from megarl.errors import RunError
from megarl.loop.batching import Collected
from megarl.loop.rollout_engine import Engines
from megarl.rollout.early_exit import metrics
from megarl.runtime import device
from megarl.types import Batch, Completion


def of_step(
    step: int,
    collected: Collected,
    batches: Sequence[Batch],
    updates: Sequence[dict[str, float]],
    engines: Engines,
    settings: Settings,
) -> dict[str, Any]:
    """Every figure of a step but its timings. Raises RunError when train and rollout log-probs drifted apart, or tokens
    are staler than the settings allow."""
    completions = collected.completions
    n = len(completions)
    verdicts = Counter(c.verdict for c in completions)
    trained = learner_figures(updates)
    if trained.get("mismatch_mean", 0.0) > settings.rollout.mismatch_limit:
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
    weights = np.array([c.weight for c in completions])
    return {
        "reward": float(np.mean([c.reward for c in completions])),
        "accuracy": float(np.mean([c.score for c in completions])),
        "response_tokens": float(np.mean([len(c) for c in completions])),
        "overlong": sum(c.finish == "length" for c in completions) / n,
        **{f"verdict_{name}": verdicts.get(name, 0) for name in ("right", "wrong", "timeout", "error")},
        "steps_per_response": float(np.mean([c.steps for c in completions])),
        **metrics.summarise(collected.groups),
        "tokens_generated": sum(map(len, completions)),
        "prompts_drawn": collected.taken,
        "prompts_pruned": collected.taken - collected.survived,
        "completions_dropped": int((weights == 0).sum()),
        "effective_sample_size": pruning.effective_sample_size(weights[weights > 0]),
        "added_variance": pruning.added_variance(np.abs([c.advantage for c in completions]), weights),
        "packing_density": density(batches, settings.batch.tokens_per_row),
        **trained,
        **stale,
        "canary_difference": engines.canary_difference,
        "memory_gib": device.peak_memory() / 2**30,
        "weight_version": completions[0].spans[0].version if n and completions[0].spans else -1,
    }


def staleness(step: int, completions: Sequence[Completion]) -> dict[str, float]:
    """Updates between the weights that sampled the tokens of a step and those that it trains; mean over tokens."""
    updates = np.array([step - 1 - span.version for c in completions for span in c.spans])
    tokens = np.array([span.end - span.start for c in completions for span in c.spans])
    if not tokens.sum():
        return {"staleness_max": 0.0, "staleness_mean": 0.0}
    return {"staleness_max": float(updates.max()), "staleness_mean": float((updates * tokens).sum() / tokens.sum())}


def learner_figures(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the step's updates that trained something (pruning may leave one nothing); the mismatch is the first
    update's, whose policy is the one that sampled."""
    trained = [update for update in updates if update["tokens_trained"]] or updates[:1]
    names = [name for name in trained[0] if not name.startswith("mismatch")]
    mean = {name: float(np.mean([update[name] for update in trained])) for name in names}
    mean |= {name: value for name, value in updates[0].items() if name.startswith("mismatch")}
    return mean | {"tokens_trained": sum(update["tokens_trained"] for update in updates)}


def density(batches: Sequence[Batch], tokens_per_row: int) -> float:
    """Valid tokens over the capacity of all non-empty rows."""
    used = [row for batch in batches for rank in batch.rows for row in rank if row]
    tokens = sum(sample.input_length for batch in batches for sample in batch.samples)
    return tokens / (len(used) * tokens_per_row) if used else 0.0


def evaluation_due(step: int, settings: Settings) -> bool:
    every = settings.evaluation.every
    return step in (0, settings.steps) or (every > 0 and step % every == 0)


def checkpoint_due(step: int, settings: Settings) -> bool:
    every = settings.checkpoint.every
    return step == settings.steps or (every > 0 and step % every == 0)
