"""What the learner trains on in this benchmark."""

from __future__ import annotations

import numpy as np

from megarl.types import Batch, Sample


def chain(step: int, tokens: int = 16) -> Batch:
    """Eight sequences of a noisy chain: the token after t is 5 t + 3 with probability 0.7, else any."""
    rng = np.random.default_rng(step)
    ids = rng.integers(0, tokens, (8, 65))
    for t in range(64):
        follow = rng.random(8) < 0.7
        ids[follow, t + 1] = (5 * ids[follow, t] + 3) % tokens
    return Batch([Sample(row.astype(np.int32), 1, 1 / 512) for row in ids], [[[0, 1, 2, 3], [4, 5, 6, 7]]], 8.0, 512.0)


def full_rows(rows: int, tokens: int, each: int, vocabulary: int) -> Batch:
    """`rows` rows of `tokens` random input tokens on one data-parallel rank, in sequences of `each`."""
    rng, count = np.random.default_rng(0), tokens // each
    samples = [Sample(rng.integers(0, vocabulary, each + 1).astype(np.int32), 1, 1e-4) for _ in range(count * rows)]
    return Batch(samples, [[list(range(count * i, count * (i + 1))) for i in range(rows)]], len(samples), 1.0)
