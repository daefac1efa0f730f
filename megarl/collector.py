"""Prompts in, graded groups out: has the engines complete prompts and the graders judge the responses.

Each of the first `drivers` ranks drives an engine and rolls out its share; the controller draws, gathers and grades.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from megarl.algorithms import pruning
from megarl.config import Settings
from megarl.controller import Controller
from megarl.data.loader import told_apart
from megarl.engines import Engines
from megarl.errors import DeadlineExceeded, RunError
from megarl.exchange import broadcast, gather
from megarl.experience import Collected, Experience
from megarl.learner.parallel import World
from megarl.rollout import early_exit
from megarl.trajectory import Group, Prompt
from megarl.watchdog import waiting

ROUNDS = 10  # of dynamic sampling, before the step goes on with the informative groups it has
T = TypeVar("T")


class Collector:
    """Wires data, engines and graders; the engine is None on ranks that drive none."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        runner: asyncio.Runner,
        engines: Engines,
        tokenizer: PreTrainedTokenizerBase,
        controller: Controller | None,
        experience: Experience,
    ) -> None:
        self.settings, self.world, self.runner = settings, world, runner
        self.engine, self.drivers, self.tokenizer = engines.engine, engines.drivers, tokenizer
        self.controller, self.experience = controller, experience

    def collect(self, step: int, dynamic_sampling: bool) -> Collected:
        """Roll out and score a step's prompts. With dynamic sampling (DAPO), groups of equal rewards are replaced."""
        wanted = self.settings.batch.prompts_per_step
        prune = pruning.active(self.settings.pruning, step, self.settings.steps)
        loader = self.controller.loader if self.controller else None
        result = Collected()
        for _ in range(ROUNDS if dynamic_sampling else 1):
            draw = loader.draw(wanted - len(result.groups), prune) if loader else None
            prompts = told_apart(draw.prompts, before=[*result.drawn, *result.replaced]) if draw else []
            prompts = broadcast(prompts, self.world)
            groups = self.generate(prompts, step)
            if draw:
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
            if broadcast(len(result.groups) >= wanted, self.world):
                break
        return result

    def generate(self, prompts: Sequence[Prompt], step: int) -> list[Group]:
        """A group for every prompt, with early exit if it is on; all of them on the controller, [] elsewhere."""
        return self._shared(
            prompts, lambda share: early_exit.rollout(self.engine, share, self.settings, self.tokenizer, step)
        )

    def evaluate(self) -> dict[str, float]:
        """Accuracy and lengths of plain generation on the held-out prompts; on the controller ({} elsewhere)."""
        prompts = broadcast(self.controller.held_out if self.controller else [], self.world)
        if not prompts:
            return {}
        groups = self._shared(
            prompts, lambda share: early_exit.evaluation(self.engine, share, self.settings, self.tokenizer)
        )
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
        pairs = [(group.prompt, c) for group in groups for c in group.completions]
        grades = self._run(
            "the grades", self.controller.graders.grade_many([(c.text, prompt.answer) for prompt, c in pairs])
        )
        for (_, c), grade in zip(pairs, grades, strict=True):
            c.verdict, c.score, c.formatted = grade.verdict, grade.score, grade.formatted
        failed = [grade for grade in grades if grade.verdict == "error"]
        if len(failed) == len(grades) and grades:
            raise RunError(
                f"reward.function: every one of {len(grades)} grades failed, the first with: {failed[0].message}"
            )
        self.experience.score(groups)

    def _shared(self, prompts: Sequence[Prompt], work: Any) -> list[Group]:
        """Run `work` on each driving rank's share and interleave the results back into the prompts' order."""
        mine: list[Group] = []
        if self.world.rank < self.drivers and (share := prompts[self.world.rank :: self.drivers]):
            mine = self._run("the rollout", work(share))
        shares = gather(mine, self.world)
        if not shares:
            return []
        return [shares[i % self.drivers][i // self.drivers] for i in range(len(prompts))]

    def _run(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        seconds = self.settings.rollout.deadline

        async def bounded() -> T:
            try:
                return await asyncio.wait_for(work, seconds)
            except TimeoutError:
                raise DeadlineExceeded(f"{what} on rank {self.world.rank}", seconds) from None

        with waiting(f"{what} on rank {self.world.rank}", seconds):  # the engine may block the event loop
            return self.runner.run(bounded())
