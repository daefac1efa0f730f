"""From rolled-out groups to the batches of a step: shaped reward → advantage → pruning → samples → packed rows.

Runs on the controller. Denominators come from the batch before anything is dropped: `Collected.taken` counts the
prompts that were taken from the data, the pruned ones included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megarl.algorithms import pruning, steps
from megarl.algorithms.advantage import advantages
from megarl.algorithms.loss import token_scale
from megarl.algorithms.presets import Switches
from megarl.config import Settings
from megarl.data import packing
from megarl.data.balance import Cost, balance
from megarl.data.loader import Drawn
from megarl.types import Batch, Completion, Group, Origin, Sample


@dataclass(slots=True)
class Collected:
    """One step's groups, in the order drawn; on the controller only (empty elsewhere)."""

    groups: list[Group] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)  # where each group's prompt comes from
    replaced: list[Drawn] = field(default_factory=list)  # rolled out, then replaced by dynamic sampling
    pruned: list[tuple[int, int]] = field(default_factory=list)  # (index, epoch) of prompts left out by their history
    taken: int = 0  # prompts taken from the data, pruned ones included
    survived: int = 0  # of these, the ones rolled out (dynamic sampling may replace them afterwards)

    @property
    def completions(self) -> list[Completion]:
        return [c for group in self.groups for c in group.completions]

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Every completion's response tokens, and the weight 1 / (1 - P_q) of its prompt."""
        weights = [1 / group.keep for group in self.groups for _ in group.completions]
        return np.array([len(c) for c in self.completions]), np.array(weights)


class Experience:
    """Makes the batches of a step; holds the settings that it needs and nothing of a step."""

    def __init__(self, settings: Settings, switches: Switches, dp_size: int) -> None:
        self.settings, self.switches, self.dp_size = settings, switches, dp_size

    def score(self, groups: Iterable[Group]) -> None:
        """Fill step count and shaped reward of every graded completion, in place."""
        for group in groups:
            for c in group.completions:
                c.steps = steps.count_steps(c.text, self.settings.reward.markers)
            rewards = steps.shape_rewards(
                np.array([c.score for c in group.completions]),
                np.array([c.formatted for c in group.completions]),
                np.array([c.steps for c in group.completions]),
                np.array([len(c) for c in group.completions]),
                self.settings.reward,
                self.settings.rollout.max_response_tokens,
            )
            for c, reward in zip(group.completions, rewards, strict=True):
                c.reward = float(reward)

    def take_advantages(self, groups: list[Group]) -> None:
        """Fill the advantage of every completion from its whole group, in place."""
        rewards = [np.array([c.reward for c in group.completions]) for group in groups]
        values = advantages(rewards, self.switches.advantage, keep=[group.keep for group in groups])
        for group, row in zip(groups, values, strict=True):
            for c, value in zip(group.completions, row, strict=True):
                c.advantage = float(value)

    def prune(self, groups: list[Group], step: int) -> None:
        """Draw which completions are kept, and fill every completion's Horvitz-Thompson weight (0 = dropped)."""
        settings = self.settings.pruning
        rate = settings.completions if pruning.active(settings, step, self.settings.steps) else 0.0
        for group in groups:
            weights = pruning.completion_weights(
                np.array([c.advantage for c in group.completions]),
                pruning.uniforms(len(group.completions), self.settings.seed, step, group.prompt.uid),
                rate,
                settings.sampling,
                settings.selection,
                pruning.may_drop_zero_variance(settings, self.switches),
            )
            for c, weight in zip(group.completions, weights, strict=True):
                c.weight = float(weight) / group.keep

    def make(self, collected: Collected, step: int, expected_length: float | None) -> list[Batch]:
        """Advantages, pruning and packing: one batch for each update of the step, of the completions kept.

        `expected_length`: response tokens expected from earlier steps, the token mean's denominator under prompt
        pruning; None counts the tokens that are there (right when no prompt can have been pruned).
        """
        groups, updates = collected.groups, self.settings.batch.updates_per_step
        self.take_advantages(groups)
        self.prune(groups, step)
        prompts = pruning.unpruned_prompts(collected.taken, collected.survived, self.settings.pruning.refill)
        # Dynamic sampling trains the informative groups alone, and DAPO divides by their number.
        prompts *= len(groups) / collected.survived
        size = -(-len(groups) // updates)
        parts = [groups[u * size : (u + 1) * size] for u in range(updates)]
        return [self._batch(part, prompts * len(part) / len(groups), expected_length) for part in parts]

    def whole(self, groups: Sequence[Group]) -> Batch:
        """Every completion, unweighted: for log-probs before rewards are final."""
        samples = [self._sample(group, c, 1.0) for group in groups for c in group.completions]
        return Batch(samples, self._rows(samples), len(samples), float(sum(len(s.token_ids) for s in samples)))

    def _batch(self, groups: list[Group], prompts: float, expected_length: float | None) -> Batch:
        total_sequences = prompts * self.settings.batch.completions_per_prompt
        if expected_length is None:
            total_tokens = float(sum(len(c) for group in groups for c in group.completions))
        else:
            total_tokens = total_sequences * expected_length
        kept = [(group, c) for group in groups for c in group.completions if c.weight > 0]
        scales = token_scale(
            self.switches.aggregation,
            np.array([len(c) for _, c in kept], dtype=np.int64),
            np.array([c.weight for _, c in kept]),
            total_sequences,
            total_tokens,
            self.switches.constant,
        )
        samples = [self._sample(group, c, float(scale)) for (group, c), scale in zip(kept, scales, strict=True)]
        return Batch(samples, self._rows(samples), total_sequences, total_tokens)

    def _rows(self, samples: list[Sample]) -> list[list[list[int]]]:
        return pack_rows(samples, self.settings, self.dp_size)

    def _sample(self, group: Group, c: Completion, scale: float) -> Sample:
        return Sample(
            token_ids=np.concatenate([np.array(group.prompt.token_ids, dtype=np.int32), c.token_ids]),
            response_start=len(group.prompt.token_ids),
            scale=scale,
            advantage=c.advantage,
            sampled=c.origin == Origin.SAMPLED,
            rollout_logprobs=c.logprobs,
            experts=c.experts,
        )


def pack_rows(samples: Sequence[Sample], settings: Settings, dp_size: int) -> list[list[list[int]]]:
    """Rows of at most tokens_per_row tokens, equally many on each data-parallel rank, of as nearly equal work."""
    if not samples:
        return [[[]] for _ in range(dp_size)]
    lengths = np.array([sample.input_length for sample in samples], dtype=np.int64)
    capacity, parallel = settings.batch.tokens_per_row, settings.parallel
    rows = packing.pack(lengths, capacity, settings.packing.strategy, settings.packing.window)
    cost = Cost.of_model(json.loads((settings.model.path / "config.json").read_text()))
    multiple = parallel.pp if parallel.vpp > 1 else 1  # the interleaved schedule takes whole rounds
    ranks = balance(rows, lengths, dp_size, cost, capacity, multiple)
    return [[row.tolist() for row in rank] for rank in ranks]
