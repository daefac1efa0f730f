"""A batch survives the way from the controller to a rank, bit for bit. Recorded routing goes where it is used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import Parallel, Precision
from megarl.learner.broadcast_batch import broadcast, decode, encode
from megarl.learner.parallel import start
from megarl.runtime.spawn import spawn
from megarl.types import Batch
from tests.support.learner_support import random_samples


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 6), replicas=st.integers(1, 3), depth=st.integers(0, 3))
def test_round_trip(seed: int, count: int, replicas: int, depth: int) -> None:
    """Samples without routing (absent arrays stay absent), rows (empty ones too) and denominators."""
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
        for name in ("sampled", "rollout_logprobs", "old_logprobs", "ref_logprobs"):
            left, right = getattr(a, name), getattr(b, name)
            assert (left is None) == (right is None)
            if right is not None:
                np.testing.assert_array_equal(left, right)
                assert left.dtype == right.dtype
        assert a.experts is None


def shared(parallel: Parallel) -> tuple[int, list[np.ndarray | None], list[bool]]:
    """On each rank: its data-parallel rank, the routing that it got, and whether all else is the controller's."""
    world = start(parallel, Precision(dtype="fp32"), 0, 60.0)
    batch = routed_batch()
    found = broadcast(batch if world.is_controller else None, world)
    equal = [np.array_equal(a.token_ids, b.token_ids) for a, b in zip(found.samples, batch.samples, strict=True)]
    return world.dp_rank, [sample.experts for sample in found.samples], equal


def routed_batch() -> Batch:
    """Six samples, some with recorded routing. Both data-parallel ranks have some of each, and one sample is unused."""
    rows = [[[0, 3], []], [[4], [1, 5]]]
    return Batch(random_samples(3, 6), rows, 6.0, 60.0)


@pytest.mark.slow
@pytest.mark.parallel
def test_routing_goes_to_the_ranks_that_have_the_row() -> None:
    """tp 2 and dp 2 on four ranks. Rank 0, which has all, keeps all."""
    batch = routed_batch()
    with_routing = [i for i, sample in enumerate(batch.samples) if sample.experts is not None]
    for rank, (replica, routing, equal) in enumerate(spawn(shared, 4, (Parallel(tp=2),), 120.0)):
        own = {i for row in batch.rows[replica] for i in row}
        wanted = [i for i in with_routing if rank == 0 or i in own]
        assert all(equal) and [i for i, experts in enumerate(routing) if experts is not None] == wanted
        for i in wanted:
            np.testing.assert_array_equal(routing[i], batch.samples[i].experts)
    assert with_routing and set(with_routing) != set(range(6))
