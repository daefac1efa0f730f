"""Prompts in, graded groups out: has the engines complete prompts and the graders judge the responses.

Each of the first `drivers` ranks drives an engine and rolls out its share; the controller draws, gathers and grades.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from megarl.config import Settings
from megarl.data.loader import Draw, told_apart
from megarl.errors import DeadlineExceeded, RunError
from megarl.learner.parallel import World
from megarl.loop.batching import Collected, Experience
from megarl.loop.collectives import broadcast, gather
from megarl.loop.controller import Controller
from megarl.loop.rollout_engine import Engines
from megarl.rollout import groups
from megarl.rollout.engine import Engine
from megarl.runtime.event_loop import EventLoop
from megarl.runtime.watchdog import waiting
from megarl.types import Group, Prompt

ROUNDS = 10  # of dynamic sampling, before the step goes on with the informative groups it has
T = TypeVar("T")


@dataclass(slots=True)
class _Round:
    """Prompts whose rollout was begun."""

    draw: Draw | None  # on the controller
    prompts: list[Prompt]
    groups: Future[list[Group]] | None  # of this rank's share; None where it has none


class Collector:
    """Wires data, engines and graders; the engine is None on ranks that drive none."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        loop: EventLoop,
        engines: Engines,
        tokenizer: PreTrainedTokenizerBase,
        controller: Controller | None,
        experience: Experience,
    ) -> None:
        self.settings, self.world, self.loop = settings, world, loop
        self.engine, self.drivers, self.tokenizer = engines.engine, engines.drivers, tokenizer
        self.controller, self.experience = controller, experience
        self._begun: dict[int, _Round] = {}  # by step

    def begin(self, step: int) -> None:
        """Draw a step's prompts and begin their rollout, which goes on beside what this rank does next. Collective.

        What was begun before, or comes after the last step, is left alone.
        """
        if step not in self._begun and step <= self.settings.steps:
            draw = self.controller.draw_ahead(step) if self.controller else None
            self._begun[step] = self._begin_round(step, draw, Collected())

    def settle(self) -> None:
        """Return when what this rank began is rolled out, so that no completion outlives the weights it began with;
        with `rollout.partial` at once."""
        if not self.settings.rollout.partial:
            for begun in self._begun.values():
                if begun.groups:
                    self._wait("the rollout", begun.groups)

    def collect(self, step: int, dynamic_sampling: bool) -> Collected:
        """Roll out, or wait for, a step's prompts and score them. With dynamic sampling (DAPO), groups of equal rewards
        are replaced."""
        wanted = self.settings.batch.prompts_per_step
        result = Collected()
        self.begin(step)
        begun = self._begun.pop(step)
        if self.controller:
            self.controller.ahead.pop(step)
        for rounds in range(1, ROUNDS + 1):
            groups = self._finish(begun.prompts, begun.groups)
            if draw := begun.draw:
                result.taken += draw.taken
                result.survived += len(groups)
                result.pruned += draw.pruned
                self.grade(groups)
                for drawn, group in zip(draw.prompts, groups, strict=True):
                    group.keep = drawn.keep
                    if dynamic_sampling and len({c.reward for c in group.completions}) == 1:
                        result.replaced.append(drawn)
                    else:
                        result.groups.append(group)
                        result.drawn.append(drawn)
            missing = broadcast(wanted - len(result.groups), self.world)
            if not dynamic_sampling or missing <= 0 or rounds == ROUNDS:
                break
            begun = self._begin_round(step, self.controller.draw(step, missing) if self.controller else None, result)
        return result

    def evaluate(self) -> dict[str, float]:
        """Accuracy and lengths of plain generation on the held-out prompts; on the controller ({} elsewhere)."""
        prompts = broadcast(self.controller.held_out if self.controller else [], self.world)
        if not prompts:
            return {}
        begun = self._begin(
            prompts, lambda engine, share: groups.evaluation(engine, share, self.settings, self.tokenizer)
        )
        groups = self._finish(prompts, begun)
        if not self.world.is_controller:
            return {}
        self.grade(groups)
        completions = [c for group in groups for c in group.completions]
        n = len(completions)
        return {
            "eval/accuracy": sum(c.score for c in completions) / n,
            "eval/response_tokens": sum(map(len, completions)) / n,
            "eval/steps_per_response": sum(c.steps for c in completions) / n,
            "eval/formatted": sum(c.formatted for c in completions) / n,
            "eval/overlong": sum(c.finish == "length" for c in completions) / n,
            "eval/completions": n,
        }

    def grade(self, groups: Sequence[Group]) -> None:
        """Fill verdict, format and reward of every completion, in place (controller only)."""
        assert self.controller
        pairs = [(group.prompt, c) for group in groups for c in group.completions]
        work = self.controller.graders.grade_many([(c.text, prompt.answer) for prompt, c in pairs])
        grades = self._wait("the grades", self._start("the grades", work))
        for (_, c), grade in zip(pairs, grades, strict=True):
            c.verdict, c.score, c.formatted = grade.verdict, grade.score, grade.formatted
        failed = [grade for grade in grades if grade.verdict == "error"]
        if len(failed) == len(grades) and grades:
            raise RunError(
                f"reward.function: every one of {len(grades)} grades failed, the first with: {failed[0].message}"
            )
        self.experience.score(groups)

    def _begin_round(self, step: int, draw: Draw | None, before: Collected) -> _Round:
        """Begin the rollout of what the controller drew, with early exit if it is on. Collective."""
        prompts = told_apart(draw.prompts, before=[*before.drawn, *before.replaced]) if draw else []
        prompts = broadcast(prompts, self.world)
        begun = self._begin(
            prompts, lambda engine, share: groups.rollout(engine, share, self.settings, self.tokenizer, step)
        )
        return _Round(draw, prompts, begun)

    def _begin(
        self, prompts: Sequence[Prompt], work: Callable[[Engine, Sequence[Prompt]], Coroutine[Any, Any, list[Group]]]
    ) -> Future[list[Group]] | None:
        """Begin `work` on this rank's share of the prompts; None where it has none."""
        if self.engine is not None and (share := prompts[self.world.rank :: self.drivers]):
            return self._start("the rollout", work(self.engine, share))
        return None

    def _finish(self, prompts: Sequence[Prompt], begun: Future[list[Group]] | None) -> list[Group]:
        """A group for every prompt, in their order, from all ranks; on the controller ([] elsewhere). Collective."""
        shares = gather(self._wait("the rollout", begun) if begun else [], self.world)
        if not shares:
            return []
        return [shares[i % self.drivers][i // self.drivers] for i in range(len(prompts))]

    def _start(self, what: str, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work`, which has `rollout.timeout` seconds."""
        seconds = self.settings.rollout.timeout

        async def bounded() -> T:
            try:
                return await asyncio.wait_for(work, seconds)
            except TimeoutError:
                raise DeadlineExceeded(f"{what} on rank {self.world.rank}", seconds) from None

        return self.loop.begin(bounded())

    def _wait(self, what: str, begun: Future[T]) -> T:
        with waiting(f"{what} on rank {self.world.rank}", self.settings.rollout.timeout):  # it may block its loop
            return self.loop.wait(begun)
