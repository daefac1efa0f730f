"""Dynamic pruning: who may be dropped, with what chance, at what weight; and that expectations are kept.

Unbiasedness of the gradient itself, through a model and the policy loss, is in test_unbiased.py.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl import config
from megarl.algorithms import pruning
from megarl.algorithms.pruning import (
    ExpectedLength,
    History,
    completion_weights,
    prompt_weights,
    uniforms,
)
from megarl.bench.unbiased import threshold
from megarl.errors import UserError

rates = st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9])


def history_of(scores: list[float | None]) -> History:
    history = History(len(scores))
    for i, score in enumerate(scores):
        if score is not None:
            history.update(i, score)
    return history


# --- history


@given(visits=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 3, width=32)), max_size=60))
def test_history_keeps_the_last_score_and_the_mean_of_the_visited(visits):
    history, last = History(10), {}
    for index, score in visits:
        history.update(index, score)
        last[index] = score
    assert [history.score(i) for i in range(10)] == [last.get(i) for i in range(10)]
    if last:
        assert history.mean() == pytest.approx(sum(last.values()) / len(last), abs=1e-12)
    else:
        assert history.mean() is None


def test_history_survives_state_and_restore_bit_by_bit(tmp_path):
    """Through a file, and continued: copy and original stay equal to the last bit, the running mean included."""
    rng = np.random.default_rng(0)
    one = History(50)
    for index in rng.integers(0, 50, 200):
        one.update(int(index), rng.random())
    np.savez(tmp_path / "history.npz", **one.state())
    two = History(50)
    with np.load(tmp_path / "history.npz") as state:
        two.restore(state)
    for index in rng.integers(0, 50, 200):
        value = rng.random()
        one.update(int(index), value)
        two.update(int(index), value)
    assert one.mean() == two.mean()
    assert one.state()["scores"].tobytes() == two.state()["scores"].tobytes()


def test_state_is_a_copy():
    history = history_of([1.0, None])
    state = history.state()
    history.update(1, 2.0)
    assert np.isnan(state["scores"][1])
    other = History(2)
    other.restore(state)
    other.update(0, 9.0)
    assert state["scores"][0] == 1.0


def test_history_takes_four_bytes_a_prompt():
    """10 million prompts are 40 MB, and a visit does not walk through them."""
    history = History(10_000_000)
    history.update(9_999_999, 1.0)
    assert history.state()["scores"].nbytes == 40_000_000
    assert history.mean() == 1.0


def test_history_of_other_data_is_refused():
    with pytest.raises(UserError, match="has 3 prompts, the checkpoint's pruning history 2"):
        History(3).restore(History(2).state())


@pytest.mark.parametrize("score", [-0.1, np.nan, np.inf])
def test_history_refuses_what_is_no_magnitude(score):
    with pytest.raises(ValueError, match="prompt 0"):
        History(1).update(0, score)


# --- who is low


def chances(history, rate, selection="random_low"):
    """P_q of every prompt, from the draws that drop it."""
    assign = partial(prompt_weights, history, np.arange(len(history)), rate=rate, selection=selection)
    return [threshold(assign, len(history), i) for i in range(len(history))]


def test_only_visited_prompts_below_the_mean_can_be_pruned():
    history = history_of([0.0, 1.0, None, 0.4])
    np.testing.assert_allclose(chances(history, 0.6), [0.6, 0.0, 0.0, 0.6], rtol=1e-12)
    assert chances(History(1), 0.6) == [0.0]


def test_proportional_keeps_the_low_in_proportion_to_their_score():
    """Mean .5: a score of 0 is dropped at the rate, .4 with chance 1 - .4/.5, those at and above the mean never."""
    history = history_of([0.0, 0.4, 0.5, 1.1, None])
    np.testing.assert_allclose(chances(history, 0.6, "proportional"), [0.6, 0.2, 0, 0, 0], rtol=1e-6)
    weights = completion_weights(
        np.array([3.0, -1.0, -1.0, -1.0]), np.array([0, 0.3, 0.34, 0.9]), 0.5, "bernoulli", "proportional"
    )
    np.testing.assert_allclose(weights, [1, 0, 1.5, 1.5])


def test_scores_that_differ_by_rounding_are_not_pruned():
    """Equal groups in another order of completions may score one float32 apart: a tie is not below the mean."""
    score = np.float32(0.7)
    history = history_of([float(score), float(np.nextafter(score, np.float32(1)))])
    assert history.score(0) < history.mean()
    assert chances(history, 0.9) == [0, 0]


@pytest.mark.parametrize("size", range(2, 12))
def test_equal_magnitudes_are_not_pruned_by_rounding(size):
    """0/1 rewards split in halves have |A| equal up to rounding, whatever the order of the sum."""
    rewards = np.array([0.1, 0.3] * size)
    advantage = (rewards - rewards.mean()) / rewards.std()
    drop_all = np.zeros(2 * size)
    assert (completion_weights(advantage, drop_all, 0.9) == 1).all()


def test_the_majority_is_low():
    """One right of four: its |A| is above the mean, the three wrong ones below."""
    weights = completion_weights(np.array([1.5, -0.5, -0.5, -0.5]), np.array([0.0, 0.0, 0.49, 0.5]), 0.5)
    np.testing.assert_array_equal(weights, [1, 0, 0, 2])


def test_zero_variance_groups_are_dropped_only_where_that_is_exact():
    zeros, draws = np.zeros(4), np.zeros(4)
    assert (completion_weights(zeros, draws, 0.9, drop_zero_variance=True) == 0).all()
    assert (completion_weights(zeros, draws, 0.9, drop_zero_variance=False) == 1).all()


def test_zero_variance_needs_a_loss_without_kl_and_entropy():
    from megarl.algorithms.presets import resolve

    def may(pruning_settings: config.Pruning, **algorithm) -> bool:
        switches = resolve(config.Algorithm.model_validate(algorithm), 100, 1)
        return pruning.may_drop_zero_variance(pruning_settings, switches)

    assert may(config.Pruning())
    assert may(config.Pruning(), kl={"coef": 0.1, "apply_to": "reward"})
    assert not may(config.Pruning(), kl={"coef": 0.1, "apply_to": "loss"})
    assert not may(config.Pruning(), entropy_coef=0.01)
    assert not may(config.Pruning(drop_zero_variance=False))


# --- draws and weights

magnitudes = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=6)


def every_draw(low: np.ndarray, rate: float, draw: str):
    """All outcomes of the low class's draws, as (probability, uniforms)."""
    members = np.flatnonzero(low)
    if draw == "bernoulli":
        for outcome in product([True, False], repeat=len(members)):
            u = np.full(len(low), 0.999)
            u[members] = [rate / 2 if dropped else (1 + rate) / 2 for dropped in outcome]
            yield float(np.prod([rate if dropped else 1 - rate for dropped in outcome])), u
    else:
        subsets = list(combinations(members, int(Fraction(str(rate)) * len(members))))
        for subset in subsets:
            u = np.full(len(low), 0.9)
            u[list(subset)] = 0.1
            yield 1 / len(subsets), u


