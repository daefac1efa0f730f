"""The learner's side of the canary: its log-probs, and how far its own rounding moves them."""

from __future__ import annotations

import numpy as np

from megarl.learner.learner import Learner
from megarl.learner.rounding import nudged
from megarl.rollout.weights.verify import Canary
from megarl.types import Batch, Sample

NUDGES = 2  # forward passes that measure the rounding


def measure(learner: Learner, tokens: np.ndarray, start: int) -> Canary:
    """The canary of tokens[start:], in the engines' arithmetic. Collective; without log-probs except on rank 0.

    Engines do not quantise. FP8's rounding would hide a wrong tensor here; the step's mismatch measures it.
    """
    [logprobs] = _logprobs(learner, tokens, start, copies=1)
    with nudged(learner.models):
        moved = _logprobs(learner, tokens, start, copies=NUDGES)
    rounding = np.sqrt(np.mean((moved - logprobs) ** 2, 0))
    return Canary(tokens.tolist(), logprobs.tolist(), rounding.tolist())


def _logprobs(learner: Learner, tokens: np.ndarray, start: int, copies: int) -> np.ndarray:
    """Log-probs of tokens[start:] in `copies` forward passes, [copies, n]; n is 0 except on rank 0."""
    batch = None
    if learner.world.is_controller:
        samples = [Sample(tokens, response_start=start, scale=1.0)] * copies
        mine = [[i] for i in range(copies)]
        rows: list[list[list[int]]] = [mine if rank == 0 else [[]] * copies for rank in range(learner.world.dp_size)]
        batch = Batch(samples, rows, 1.0, float(copies * len(tokens)))
    found = learner.logprobs(batch, "policy", temperature=1.0, quantised=False)
    return np.array([found[i] for i in sorted(found)]) if found else np.zeros((copies, 0))
