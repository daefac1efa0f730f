"""From graded groups to scored ones: step counts and shaped rewards. Runs on the controller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megarl.algorithms import steps
from megarl.config import Settings
from megarl.data.loader import ScheduledPrompt
from megarl.rewards.grade import Grade
from megarl.types import Group, ScoredCompletion, ScoredGroup


@dataclass(slots=True)
class Collected:
    """One step's scored groups, in the order drawn; on the controller only (empty elsewhere)."""

    groups: list[ScoredGroup] = field(default_factory=list)
    prompts: list[ScheduledPrompt] = field(default_factory=list)  # where each group's prompt comes from
    replaced: list[ScheduledPrompt] = field(default_factory=list)  # rolled out, then replaced by dynamic sampling
    replaced_groups: list[ScoredGroup] = field(default_factory=list)  # of these prompts
    pruned: list[tuple[int, int]] = field(default_factory=list)  # (index, epoch) of prompts pruned by their history
    num_drawn: int = 0  # prompts drawn from the data, pruned ones included
    num_kept: int = 0  # of these, the ones rolled out (dynamic sampling may replace them afterwards)

    @property
    def made(self) -> list[ScoredGroup]:
        """Every group that was rolled out for the step, the replaced ones last."""
        return [*self.groups, *self.replaced_groups]

    @property
    def nothing_left(self) -> bool:
        """Whether dynamic sampling has replaced every group."""
        return bool(self.replaced) and not self.groups

    @property
    def completions(self) -> list[ScoredCompletion]:
        """Of the groups that were not replaced."""
        return [c for group in self.groups for c in group.completions]

    def add(self, scheduled: ScheduledPrompt, group: ScoredGroup, replaced: bool) -> None:
        """Take in a group. A replaced one gets advantage and weight 0."""
        group.replaced = replaced
        (self.replaced if replaced else self.prompts).append(scheduled)
        (self.replaced_groups if replaced else self.groups).append(group)
        if replaced:
            for c in group.completions:
                c.advantage = c.weight = 0.0

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Every completion's response tokens, and the weight 1 / (1 - P_q) of its prompt."""
        weights = [1 / group.keep for group in self.groups for _ in group.completions]
        return np.array([len(c.completion) for c in self.completions]), np.array(weights)


def score(group: Group, grades: Sequence[Grade], keep: float, settings: Settings) -> ScoredGroup:
    """Count the steps of every completion and shape its reward within the whole group. `keep` is 1 - P_q."""
    counts = [steps.count_steps(c.text, settings.rollout.early_exit.markers) for c in group.completions]
    rewards = steps.shape_rewards(
        np.array([grade.score for grade in grades]),
        np.array([grade.formatted for grade in grades]),
        np.array(counts),
        np.array([len(c) for c in group.completions]),
        settings.reward,
        settings.rollout.max_response_tokens,
    )
    scored = [
        ScoredCompletion(c, grade.verdict, grade.score, grade.formatted, count, float(reward), message=grade.message)
        for c, grade, count, reward in zip(group.completions, grades, counts, rewards, strict=True)
    ]
    return ScoredGroup(group.prompt, scored, keep)