@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
@given(values=magnitudes, rate=rates)
def test_expected_weight_is_one_for_every_completion(draw, values, rate):
    """Horvitz-Thompson, by enumeration of every draw: the estimator of any sum over the group is unbiased."""
    values = np.array(values)
    low = values < values.mean() * (1 - pruning.TIE)
    total, chance = np.zeros(len(values)), 0.0
    for probability, uniform in every_draw(low, rate, draw):
        weights = completion_weights(values, uniform, rate, draw)
        assert (weights[~low] == 1).all()
        total, chance = total + probability * weights, chance + probability
    assert chance == pytest.approx(1)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
@given(values=magnitudes, rate=rates)
def test_expected_weight_is_one_for_every_prompt(draw, values, rate):
    """The same at the prompt level, through a history."""
    history = history_of(list(values))
    low = np.array(chances(history, 0.5)) > 0
    total = np.zeros(len(values))
    for probability, uniform in every_draw(low, rate, draw):
        total += probability * prompt_weights(history, np.arange(len(values)), uniform, rate, draw)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


@given(values=magnitudes, rate=rates, seed=st.integers(0, 1000))
def test_fixed_draws_drop_exactly_the_floor(values, rate, seed):
    weights = completion_weights(np.array(values), uniforms(len(values), seed), rate, "fixed")
    low = sum(v < np.mean(values) for v in values)
    assert (weights == 0).sum() == int(Fraction(str(rate)) * low)
    assert weights.sum() == pytest.approx(len(values))


