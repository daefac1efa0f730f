"""A batch survives the way from the controller to a rank, bit for bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.learner.broadcast_batch import decode, encode
from megarl.types import Batch
from tests.support.learner_support import random_samples


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 6), replicas=st.integers(1, 3), depth=st.integers(0, 3))
def test_round_trip(seed: int, count: int, replicas: int, depth: int) -> None:
    """Samples (absent arrays stay absent), rows (empty ones too) and denominators."""
    rng = np.random.default_rng(seed)
    samples = random_samples(seed, count)
    rows = [[[int(i) for i in range(count) if rng.random() < 0.3] for _ in range(depth)] for _ in range(replicas)]
    batch = Batch(samples, rows, float(rng.random()), float(rng.random()))
    found = decode(encode(batch))
    assert (found.rows, found.total_sequences, found.total_tokens) == (rows, batch.total_sequences, batch.total_tokens)
    assert len(found.samples) == count
    for a, b in zip(found.samples, samples, strict=True):
        assert (a.response_start, a.scale, a.advantage) == (b.response_start, b.scale, b.advantage)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        for name in ("sampled", "rollout_logprobs", "old_logprobs", "ref_logprobs", "experts"):
            left, right = getattr(a, name), getattr(b, name)
            assert (left is None) == (right is None)
            if right is not None:
                np.testing.assert_array_equal(left, right)
                assert left.dtype == right.dtype
