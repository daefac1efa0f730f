"""From scored groups to the batches of a step: advantage → pruning → samples → packed rows.

Runs on the controller. Denominators come from the batch before anything is dropped: `Collected.num_drawn` counts the
prompts that were drawn from the data, pruned ones included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megarl.algorithms import pruning
from megarl.algorithms.advantage import advantages
from megarl.algorithms.loss import token_scale
from megarl.algorithms.presets import Switches
from megarl.config import Settings
from megarl.data import packing
from megarl.data.balance import Cost, balance
from megarl.errors import RunError
from megarl.loop.scoring import Collected
from megarl.models.config_json import read_shape
from megarl.types import Batch, Completion, Origin, Prompt, Sample, ScoredGroup


class BatchBuilder:
    """Builds the batches of a step. It keeps settings, and nothing of a step."""

    def __init__(self, settings: Settings, switches: Switches, dp_size: int) -> None:
        self.settings, self.switches, self.dp_size = settings, switches, dp_size
        self.cost = Cost.of_model(read_shape(settings.model.path))

    def build(self, collected: Collected, step: int, expected_length: float | None) -> list[Batch]:
        """One batch per update of the step. Fills every completion's advantage and weight, in place.

        `expected_length`: response tokens expected from earlier steps, the token mean's denominator under prompt
        pruning. None counts the tokens of this step, which is right when no prompt can have been pruned.
        Raises RunError when no group is left.
        """
        groups, updates = collected.groups, self.settings.batch.updates_per_step
        if not groups:
            raise RunError("pruning.refill: false, and pruning left no prompt of the step; set it to true")
        self._take_advantages(groups)
        self._prune(groups, step)
        prompts = pruning.unpruned_prompts(collected.num_drawn, collected.num_kept, self.settings.pruning.refill)
        # Dynamic sampling trains the informative groups alone, and DAPO divides by their number.
        prompts *= len(groups) / collected.num_kept
        size = -(-len(groups) // updates)
        parts = [groups[u * size : (u + 1) * size] for u in range(updates)]
        return [self._batch(part, prompts * len(part) / len(groups), expected_length) for part in parts]

    def unweighted(self, groups: Sequence[ScoredGroup]) -> Batch:
        """Every completion with scale 1 and no advantage: for log-probs before the rewards are final."""
        samples = [_sample(g.prompt, c.completion, 1.0) for g in groups for c in g.completions]
        tokens = float(sum(len(s.token_ids) for s in samples))
        return Batch(samples, pack_rows(samples, self.settings, self.dp_size, self.cost), len(samples), tokens)

    def _take_advantages(self, groups: list[ScoredGroup]) -> None:
        """Fill the advantage of every completion, taken over its whole group."""
        rewards = [np.array([c.reward for c in group.completions]) for group in groups]
        values = advantages(rewards, self.switches.advantage, keep=[group.keep for group in groups])
        for group, row in zip(groups, values, strict=True):
            for c, value in zip(group.completions, row, strict=True):
                c.advantage = float(value)

    def _prune(self, groups: list[ScoredGroup], step: int) -> None:
        """Draw which completions are kept. Fill every completion's Horvitz-Thompson weight (0 = dropped)."""
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

    def _batch(self, groups: list[ScoredGroup], prompts: float, expected_length: float | None) -> Batch:
        total_sequences = prompts * self.settings.batch.completions_per_prompt
        if expected_length is None:
            total_tokens = float(sum(len(c.completion) for group in groups for c in group.completions))
        else:
            total_tokens = total_sequences * expected_length
        kept = [(group.prompt, c) for group in groups for c in group.completions if c.weight > 0]
        scales = token_scale(
            self.switches.aggregation,
            np.array([len(c.completion) for _, c in kept], dtype=np.int64),
            np.array([c.weight for _, c in kept]),
            total_sequences,
            total_tokens,
            self.switches.constant,
        )
        samples = [
            _sample(prompt, c.completion, float(scale), c.advantage)
            for (prompt, c), scale in zip(kept, scales, strict=True)
        ]
        return Batch(samples, pack_rows(samples, self.settings, self.dp_size, self.cost), total_sequences, total_tokens)


def _sample(prompt: Prompt, c: Completion, scale: float, advantage: float = 0.0) -> Sample:
    return Sample(
        token_ids=np.concatenate([np.array(prompt.token_ids, dtype=np.int32), c.token_ids]),
        response_start=len(prompt.token_ids),
        scale=scale,
        advantage=advantage,
        sampled=c.origin == Origin.SAMPLED,
        rollout_logprobs=c.logprobs,
        experts=c.experts,
    )


def pack_rows(samples: Sequence[Sample], settings: Settings, dp_size: int, cost: Cost) -> list[list[list[int]]]:
    """Rows of at most tokens_per_row tokens: as many on each data-parallel rank, with nearly equal work."""
    if not samples:
        return [[[]] for _ in range(dp_size)]
    lengths = np.array([sample.input_length for sample in samples], dtype=np.int64)
    capacity, parallel = settings.batch.tokens_per_row, settings.parallel
    rows = packing.pack(lengths, capacity, settings.packing.strategy, settings.packing.window)
    multiple = parallel.pp if parallel.vpp > 1 else 1  # the interleaved schedule takes whole rounds
    ranks = balance(rows, lengths, dp_size, cost, capacity, multiple)
    return [[row.tolist() for row in rank] for rank in ranks]