def test_the_floor_is_not_lost_to_rounding():
    """0.29 * 100 is 28.999… in floating point."""
    values = np.array([1.0] * 100 + [200.0])
    weights = completion_weights(values, uniforms(101, 0), 0.29, "fixed")
    assert (weights == 0).sum() == 29


def test_deterministic_drops_the_lowest_whatever_the_draw():
    values = np.array([0.3, 9.0, 0.1, 0.2, 0.1])
    for seed in range(3):
        weights = completion_weights(values, uniforms(5, seed), 0.5, selection="deterministic")
        np.testing.assert_array_equal(weights, [2, 1, 0, 2, 0])
    weights = prompt_weights(history_of(list(values)), np.arange(5), uniforms(5, 0), 0.5, selection="deterministic")
    np.testing.assert_array_equal(weights, [2, 1, 0, 2, 0])


def test_deterministic_says_that_it_is_biased():
    assert "biased" in pruning.notice(config.Pruning(prompts=0.5, selection="deterministic"))
    assert pruning.notice(config.Pruning(prompts=0.5)) is None
    assert pruning.notice(config.Pruning(selection="deterministic")) is None  # nothing is pruned


def test_rate_zero_prunes_nothing():
    for draw, selection in product(["bernoulli", "fixed"], ["random_low", "proportional", "deterministic"]):
        assert (completion_weights(np.array([1.0, 5.0]), np.zeros(2), 0.0, draw, selection) == 1).all()
        assert (prompt_weights(history_of([1.0, 5.0]), np.arange(2), np.zeros(2), 0.0, draw, selection) == 1).all()


def test_a_bernoulli_prompts_fate_is_its_own():
    """Its weight does not depend on which candidates are drawn beside it, so no layout or block size changes it."""
    history = history_of([0.1, 0.9, 0.2, 0.8, 0.3])
    draws = np.array([uniforms(1, 7, 0, uid)[0] for uid in "abcde"])
    together = prompt_weights(history, np.arange(5), draws, 0.5)
    alone = [prompt_weights(history, np.array([i]), draws[i : i + 1], 0.5)[0] for i in range(5)]
    np.testing.assert_array_equal(together, alone)


