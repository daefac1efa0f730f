"""Step-GRPO's rewards (arXiv 2604.16890): markers, step count, step-aware reward.

Also the rewards it is compared with: a linear length penalty and DAPO's soft overlong punishment (arXiv 2503.14476).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from megarl import config
from megarl.errors import UserError

RIGHT_FROM = 0.5  # the score from which a verdict is right, as in rewards.grade.judge


def count_steps(text: str, markers: Sequence[str]) -> int:
    """k = 1 + the number of stand-alone markers in `text`; a marker has no ASCII letter directly before or after it.

    `markers`: at least one, none blank, as `config.EarlyExit` checks.
    """
    return 1 + sum(1 for _ in _pattern(tuple(markers)).finditer(text))


@lru_cache(maxsize=64)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(markers, key=len, reverse=True)
    return re.compile(f"(?<![A-Za-z])(?:{'|'.join(map(re.escape, longest_first))})(?![A-Za-z])")


def base_reward(score: np.ndarray, formatted: np.ndarray, alpha: float) -> np.ndarray:
    """R = alpha * score + (1 - alpha) * formatted, float64 [G]."""
    return alpha * np.asarray(score, np.float64) + (1 - alpha) * np.asarray(formatted, np.float64)


def step_aware_reward(
    score: np.ndarray,
    formatted: np.ndarray,
    steps: np.ndarray,
    alpha: float,
    beta: float,
    step_mean: Literal["correct", "all"] = "correct",
) -> np.ndarray:
    """The step-aware relative reward of one group, float64 [G].

        R = alpha * score * (1 - beta * tanh((k - mu) / mu)) + (1 - alpha) * formatted

    `score` [G] is at least 0.5 for a correct completion; `steps` [G] is k; mu is the mean k of the group's correct
    completions (`step_mean="all"`: of all, an ablation). The bracket is 1 for a completion that is not correct, so it
    is 1 for all if none is correct.
    """
    score = np.asarray(score, np.float64)
    steps = np.asarray(steps, np.float64)
    correct = score >= RIGHT_FROM
    efficiency = np.ones_like(score)
    if correct.any():
        mu = steps[correct].mean() if step_mean == "correct" else steps.mean()
        efficiency[correct] -= beta * np.tanh((steps[correct] - mu) / mu)
    return base_reward(score * efficiency, formatted, alpha)


def overlong_punishment(lengths: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """DAPO's soft punishment, float64 [G] in [-1, 0]: 0 up to limit - buffer tokens, then linearly to -1 at limit."""
    return np.clip((limit - buffer - np.asarray(lengths, np.float64)) / buffer, -1, 0)


def check_shaping(settings: config.Reward, max_response_tokens: int) -> None:
    """Raise UserError for a shaping that would do nothing or leave no room."""
    if settings.shaping == "length_penalty" and settings.length_penalty == 0:
        raise UserError("reward.length_penalty: 0.0 penalises nothing under shaping length_penalty; try 0.0001")
    if settings.shaping == "overlong" and not 1 <= settings.overlong_buffer < max_response_tokens:
        raise UserError(
            f"reward.overlong_buffer: {settings.overlong_buffer} is not between 1 and the response budget of "
            f"{max_response_tokens}; try {max(1, max_response_tokens // 4)}"
        )


def shape_rewards(
    score: np.ndarray,
    formatted: np.ndarray,
    steps: np.ndarray,
    lengths: np.ndarray,
    settings: config.Reward,
    max_response_tokens: int,
) -> np.ndarray:
    """The rewards of one whole group under `settings.shaping`, float64 [G].

    `score` [G] is the grader's (correct from 0.5 on), `formatted` [G] whether a box is present, `steps` [G] from
    `count_steps`, `lengths` [G] response tokens.
    """
    if settings.shaping == "step_aware":
        return step_aware_reward(score, formatted, steps, settings.score_weight, settings.beta, settings.step_mean)
    reward = base_reward(score, formatted, settings.score_weight)
    if settings.shaping == "length_penalty":
        return reward - settings.length_penalty * np.asarray(lengths, np.float64)
    if settings.shaping == "overlong":
        return reward + overlong_punishment(lengths, max_response_tokens, settings.overlong_buffer)
    return reward
