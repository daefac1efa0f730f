"""The order of the prompts: a permutation every epoch, a function of (seed, epoch), without early returns."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.order import EpochOrder

EPOCH_0 = [6, 7, 9, 3, 5, 8, 1, 2, 0, 11, 10, 4]
EPOCH_1 = [6, 2, 8, 1, 11, 0, 10, 4, 9, 7, 3, 5]


@given(st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 50))
def test_every_epoch_is_a_permutation(prompts, seed, epoch):
    order = EpochOrder(prompts, seed, shuffle=True)(epoch)
    assert sorted(order.tolist()) == list(range(prompts))
    assert order.dtype == np.int32


@given(st.integers(1, 60), st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_epochs_in_any_order_are_the_same(prompts, epochs):
    """Asked for in whatever sequence, as after a resume, an epoch has the same order."""
    one = EpochOrder(prompts, 5, shuffle=True)
    assert all(one(e).tolist() == EpochOrder(prompts, 5, shuffle=True)(e).tolist() for e in epochs)


@given(st.integers(1, 100), st.integers(0, 1000))
def test_no_prompt_returns_within_a_third_of_the_data(prompts, seed):
    """Across the seams between epochs: any third of the data taken in a row, and one more, are different prompts."""
    order = EpochOrder(prompts, seed, shuffle=True)
    taken = np.concatenate([order(epoch) for epoch in range(4)]).tolist()
    span = prompts // 3 + 1
    assert all(len(set(taken[i : i + span])) == span for i in range(len(taken) - span))


def test_the_order_never_changes():
    """Written down once: the runs of last year must resume next year, on any version of numpy."""
    order = EpochOrder(12, 7, shuffle=True)
    assert order(0).tolist() == EPOCH_0
    assert order(1).tolist() == EPOCH_1
    assert EpochOrder(4, 7, shuffle=False)(3).tolist() == [0, 1, 2, 3]


def test_seeds_and_epochs_differ():
    orders = {tuple(EpochOrder(50, seed, True)(epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_place_is_equally_likely():
    """Over 2,000 epochs each prompt is in each place nearly equally often (6 sigma), the trades at the seams included.

    It does not prove independence of the places.
    """
    prompts, epochs = 6, 2000
    counts = np.zeros((prompts, prompts))
    order = EpochOrder(prompts, 0, shuffle=True)
    for epoch in range(epochs):
        counts[order(epoch), np.arange(prompts)] += 1
    expected = epochs / prompts
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)
