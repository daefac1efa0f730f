"""Advantages against definitions written out one completion at a time."""

from __future__ import annotations

import statistics
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.algorithms.advantage import advantages
from megarl.algorithms.presets import Advantage
from megarl.errors import UserError

KINDS = get_args(Advantage)
# Multiples of 1/16: equal rewards are then equal exactly, as verdicts are.
reward = st.integers(-32, 32).map(lambda n: n / 16)
batches = st.lists(st.lists(reward, min_size=2, max_size=7), min_size=1, max_size=5)


def naive(batch: list[list[float]], kind: str) -> list[list[float]]:
    out = []
    everything = [r - statistics.fmean(group) for group in batch for r in group]
    for group in batch:
        mean = statistics.fmean(group)
        row = []
        for i, r in enumerate(group):
            if kind == "grpo":
                row.append((r - mean) / (statistics.stdev(group) + 1e-6))
            elif kind == "dr_grpo":
                row.append(r - mean)
            elif kind == "rloo":
                row.append(r - statistics.fmean(group[:i] + group[i + 1 :]))
            else:
                row.append((r - mean - statistics.fmean(everything)) / (statistics.pstdev(everything) + 1e-6))
        out.append(row)
    return out


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches)
def test_every_kind_is_its_definition(kind, batch):
    """Proves the formulas on groups of different sizes, with negative and repeated rewards."""
    got = advantages([np.array(g) for g in batch], kind)
    assert [len(g) for g in got] == [len(g) for g in batch]
    for ours, theirs in zip(got, naive(batch, kind), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3])
def test_equal_rewards_have_advantage_exactly_zero(kind, value):
    """Exactly 0, not 1e-11: pruning's zero-variance shortcut compares with 0. A lone completion is such a group."""
    # 0.1 and 1/3 have sizes at which their mean is not themselves, to the last bit.
    for size in range(2, 30):
        assert (advantages([np.full(size, value)], kind)[0] == 0).all()
    got = advantages([np.full(5, value), np.array([0.0, 1.0, 1.0]), np.array([value])], kind)
    assert (got[0] == 0).all()
    assert got[1].any()
    assert (got[2] == 0).all()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@given(batch=batches)
def test_groups_never_leak_into_each_other(kind, batch):
    """A group's advantages do not depend on what else is in the batch (all kinds but the batch-normalised one)."""
    groups = [np.array(g) for g in batch]
    together = advantages(groups, kind)
    for group, ours in zip(groups, together, strict=True):
        np.testing.assert_array_equal(advantages([group], kind)[0], ours)


def test_batch_statistic_makes_up_for_pruned_prompts():
    """A group that stands for two equal ones (keep 1/2) gives the advantages of the batch that holds both."""
    a, b = np.array([0.0, 1.0, 1.0]), np.array([3.0, 0.0])
    whole = advantages([a, a, b], "reinforce_pp")
    pruned = advantages([a, b], "reinforce_pp", keep=[0.5, 1.0])
    np.testing.assert_allclose(pruned[0], whole[0])
    np.testing.assert_allclose(pruned[1], whole[2])


def test_rewards_that_are_not_numbers_are_refused():
    with pytest.raises(UserError, match="reward.function: returned nan in group 1"):
        advantages([np.array([0.0, 1.0]), np.array([0.0, np.nan])], "grpo")
