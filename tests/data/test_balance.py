"""Dealing rows to data-parallel ranks: every sequence once, equal counts, no row over capacity, even work."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.data.balance import Cost, balance, imbalance
from megarl.data.packing import pack
from megarl.errors import UserError
from megarl.models.shape import Experts, ModelShape

CAPACITY = 40


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, CAPACITY), max_size=40),
    st.sampled_from(["dense", "none", "sorted"]),
    st.integers(1, 9),
    st.integers(1, 4),
    st.floats(0, 1),
)
def test_every_sequence_is_on_one_rank(lengths, strategy, dp_size, multiple_of, square):
    """Whatever the rows, ranks and cost: nothing lost or repeated, equally many rows everywhere, none too long."""
    rows = pack(lengths, CAPACITY, strategy)
    ranks = balance(rows, lengths, dp_size, Cost(1.0, square), CAPACITY, multiple_of)
    assert len(ranks) == dp_size
    assert sorted(int(i) for rank in ranks for row in rank for i in row) == list(range(len(lengths)))
    counts = {len(rank) for rank in ranks}
    assert len(counts) == 1
    count = counts.pop()
    assert count % multiple_of == 0
    assert count - multiple_of < -(-len(rows) // dp_size) <= count
    assert all(sum(lengths[i] for i in row) <= CAPACITY for rank in ranks for row in rank)
    again = balance(rows, lengths, dp_size, Cost(1.0, square), CAPACITY, multiple_of)
    assert [[r.tolist() for r in rank] for rank in again] == [[r.tolist() for r in rank] for rank in ranks]


def test_missing_rows_are_split_off():
    """Nine rows for eight ranks make sixteen, all with work in them; rows of one sequence leave empty rows."""
    lengths = np.full(36, 10)
    ranks = balance(pack(lengths, CAPACITY), lengths, 8, Cost(), CAPACITY)
    assert [len(rank) for rank in ranks] == [2] * 8
    assert all(len(row) > 0 for rank in ranks for row in rank)
    ranks = balance(pack(lengths[:3], CAPACITY, "none"), lengths[:3], 2, Cost(), CAPACITY, multiple_of=4)
    assert [[len(row) for row in rank] for rank in ranks] == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_attention_counts():
    """Equal tokens are unequal work: one long sequence outweighs many short ones of as many tokens."""
    lengths = [1000] * 2 + [10] * 200
    rows = [np.array([0]), np.array([1]), np.arange(2, 102), np.arange(102, 202)]
    by_tokens = [rows[:2], rows[2:]]
    cost = Cost(1.0, 0.001)
    assert imbalance(by_tokens, lengths, Cost()) == 1.0
    assert imbalance(by_tokens, lengths, cost) > 1.3
    assert imbalance(balance(rows, lengths, 2, cost, 1000), lengths, cost) <= 1.001


@pytest.mark.parametrize("count", [256, 1024])
@pytest.mark.parametrize("sigma", [0.4, 0.8])
def test_even_at_eight_ranks(count, sigma):
    """A step's worth of log-normal lengths over 8 ranks: the busiest has at most 2 % more than the mean."""
    lengths = np.clip(np.random.default_rng(count).lognormal(7.8, sigma, count), 1, 16384).astype(int)
    cost = Cost(1.0, 2e-5)
    ranks = balance(pack(lengths, 16384), lengths, 8, cost, 16384)
    assert imbalance(ranks, lengths, cost) <= 1.02


def test_one_giant_cannot_be_shared():
    """A sequence dearer than the mean rank bounds the balance; it is then alone on its rank."""
    lengths = [100] + [1] * 60
    ranks = balance(pack(lengths, 100), lengths, 4, Cost(), 100)
    alone = [rank for rank in ranks if any(0 in row for row in rank)]
    assert sum(len(row) for row in alone[0]) == 1
    assert imbalance(ranks, lengths) == pytest.approx(100 / 40)


def test_cost_of_a_model():
    """Against a count by hand for a tiny grouped-query model, dense and with experts."""
    model = ModelShape(layers=2, hidden=8, heads=4, kv_groups=2, head_dim=2, ffn=16, vocab=10)
    dense = Cost.of_model(model)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, o; heads of 2
    assert dense.token == 2 * (attention + 3 * 8 * 16) + 8 * 10
    assert dense.square == 2 * 4 * 2  # layers * heads * head size: n**2 / 2 scores and n**2 / 2 weighted values
    experts = Cost.of_model(replace(model, moe=Experts(5, top_k=2, ffn=4)))
    assert experts.token == 2 * (attention + 8 * 5 + 3 * 8 * 8) + 8 * 10  # the router, and two experts of five
    assert Cost(2.0, 0.5)([0, 3]).tolist() == [0.0, 10.5]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="0 ranks"):
        balance([], [], 0, Cost(), 10)
