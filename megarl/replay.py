"""Re-run a recorded step: the same rollouts through the same weights give the same metrics, bit by bit.

A run's checkpoints have the state before the step; `rollouts/` has its tokens and rewards. No data, graders or engines
are needed. Advantages, pruning, packing, log-probs and the update are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megarl.algorithms import presets, pruning
from megarl.algorithms.loss import policy_loss
from megarl.algorithms.metrics import combine
from megarl.config import Settings
from megarl.errors import UserError
from megarl.learner import checkpoint, parallel
from megarl.learner.learner import Learner
from megarl.loop import logprobs, metrics
from megarl.loop.batching import BatchBuilder
from megarl.loop.controller import STATE
from megarl.loop.scoring import Collected
from megarl.run import atomic
from megarl.run.arrays import read_arrays
from megarl.run.directory import read_metrics, read_rollouts
from megarl.run.records import METRICS, damaged, rollouts_file
from megarl.runtime.watchdog import doing
from megarl.types import Batch, ScoredGroup


def replay(settings: Settings, step: int, start: int) -> list[dict[str, Any]]:
    """Re-run `step` of `settings.run` on this rank, from the checkpoint after `start` (0: the initial weights).

    Steps in between are re-run on the way. Returns the step's metrics, one row each, on rank 0 ([] elsewhere).
    """
    updates = settings.batch.updates_per_step
    switches = presets.resolve(settings.algorithm, settings.rollout.max_response_tokens, updates)
    objective = partial(policy_loss, switches=switches)
    with ExitStack() as stack:
        world = parallel.start(settings.parallel, settings.precision, settings.seed, settings.collective_timeout)
        stack.callback(world.close)
        learner = Learner(settings, world, total_updates=settings.steps * updates)
        if start:
            checkpoint.load(learner, atomic.folder_of(settings.run / "checkpoints", start) / "learner")
        builder = BatchBuilder(settings, switches, world.dp_size)
        record = Record(settings, start, builder, learner.shape.vocab) if world.is_controller else None
        rows: list[dict[str, Any]] = []
        for each in range(start + 1, step + 1):
            made = record.batches(each) if record else []
            batches: Sequence[Batch | None] = made or [None] * updates
            with doing(f"replay of step {each}", settings.collective_timeout):
                logprobs.fill(batches, learner, switches)
                trained = [learner.train_step(batch, objective) for batch in batches]
            if record:
                rows = record.compare(each, made, trained)
        return rows


class Record:
    """The recorded steps of a run, as batches, and the metrics to compare with. On rank 0."""

    def __init__(self, settings: Settings, start: int, builder: BatchBuilder, vocabulary: int) -> None:
        self.settings, self.builder, self.vocabulary = settings, builder, vocabulary
        self.metrics = {line["step"]: line for line in read_metrics(settings.run)}
        self.expected_length = pruning.ExpectedLength()
        if start:
            file = atomic.folder_of(settings.run / "checkpoints", start) / STATE
            state = read_arrays(file)
            with damaged(file):
                self.expected_length.restore({k[7:]: v for k, v in state.items() if k.startswith("length_")})

    def batches(self, step: int) -> list[Batch]:
        """The step's batches, built again from its rollouts and their rewards."""
        line, groups = self.metrics[step], read_rollouts(self.settings.run, step)
        if not groups:
            raise UserError(f"step: {step} trained nothing: dynamic sampling replaced every group")
        with damaged(self.settings.run / METRICS):
            drawn, pruned = int(line["prompts_drawn"]), int(line["prompts_pruned"])
        collected = Collected(groups, num_drawn=drawn, num_kept=drawn - pruned)
        expected = self.expected_length.mean() if self.settings.pruning.prompts else None
        with damaged(rollouts_file(self.settings.run, step)):
            self._check_tokens(groups)
            batches = self.builder.build(collected, step, expected)
            self.expected_length.update(*collected.lengths())
        return batches

    def _check_tokens(self, groups: list[ScoredGroup]) -> None:
        """Raise ValueError if a token is not one of the model's."""
        for group in groups:
            for tokens in (group.prompt.token_ids, *(c.completion.token_ids for c in group.completions)):
                if len(tokens) and max(tokens) >= self.vocabulary:
                    raise ValueError(f"token {max(tokens)} is not one of the model's {self.vocabulary}")

    def compare(self, step: int, batches: list[Batch], trained: list[dict[str, float]]) -> list[dict[str, Any]]:
        """The learner's metrics, recorded and replayed."""
        replayed = {
            **combine(trained),
            "packing_density": metrics.density(batches, self.settings.batch.tokens_per_row),
        }
        recorded = self.metrics[step]
        return [
            {"metric": name, "recorded": recorded[name], "replayed": value, "equal": recorded[name] == value}
            for name, value in replayed.items()
            if name in recorded
        ]


def find(run: Path, step: int) -> int:
    """The checkpoint to start from: the newest whole one before `step`, 0 for the initial weights.

    Raises UserError, naming what is missing, when the step cannot be replayed.
    """
    recorded = {line["step"] for line in read_metrics(run)} - {0}
    if step not in recorded:
        done = f"it has the steps 1 to {max(recorded)}" if recorded else "it has none yet"
        raise UserError(f"step: {step} is not recorded in {run}; {done}")
    checkpoints = run / "checkpoints"
    start = max((each for each in atomic.steps(checkpoints) if each < step), default=0)
    missing = [each for each in range(start + 1, step + 1) if not rollouts_file(run, each).is_file()]
    if missing:
        raise UserError(f"step: {step} cannot be replayed: {rollouts_file(run, missing[0])} is missing")
    if start and (damage := atomic.verify(atomic.folder_of(checkpoints, start))):
        raise UserError(f"step: {step} cannot be replayed: the checkpoint of step {start} is damaged ({damage})")
    return start
