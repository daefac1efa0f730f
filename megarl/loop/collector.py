"""Prompts in, scored groups out: engines complete the prompts, graders judge each completion as soon as it is done.

Each of the first `drivers` ranks drives an engine and rolls out its share. The controller draws the prompts, gathers
the groups and grades. Completions of other ranks reach the graders when they are gathered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarl.config import Settings
from megarl.data.loader import PromptBatch, ScheduledPrompt, with_unique_ids
from megarl.errors import DeadlineExceeded
from megarl.learner.parallel import World
from megarl.loop.collectives import broadcast, gather
from megarl.loop.controller import Controller
from megarl.loop.rollout_engine import RolloutEngine
from megarl.loop.scoring import Collected, score
from megarl.rewards.grading import Grading
from megarl.rollout import groups
from megarl.runtime.event_loop import EventLoop
from megarl.runtime.watchdog import waiting
from megarl.types import Group, Prompt, ScoredGroup
from megarl.view.progress import Stopwatch

ROUNDS = 10  # of dynamic sampling; then the step goes on with the informative groups it has


@dataclass(slots=True)
class Rollout:
    """Prompts whose rollout has begun. On the controller also what was drawn, the groups and their grading."""

    prompts: list[Prompt]
    share: Future[list[Group]] | None  # this rank's groups to come; None where it rolls out nothing
    grading: Grading | None
    batch: PromptBatch  # empty on other ranks, and in an evaluation
    groups: list[Group] = field(default_factory=list)  # of all ranks, in the prompts' order, once gathered
    scored: list[ScoredGroup] = field(default_factory=list)  # once graded


class Collector:
    """Connects data, engines and graders."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        loop: EventLoop,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        controller: Controller | None,
        dynamic_sampling: bool = False,
    ) -> None:
        self.settings, self.world, self.loop = settings, world, loop
        self.engine, self.drivers, self.tokenizer = engine.engine, engine.drivers, tokenizer
        self.controller, self.dynamic_sampling = controller, dynamic_sampling
        self._begun: dict[int, Rollout] = {}  # by step

    def begin(self, step: int) -> None:
        """Draw a step's prompts and begin their rollout. It goes on while this rank does other things. Collective.

        Does nothing if the step has begun already or lies past the last step.
        """
        if step not in self._begun and step <= self.settings.steps:
            batch = self.controller.draw_ahead(step) if self.controller else None
            self._begun[step] = self._begin_round(step, batch)

    def settle(self) -> None:
        """Wait until this rank has rolled out all that it began: a completion then has one weight version.

        With `rollout.partial` return at once.
        """
        if not self.settings.rollout.partial:
            for rollout in self._begun.values():
                if rollout.share:
                    self._wait(rollout.share)

    def collect(self, step: int, watch: Stopwatch) -> list[Rollout]:
        """Roll out, or wait for, a step's prompts. Their grading goes on. Collective.

        One round, or several with dynamic sampling (DAPO): it waits for the grades and replaces groups of equal
        scores, whatever shaping and format add to them. Times its phases: `rollout`, and `reward` while it waits for
        grades.
        """
        with watch("rollout"):
            self.begin(step)
            rounds = [self._gather(self._begun.pop(step))]
            if self.controller:
                self.controller.ahead.pop(step)
        while self.dynamic_sampling and len(rounds) < ROUNDS:
            with watch("reward"):
                collected = self.score(rounds)
                missing = broadcast(self.settings.batch.prompts_per_step - len(collected.groups), self.world)
            if missing <= 0:
                break
            with watch("rollout"):
                batch = self.controller.draw(step, missing) if self.controller else None
                before = [each for rollout in rounds for each in rollout.batch.prompts]
                rounds.append(self._gather(self._begin_round(step, batch, before)))
        return rounds

    def score(self, rounds: Sequence[Rollout]) -> Collected:
        """Wait for the grades that are missing and score every group. Empty except on the controller. Collective."""
        collected = Collected()
        for rollout in rounds:
            self._score(rollout)
            collected.num_drawn += rollout.batch.num_drawn
            collected.num_kept += len(rollout.groups)
            collected.pruned += rollout.batch.pruned
            for scheduled, group in zip(rollout.batch.prompts, rollout.scored, strict=True):
                equal = len({c.score for c in group.completions}) == 1
                collected.add(scheduled, group, replaced=self.dynamic_sampling and equal)
        self.world.barrier("the rewards")
        return collected

    def evaluate(self) -> tuple[dict[str, float], list[ScoredGroup]]:
        """Figures of plain generation on the held-out prompts, and the responses; on the controller (empty elsewhere).

        The figures are accuracy, the grader's score with its standard deviation over the responses, and lengths.
        """
        prompts = broadcast(self.controller.held_out if self.controller else [], self.world)
        if not prompts:
            return {}, []
        rollout = self._gather(self._begin(prompts, groups.evaluation))
        if not self.world.is_controller:
            return {}, []
        self._score(rollout)
        scored = [c for group in rollout.scored for c in group.completions]
        n = len(scored)
        figures = {
            "eval/accuracy": sum(c.verdict == "right" for c in scored) / n,
            "eval/score": sum(c.score for c in scored) / n,
            "eval/score_std": float(np.std([c.score for c in scored])),
            "eval/response_tokens": sum(len(c.completion) for c in scored) / n,
            "eval/steps_per_response": sum(c.steps for c in scored) / n,
            "eval/formatted": sum(c.formatted for c in scored) / n,
            "eval/overlong": sum(c.completion.finish == "length" for c in scored) / n,
            "eval/completions": n,
        }
        return figures, rollout.scored

    def _begin_round(self, step: int, batch: PromptBatch | None, before: Sequence[ScheduledPrompt] = ()) -> Rollout:
        """Begin the rollout of what the controller drew, with early exit if it is on. Collective."""
        prompts = broadcast(with_unique_ids(batch.prompts, before) if batch else [], self.world)
        return self._begin(prompts, partial(groups.rollout, step=step), batch)

    def _begin(self, prompts: list[Prompt], roll_out: Callable[..., Any], batch: PromptBatch | None = None) -> Rollout:
        """Begin this rank's share of the prompts. The controller's completions go to the graders one by one."""
        grading = Grading(self.controller.graders) if self.controller else None
        begun = None
        if self.engine is not None and (share := prompts[self.world.rank :: self.drivers]):
            on_done = grading.submit if grading else None
            work = roll_out(self.engine, share, self.settings, self.tokenizer, on_done=on_done)
            begun = self.loop.begin(self._bounded(work, grading))
        return Rollout(prompts, begun, grading, batch or PromptBatch())

    async def _bounded(self, work: Coroutine[Any, Any, list[Group]], grading: Grading | None) -> list[Group]:
        """The groups, within `rollout.timeout`. Ends early, with the grader's error, when the graders break."""
        seconds = self.settings.rollout.timeout
        rollout, broken = asyncio.ensure_future(work), asyncio.wrap_future(grading.broken if grading else Future())
        try:
            done, _ = await asyncio.wait({rollout, broken}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineExceeded(f"the rollout on rank {self.world.rank}", seconds)
            return broken.result() if broken in done else rollout.result()
        finally:
            rollout.cancel()
            broken.cancel()
            await asyncio.wait({rollout, broken})

    def _gather(self, rollout: Rollout) -> Rollout:
        """Wait for every rank's groups and bring them to the controller, in the prompts' order. Collective."""
        shares = gather(self._wait(rollout.share) if rollout.share else [], self.world, self.drivers)
        if shares and rollout.grading:
            rollout.groups = [shares[i % self.drivers][i // self.drivers] for i in range(len(rollout.prompts))]
            for group in rollout.groups:
                for completion in group.completions:
                    rollout.grading.submit(group.prompt, completion)
        return rollout

    def _wait(self, begun: Future[list[Group]]) -> list[Group]:
        with waiting(f"the rollout on rank {self.world.rank}", self.settings.rollout.timeout):  # it may block its loop
            return self.loop.wait(begun)

    def _score(self, rollout: Rollout) -> None:
        """Wait for the grades of a gathered rollout, at most `rollout.timeout`, and score its groups, once."""
        if rollout.scored or not rollout.grading:
            return
        with waiting("the grades", self.settings.rollout.timeout):
            grades = rollout.grading.wait(rollout.groups, self.settings.rollout.timeout)
        keeps = [each.keep for each in rollout.batch.prompts] or [1.0] * len(grades)
        rollout.scored = [
            score(group, row, keep, self.settings)
            for group, row, keep in zip(rollout.groups, grades, keeps, strict=True)
        ]
