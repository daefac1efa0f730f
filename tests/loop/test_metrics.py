"""Metrics of a step: from its updates, and from what was rolled out and graded for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megarl.algorithms.metrics import combine, mismatch
from megarl.data.loader import ScheduledPrompt
from megarl.loop.controller import ended
from megarl.loop.metrics import of_rewards
from megarl.loop.scoring import Collected, score
from megarl.rewards.grade import Grade
from megarl.types import Completion, Group, Prompt, ScoredGroup
from tests.support import runs


def test_means_over_tokens_are_weighted_over_all_updates() -> None:
    """Entropy, clipping, KL by trained tokens, the mismatch by sampled ones and its largest of any update. Loss and
    gradient norm are means. An update that pruning left nothing counts for nothing."""
    first = {"tokens_trained": 10.0, "entropy": 1.0, "loss": 1.0, "kl": 0.5, "clip_fraction": 0.0, "grad_norm": 1.0}
    first |= {"mismatch_mean": 1e-6, "mismatch_kl": 0.0, "mismatch_max": 2e-6, "mismatch_tokens": 10.0}
    second = {"tokens_trained": 30.0, "entropy": 3.0, "loss": 2.0, "kl": 0.1, "clip_fraction": 0.4, "grad_norm": 3.0}
    second |= {"mismatch_mean": 3.0, "mismatch_kl": 4.0, "mismatch_max": 9.0, "mismatch_tokens": 10.0}
    nothing = dict.fromkeys(first, 0.0)
    expected = {"tokens_trained": 40.0, "entropy": 2.5, "loss": 1.5, "kl": 0.2, "clip_fraction": 0.3, "grad_norm": 2.0}
    expected |= {"mismatch_mean": 1.5000005, "mismatch_kl": 2.0, "mismatch_max": 9.0, "mismatch_tokens": 20.0}
    assert combine([first, second]) == pytest.approx(expected)
    assert combine([first, nothing, second]) == combine([first, second])
    assert combine([nothing, second]) == second  # bit by bit: one update is its own mean


def test_a_step_that_trains_nothing_has_no_loss_of_zero() -> None:
    """Loss, entropy and ratio of no token would read as a collapse. What is true of it stays."""
    nothing = {"tokens_trained": 0.0, "entropy": 0.0, "loss": 0.0, "ratio_mean": 0.0, "grad_norm": 0.0, "lr": 1e-6}
    assert combine([nothing, nothing]) == {"tokens_trained": 0.0, "grad_norm": 0.0, "lr": 1e-6}
    assert combine([]) == {}


def test_a_mismatch_that_is_no_number_stays_so() -> None:
    both = {"tokens_trained": 1.0, "mismatch_tokens": 1.0, "mismatch_mean": 0.0, "mismatch_max": 0.0}
    assert math.isnan(combine([both, both | {"mismatch_mean": math.nan, "mismatch_max": math.nan}])["mismatch_max"])


def test_the_mismatch_of_log_probs_skips_inserted_tokens() -> None:
    """The engine is 3 nats off on one of two sampled tokens."""
    found = mismatch(np.array([-1.0, -5.0, -2.0]), np.array([-1.0, math.nan, -5.0]))
    kl = (math.exp(3) - 3 - 1) / 2
    assert found == pytest.approx({"mismatch_mean": 1.5, "mismatch_kl": kl, "mismatch_max": 3.0, "mismatch_tokens": 2})
    assert mismatch(np.zeros(1), np.array([math.nan])) == {}


def scored(uid: str, *grades: Grade, settings=None) -> ScoredGroup:
    tokens = (np.zeros(3, np.int32), np.zeros(3, np.uint8), np.zeros(3, np.float32), "stop")
    made = [Completion(uid, i, *tokens, text="x") for i in range(len(grades))]
    return score(Group(Prompt(uid, (1,), "", "", "f:1"), made), grades, 1.0, settings)


@pytest.fixture
def settings(tmp_path):
    return runs.settings(tmp_path / "run", "reward.alpha=0.9", "reward.shaping=none")


def test_accuracy_is_the_share_of_right_verdicts_whatever_the_numbers(settings) -> None:
    """Numbers of any size and sign: their mean is the score. The reward's deviation and the groups of equal rewards."""
    groups = [
        scored("a", Grade("right", 7.5, False), Grade("wrong", -1.0, False), settings=settings),
        scored("b", Grade("wrong", 0.4, False), Grade("wrong", 0.4, False), settings=settings),
    ]
    found = of_rewards(groups)
    rewards = 0.9 * np.array([7.5, -1.0, 0.4, 0.4])
    assert found["accuracy"] == 0.25 and found["score"] == pytest.approx(7.3 / 4)
    assert (found["verdict_right"], found["verdict_wrong"]) == (1, 3)
    assert found["reward"] == pytest.approx(rewards.mean()) and found["reward_std"] == pytest.approx(rewards.std())
    assert found["equal_groups"] == 0.5


def test_the_message_of_a_grade_stays_with_its_completion(settings) -> None:
    group = scored("a", Grade("error", 0.0, False, "ValueError: why"), Grade("right", 1.0, True), settings=settings)
    assert [c.message for c in group.completions] == ["ValueError: why", ""]


def test_replaced_groups_are_counted_and_marked(settings) -> None:
    """Dynamic sampling's figures are of all completions made. What it replaced has no weight."""
    collected = Collected()
    mixed = scored("a", Grade("right", 1.0, True), Grade("wrong", 0.0, True), settings=settings)
    equal = scored("b", Grade("timeout", 0.0, False), Grade("wrong", 0.0, True), settings=settings)
    where = ScheduledPrompt(mixed.prompt, 0, 0, 1.0)
    collected.add(where, equal, replaced=True)
    assert collected.nothing_left and "each of 1 groups has equal scores, and 0 of 2" in ended(collected)
    collected.add(where, mixed, replaced=False)
    assert not collected.nothing_left
    assert (collected.groups, collected.made) == ([mixed], [mixed, equal])
    assert of_rewards(collected.made)["verdict_timeout"] == 1
    assert equal.replaced and not mixed.replaced
    assert [(c.weight, c.advantage) for c in equal.completions] == [(0.0, 0.0)] * 2
