"""Markers, step counts and shaped rewards, with the paper's figures."""

from __future__ import annotations

import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl import config
from megarl.algorithms.steps import check_shaping, count_steps, overlong_punishment, shape_rewards, step_aware_reward
from megarl.errors import UserError
from megarl.rewards.grade import judge


@pytest.mark.parametrize(
    "text, markers, steps",
    [
        ("", ["Wait"], 1),
        ("Wait", ["Wait"], 2),
        ("Wait, no. Wait.\nWait", ["Wait"], 4),
        ("Waiting for await and wait and AWait", ["Wait"], 1),
        ("1Wait2 _Wait_ éWaité", ["Wait"], 4),  # only ASCII letters join a word
        ("WaitWait", ["Wait"], 1),
        ("Wait\nAlternatively, Wait", ["Wait", "Alternatively"], 4),
        ("Alternatively", ["Wait"], 1),
        ("But wait. But so", ["But wait", "But"], 3),  # the longest marker counts, once
        ("But wait. But so", ["But", "wait", "But wait"], 3),
        ("a.b axb", ["a.b"], 2),  # markers are words, not patterns
    ],
)
def test_markers_stand_alone(text, markers, steps):
    assert count_steps(text, markers) == steps


@given(
    pieces=st.lists(st.sampled_from(["Wait", "wait", "Waits", " ", ".", "x", "é", "3", "\n", "Hmm"]), max_size=20),
    markers=st.sampled_from([["Wait"], ["Wait", "Hmm"]]),
)
def test_count_is_that_of_a_scan_by_hand(pieces, markers):
    """Proves the count against a character-by-character scan (no marker is a prefix of another here)."""
    text, count = "".join(pieces), 1
    for i in range(len(text)):
        for marker in markers:
            before, after = text[i - 1 : i] if i else "", text[i + len(marker) : i + len(marker) + 1]
            letters = set(string.ascii_letters)
            count += text.startswith(marker, i) and before not in letters and after not in letters
    assert count_steps(text, markers) == count


def paper(score, formatted, steps, **kwargs):
    return step_aware_reward(np.array(score), np.array(formatted), np.array(steps), 0.9, 0.5, **kwargs)


def test_the_papers_figures():
    """Steps (2, 6), both correct and boxed: mu = 4 and R = 1 ± 0.45 tanh(1/2) = 1.20795, 0.79205."""
    np.testing.assert_allclose(paper([1, 1], [1, 1], [2, 6]), [1.2079527, 0.7920473], atol=5e-8)


def test_a_wrong_completion_earns_its_format_only():
    """A wrong completion with a box scores 0.1, without one 0; its steps do not enter mu."""
    rewards = paper([1, 0, 0, 1], [1, 1, 0, 1], [2, 50, 50, 6])
    np.testing.assert_allclose(rewards, [1.2079527, 0.1, 0.0, 0.7920473], atol=5e-8)


def test_no_correct_completion_means_no_efficiency_term():
    np.testing.assert_allclose(paper([0, 0], [1, 0], [2, 6]), [0.1, 0.0])
    np.testing.assert_allclose(paper([0, 0], [1, 0], [2, 6], step_mean="all"), [0.1, 0.0])


def test_mean_over_all_counts_the_wrong_ones():
    """mu = (2 + 10) / 2 = 6 instead of 2: the lone correct completion is then better than its group."""
    assert paper([1, 0], [1, 1], [2, 10])[0] == pytest.approx(1.0)
    assert paper([1, 0], [1, 1], [2, 10], step_mean="all")[0] == pytest.approx(0.9 * (1 + 0.5 * math.tanh(2 / 3)) + 0.1)


@given(
    group=st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 40)), min_size=1, max_size=8),
    alpha=st.floats(0, 1),
    beta=st.floats(0, 1),
)
def test_step_aware_reward_is_its_formula(group, alpha, beta):
    """Proves the formula completion by completion, written with plain floats."""
    correct_steps = [k for acc, _, k in group if acc]
    expected = []
    for acc, fmt, k in group:
        bracket = 1.0
        if acc:
            mu = sum(correct_steps) / len(correct_steps)
            bracket = 1 - beta * math.tanh((k - mu) / mu)
        expected.append(alpha * acc * bracket + (1 - alpha) * fmt)
    score, formatted, steps = (np.array(column) for column in zip(*group, strict=True))
    np.testing.assert_allclose(
        step_aware_reward(score, formatted, steps, alpha, beta), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("length, expected", [(0, 0), (16384, 0), (18432, -0.5), (20480, -1), (30000, -1)])
def test_overlong_punishment_is_dapos(length, expected):
    """DAPO's own sizes: expected length 16384, cache 4096."""
    assert overlong_punishment(np.array([length]), 20480, 4096)[0] == expected


@pytest.mark.parametrize("score", [0.5, 0.75, 1.0, 7.5])
def test_what_the_verdict_calls_right_is_shaped(score):
    """The step-aware term acts on every score that a verdict calls right, and on no other."""
    assert judge(lambda response, answer: score, "", "").verdict == "right"
    assert judge(lambda response, answer: 0.49, "", "").verdict == "wrong"
    short, long, wrong = step_aware_reward(np.array([score, score, 0.49]), np.zeros(3), np.array([2, 6, 9]), 1.0, 0.5)
    assert short > score > long and wrong == 0.49


def test_a_function_of_the_users_is_rewarded_alone():
    """Without `alpha`, the box counts a tenth with the grader that reads it, and nothing with another."""
    arrays = {**GROUP, "formatted": np.array([True, False, True])}
    for function, expected in ((None, [1.0, 0.9, 0.1]), ("mine:grade", [1.0, 1.0, 0.0])):
        settings = config.Reward(function=function) if function else config.Reward()
        np.testing.assert_allclose(shape_rewards(**arrays, settings=settings, max_response_tokens=100), expected)


GROUP = {
    "score": np.array([1.0, 1.0, 0.0]),
    "formatted": np.array([True, True, True]),
    "steps": np.array([2, 6, 9]),
    "lengths": np.array([10, 95, 100]),
}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [1.0, 1.0, 0.1]),
        ({"alpha": 1.0}, [1.0, 1.0, 0.0]),
        ({"shaping": "step_aware"}, [1.2079527, 0.7920473, 0.1]),
        ({"shaping": "step_aware", "beta": 0.0}, [1.0, 1.0, 0.1]),
        ({"shaping": "length_penalty", "length_penalty": 0.001}, [0.99, 0.905, 0.0]),
        ({"shaping": "overlong", "overlong_buffer": 20}, [1.0, 0.25, -0.9]),
    ],
)
def test_every_shaping(settings, expected):
    got = shape_rewards(**GROUP, settings=config.Reward(**settings), max_response_tokens=100)
    np.testing.assert_allclose(got, expected, atol=5e-8)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"shaping": "length_penalty"}, "reward.length_penalty"),
        ({"shaping": "overlong", "overlong_buffer": 0}, "reward.overlong_buffer: 0"),
        ({"shaping": "overlong", "overlong_buffer": 100}, "reward.overlong_buffer: 100"),
    ],
)
def test_idle_shaping_is_refused(settings, named):
    with pytest.raises(UserError, match=named):
        check_shaping(config.Reward(**settings), 100)
    check_shaping(config.Reward(), 100)
