"""The metrics of one step, under their names in metrics.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megarl.algorithms import pruning
from megarl.config import Settings
from megarl.errors import RunError
from megarl.loop.rollout_engine import RolloutEngine
from megarl.loop.scoring import Collected
from megarl.rollout.early_exit import metrics as early_exit
from megarl.runtime import device
from megarl.types import Batch, Completion


def of_step(
    step: int,
    collected: Collected,
    batches: Sequence[Batch | None],
    updates: Sequence[dict[str, float]],
    engine: RolloutEngine,
    settings: Settings,
) -> dict[str, Any]:
    """Every metric of a step except its timings. Raises RunError when train and rollout log-probs drifted apart, or
    tokens are staler than the settings allow."""
    scored = collected.completions
    completions = [c.completion for c in scored]
    n = len(completions)
    verdicts = Counter(c.verdict for c in scored)
    trained = learner_metrics(updates)
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
    weights = np.array([c.weight for c in scored])
    return {
        "reward": float(np.mean([c.reward for c in scored])),
        "accuracy": float(np.mean([c.score for c in scored])),
        "response_tokens": float(np.mean([len(c) for c in completions])),
        "overlong": sum(c.finish == "length" for c in completions) / n,
        **{f"verdict_{name}": verdicts.get(name, 0) for name in ("right", "wrong", "timeout", "error")},
        "steps_per_response": float(np.mean([c.steps for c in scored])),
        **early_exit.summarise(collected.groups),
        "tokens_generated": sum(map(len, completions)),
        "prompts_drawn": collected.num_drawn,
        "prompts_pruned": collected.num_drawn - collected.num_kept,
        "completions_dropped": int((weights == 0).sum()),
        "effective_sample_size": pruning.effective_sample_size(weights[weights > 0]),
        "added_variance": pruning.added_variance(np.abs([c.advantage for c in scored]), weights),
        "packing_density": density(batches, settings.batch.tokens_per_row),
        **trained,
        **stale,
        "canary_difference": engine.canary_difference,
        "memory_gib": device.peak_memory() / 2**30,
        "weight_version": completions[0].spans[0].version if n and completions[0].spans else -1,
    }


def staleness(step: int, completions: Sequence[Completion]) -> dict[str, float]:
    """Updates between the weights that sampled a step's tokens and those that it trains: maximum and token mean."""
    updates = np.array([step - 1 - span.version for c in completions for span in c.spans])
    tokens = np.array([span.end - span.start for c in completions for span in c.spans])
    if not tokens.sum():
        return {"staleness_max": 0.0, "staleness_mean": 0.0}
    return {"staleness_max": float(updates.max()), "staleness_mean": float((updates * tokens).sum() / tokens.sum())}


def learner_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the step's updates that trained something: pruning may leave an update nothing. The mismatch is the
    first update's, whose policy is the one that sampled."""
    trained = [update for update in updates if update["tokens_trained"]] or updates[:1]
    names = [name for name in trained[0] if not name.startswith("mismatch")]
    mean = {name: float(np.mean([update[name] for update in trained])) for name in names}
    mean |= {name: value for name, value in updates[0].items() if name.startswith("mismatch")}
    return mean | {"tokens_trained": sum(update["tokens_trained"] for update in updates)}


def density(batches: Sequence[Batch | None], tokens_per_row: int) -> float:
    """Valid tokens over the capacity of all non-empty rows."""
    built = [batch for batch in batches if batch]
    used = [row for batch in built for rank in batch.rows for row in rank if row]
    tokens = sum(sample.input_length for batch in built for sample in batch.samples)
    return tokens / (len(used) * tokens_per_row) if used else 0.0


def due(step: int, every: int, last: int) -> bool:
    """Whether `step` is the last one or a multiple of `every`; 0 means only the last."""
    return step == last or (every > 0 and step % every == 0)