def test_uniforms_are_a_function_of_their_key_and_even():
    """Equal keys, equal draws; neighbours in seed, epoch, uid or index differ; mean and spread are those of U(0, 1)."""
    np.testing.assert_array_equal(uniforms(3, 1, 0, "a"), uniforms(5, 1, 0, "a")[:3])
    firsts = {
        uniforms(1, *key)[0] for key in [(1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b"), (11, "a"), (1, 1, "")]
    }
    assert len(firsts) == 6
    sample = np.concatenate([uniforms(4, 0, 0, i) for i in range(2500)])
    assert sample.min() >= 0 and sample.max() < 1
    assert abs(sample.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 10_000)
    assert abs(sample.var() - 1 / 12) < 0.004


# --- denominators


@given(
    population=st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=4), kept=st.integers(2, 4)
)
def test_refilled_steps_are_unbiased(population, kept):
    """Prompts of value s, half of them prunable at rate 1/2, are taken (with replacement) until `kept` survive.
    The expectation of (sum of weighted survivors) / unpruned_prompts is the population's mean; by exact enumeration
    over the number taken (its tail is below 1e-12). Dividing by `taken` is biased: the correction is needed."""
    s = np.array([value for value, _ in population], dtype=float)
    keep = np.array([0.5 if prunable else 1.0 for _, prunable in population])
    survival = keep.mean()  # of one draw
    survivor = (s / keep * keep).mean() / survival  # expected weighted value of one survivor, whatever the number taken
    expected, naive, chance = 0.0, 0.0, survival**kept
    for taken in range(kept, 120):
        expected += chance * kept * survivor / pruning.unpruned_prompts(taken, kept, refilled=True)
        naive += chance * kept * survivor / taken
        chance *= (1 - survival) * taken / (taken - kept + 1)
    assert expected == pytest.approx(s.mean(), abs=1e-9)
    if survival < 1 and s.mean():
        assert abs(naive - s.mean()) > 0.01 * abs(s.mean())


def test_unrefilled_steps_stand_for_what_was_taken():
    assert pruning.unpruned_prompts(10, 7, refilled=False) == 10
    assert pruning.unpruned_prompts(8, 8, refilled=True) == 8
    assert pruning.unpruned_prompts(3, 1, refilled=True) == 3


def test_expected_length_is_the_weighted_mean_with_recent_steps_counting_more():
    length = ExpectedLength()
    assert length.mean() is None
    length.update(np.array([10, 40]), np.array([3.0, 1.0]))
    assert length.mean() == pytest.approx(17.5)
    length.update(np.array([100]), np.array([4.0]))
    assert length.mean() == pytest.approx((0.9 * 70 + 400) / (0.9 * 4 + 4))
    copy = ExpectedLength()
    copy.restore(length.state())
    assert copy.mean() == length.mean()


# --- figures


def test_effective_sample_size():
    assert pruning.effective_sample_size(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert pruning.effective_sample_size(np.array([1.0, 3.0])) == pytest.approx(16 / 10)
    assert pruning.effective_sample_size(np.array([])) == 0


def test_warning_when_few_samples_carry_the_weight():
    """One of weight 100 beside nine of 1: 109² / 10009 = 1.2 effective samples of 10."""
    heavy = np.array([100.0] + [1.0] * 9 + [0.0] * 5)
    assert "10 kept samples are worth 1.2, below pruning.min_effective 0.25" in pruning.warning(heavy, config.Pruning())
    assert pruning.warning(np.ones(10), config.Pruning(min_effective=1.0)) is None
    assert pruning.warning(np.zeros(3), config.Pruning(min_effective=1.0)) is None


@given(
    g=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    rate=st.sampled_from([0.3, 0.5, 0.9]),
)
def test_added_variance_is_estimated_without_bias(g, rate):
    """Enumerating every Bernoulli draw: its mean is sum g² P/(1-P), and so is the true variance of the weighted sum."""
    g, low = np.array(g), np.arange(len(g)) % 2 == 0
    mean = square = estimate = 0.0
    for probability, uniform in every_draw(low, rate, "bernoulli"):
        weights = np.where(low, np.where(uniform < rate, 0, 1 / (1 - rate)), 1.0)
        mean += probability * (weights @ g)
        square += probability * (weights @ g) ** 2
        estimate += probability * pruning.added_variance(g, weights)
    assert estimate == pytest.approx((g[low] ** 2).sum() * rate / (1 - rate), rel=1e-9, abs=1e-9)
    assert estimate == pytest.approx(square - mean**2, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "until, steps, last", [(1.0, 10, 10), (0.875, 10, 8), (0.7, 10, 7), (0.05, 10, 0), (0.29, 100, 29)]
)
def test_annealing_stops_pruning_after_its_share(until, steps, last):
    """0.29 * 100 is 28.999… in floating point; step 29 prunes all the same, step 30 does not."""
    annealed = config.Pruning(until_fraction=until)
    assert [s for s in range(1, steps + 1) if pruning.active(annealed, s, steps)] == list(range(1, last + 1))
