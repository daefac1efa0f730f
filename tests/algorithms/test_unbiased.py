"""Dynamic pruning keeps the expected gradient: the benchmark's enumeration, on the rows that carry the claim."""

from __future__ import annotations

import numpy as np
import pytest

from megarl.algorithms.pruning import completion_weights
from megarl.bench.unbiased import BIASED, TOLERANCE, Case, Problem, cases, measure, outcomes


@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_prompts_and_completions_together_are_unbiased(aggregation, draw):
    """Proves exactness to 1e-12 on a real causal LM's loss, with clip, TIS, KL and entropy inside, in float64.

    The unpruned token count is taken as known, as it is for completions; for prompts training uses its expectation,
    which scales the gradient by a factor that this step's draws do not touch.
    """
    row = measure(Case(aggregation=aggregation, draw=draw))
    assert row["prunings"] > 4
    assert row["max_rel_bias"] <= TOLERANCE["fp64"]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_chance_for_each_is_unbiased_too(aggregation):
    row = measure(Case(estimator="proportional", aggregation=aggregation))
    assert row["prunings"] > 4
    assert row["max_rel_bias"] <= TOLERANCE["fp64"]


def test_it_holds_in_single_precision():
    assert measure(Case(aggregation="token_mean", draw="fixed", dtype="fp32"))["max_rel_bias"] <= TOLERANCE["fp32"]


@pytest.mark.parametrize(
    "case",
    [case for case in cases() if not case.expected_unbiased],
    ids=lambda case: f"{case.estimator}-{case.preset}-{case.aggregation}-{case.level}",
)
def test_the_harness_sees_every_mistake(case):
    """Each estimator that is biased on paper is biased by more than 1 % here: the enumeration can fail."""
    assert measure(case)["max_rel_bias"] > BIASED


def test_dropping_zero_variance_groups_is_exact_without_kl_and_entropy():
    case = Case(estimator="zero_variance_dropped", regularised=False, draw="fixed")
    assert measure(case)["max_rel_bias"] <= TOLERANCE["fp64"]


def test_the_problem_clips_and_corrects():
    """The loss that is enumerated is not the on-policy special case: every kind of clip acts somewhere in it."""
    from megarl.algorithms.loss import policy_loss, within_row

    problem, case = Problem("fp64"), Case()
    everything = np.arange(problem.size)
    logprobs, entropy = problem.model(problem.tokens)
    micro = problem.row(everything, np.ones(problem.size), problem.advantages(case))
    _, sums = policy_loss(logprobs.flatten(), entropy.flatten(), micro, within_row(micro.sequence), case.switches)
    assert all(sums[name] > 0 for name in ("clip_low", "clip_high", "tis_clip", "kl", "mismatch"))
    assert sums["mismatch_tokens"] < sums["tokens"]


def test_outcomes_have_the_probabilities_of_the_draws():
    """Two low completions at rate 0.6: four Bernoulli outcomes, two of fixed size (one of the two is dropped)."""
    values = np.array([3.0, 1.0, 1.0])

    def assign(draw):
        return lambda uniform: completion_weights(values, uniform, 0.6, draw)

    bernoulli = {tuple(w == 0): p for p, w in outcomes(assign("bernoulli"), 3, "bernoulli")}
    assert bernoulli == pytest.approx({
        (False, False, False): 0.16, (False, True, False): 0.24, (False, False, True): 0.24, (False, True, True): 0.36,
    })  # fmt: skip
    fixed = {tuple(w): p for p, w in outcomes(assign("fixed"), 3, "fixed")}
    assert fixed == pytest.approx({(1.0, 0.0, 2.0): 0.5, (1.0, 2.0, 0.0): 0.5})
