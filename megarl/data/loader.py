"""Which prompts are rolled out next: every epoch's in their order, without those that DPPO prunes by their history.

The state is a position, the pruning history and what identifies the data. A resumed run goes on with the very next
prompt and makes the same draws. Nothing here keeps an object per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megarl import config
from megarl.algorithms.pruning import History, prompt_weights, uniforms
from megarl.data.order import EpochOrder
from megarl.data.table import PromptTable
from megarl.errors import RunError, UserError
from megarl.types import Prompt


@dataclass(frozen=True, slots=True)
class ScheduledPrompt:
    """A prompt to roll out."""

    prompt: Prompt
    index: int  # its position in the data
    epoch: int
    keep: float = 1.0  # 1 - P_q, the probability that pruning kept it


@dataclass(slots=True)
class PromptBatch:
    """What one call of `Loader.draw` returns."""

    prompts: list[ScheduledPrompt] = field(default_factory=list)
    pruned: list[tuple[int, int]] = field(default_factory=list)  # (index, epoch)

    @property
    def num_drawn(self) -> int:
        """Prompts drawn from the epoch's order, pruned ones included: the base of the loss denominators."""
        return len(self.prompts) + len(self.pruned)

    def state(self) -> dict[str, np.ndarray]:
        """The whole batch as arrays, for `Loader.batch_from`."""
        return {
            "prompts": np.array([(each.index, each.epoch) for each in self.prompts], np.int64).reshape(-1, 2),
            "keep": np.array([each.keep for each in self.prompts]),
            "pruned": np.array(self.pruned, np.int64).reshape(-1, 2),
        }


def with_unique_ids(scheduled: Sequence[ScheduledPrompt], before: Sequence[ScheduledPrompt] = ()) -> list[Prompt]:
    """The prompts of `scheduled`. One that the step already has, in `before` or here, gets the uid `uid@epoch`.

    A step may draw a prompt twice when it takes more than a third of the data. Seeds and request ids come from the uid,
    so under one uid both groups would have the same completions.
    """
    seen = {each.prompt.uid for each in before}
    prompts = []
    for each in scheduled:
        prompt = each.prompt
        if prompt.uid in seen:
            prompt = replace(prompt, uid=f"{prompt.uid}@{each.epoch}")
        seen.add(prompt.uid)
        prompts.append(prompt)
    return prompts


class Loader:
    """Draws prompts: a function of the seed, the history and the number of prompts drawn so far.

    It owns the pruning history. The caller updates it by `history.update(index, …)` once it knows a group's advantages.
    """

    def __init__(self, prompts: PromptTable, pruning: config.Pruning, seed: int, shuffle: bool = True) -> None:
        self.prompts, self.pruning, self.seed = prompts, pruning, seed
        self.history = History(len(prompts))
        self.order = EpochOrder(len(prompts), seed, shuffle)
        self.position = 0
        """Prompts drawn since the run began."""

    def draw(self, n: int, prune: bool = True) -> PromptBatch:
        """The next n prompts. With `pruning.refill` pruned ones are replaced, so that n come back; else fewer may.

        `prune`: whether pruning is on at this point of the run (`algorithms.pruning.active`). Call it again within a
        step for more. With Bernoulli draws a prompt's fate depends on (seed, epoch, uid) and its history only.
        """
        rate = self.pruning.prompts if prune else 0.0
        batch = PromptBatch()
        while (missing := n - len(batch.prompts)) > 0:
            # Never more than are missing: the last one drawn is then a kept one, as unpruned_prompts() presumes.
            candidates = [self._next() for _ in range(missing)]
            for (index, epoch), weight in zip(candidates, self._weights(candidates, rate), strict=True):
                if weight == 0:
                    batch.pruned.append((index, epoch))
                else:
                    batch.prompts.append(ScheduledPrompt(self.prompts[index], index, epoch, keep=float(1 / weight)))
            if not self.pruning.refill:
                break
            if batch.num_drawn * (1 - rate) > 64 * n:  # a chance below exp(-60), whatever the history
                raise RunError(
                    f"pruning.prompts: {rate:g} kept only {len(batch.prompts)} of {batch.num_drawn} prompts drawn; "
                    f"the step needs {n}"
                )
        return batch

    def batch_from(self, state: Mapping[str, np.ndarray]) -> PromptBatch:
        """The batch that `PromptBatch.state` was made from. It draws nothing."""
        prompts = [
            ScheduledPrompt(self.prompts[int(index)], int(index), int(epoch), float(keep))
            for (index, epoch), keep in zip(state["prompts"], state["keep"], strict=True)
        ]
        return PromptBatch(prompts, [(int(index), int(epoch)) for index, epoch in state["pruned"]])

    def state(self) -> dict[str, np.ndarray]:
        """The whole state as arrays for one .npz, 4 bytes per prompt. `restore` takes it back bit by bit."""
        state = {
            "position": np.array(self.position),
            "seed": np.array(self.seed),
            "shuffle": np.array(self.order.shuffle),
            "fingerprint": np.array(self.prompts.fingerprint),
        }
        return state | {f"history_{name}": value for name, value in self.history.state().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a `state`. Raises UserError when it comes from other data, another seed or other shuffling."""
        for setting, ours, theirs in [
            ("seed", self.seed, int(state["seed"])),
            ("data.shuffle", self.order.shuffle, bool(state["shuffle"])),
        ]:
            if ours != theirs:
                raise UserError(f"{setting}: {ours}, but the run to resume has {theirs}; prompts would be repeated")
        self.history.restore({name[8:]: value for name, value in state.items() if name.startswith("history_")})
        if str(state["fingerprint"]) != self.prompts.fingerprint:
            raise UserError(
                "data.train: the run to resume has other prompts, or another order or data.chat_template_kwargs; "
                "resume with those that it was started with"
            )
        self.position = int(state["position"])

    def _next(self) -> tuple[int, int]:
        epoch, offset = divmod(self.position, len(self.prompts))
        self.position += 1
        return int(self.order(epoch)[offset]), epoch

    def _weights(self, candidates: list[tuple[int, int]], rate: float) -> np.ndarray:
        """The candidates' weights 1 / (1 - P_q); 0 for pruned ones."""
        if rate == 0:
            return np.ones(len(candidates))
        return prompt_weights(
            self.history,
            np.array([index for index, _ in candidates]),
            np.array([self._uniform(*candidate) for candidate in candidates]),
            rate,
            self.pruning.sampling,
            self.pruning.selection,
        )

    def _uniform(self, index: int, epoch: int) -> float:
        return float(uniforms(1, self.seed, "epoch", epoch, self.prompts.uid(index))[0])
