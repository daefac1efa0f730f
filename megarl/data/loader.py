"""What is rolled out next: every epoch's prompts in their order, less those that DPPO prunes by their history.

The state is a position, the pruning history and what identifies the data: a resumed run goes on with the very next
prompt, with the same draws. Nothing here holds an object per prompt.
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
class Drawn:
    """A prompt to roll out."""

    prompt: Prompt
    index: int  # its position in the data
    epoch: int
    keep: float = 1.0  # 1 - P_q, the probability with which it survived pruning


@dataclass(slots=True)
class Draw:
    """The outcome of one call of `Loader.draw`."""

    prompts: list[Drawn] = field(default_factory=list)
    pruned: list[tuple[int, int]] = field(default_factory=list)  # (index, epoch)

    @property
    def taken(self) -> int:
        """Prompts taken from the epoch's order, pruned ones included: what the denominators are made from."""
        return len(self.prompts) + len(self.pruned)

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays; `Loader.drawn_before` gives it back."""
        return {
            "prompts": np.array([(each.index, each.epoch) for each in self.prompts], np.int64).reshape(-1, 2),
            "keep": np.array([each.keep for each in self.prompts]),
            "pruned": np.array(self.pruned, np.int64).reshape(-1, 2),
        }


def told_apart(drawn: Sequence[Drawn], before: Sequence[Drawn] = ()) -> list[Prompt]:
    """The prompts of `drawn`; one that the step already has, in `before` or here, goes by the uid `uid@epoch`.

    A step holds a prompt twice when it takes more than a third of the data. Seeds and request ids are made from the
    uid: under one uid both groups would be the same completions.
    """
    seen = {each.prompt.uid for each in before}
    prompts = []
    for each in drawn:
        prompt = each.prompt
        if prompt.uid in seen:
            prompt = replace(prompt, uid=f"{prompt.uid}@{each.epoch}")
        seen.add(prompt.uid)
        prompts.append(prompt)
    return prompts


class Loader:
    """Draws prompts; a function of the seed, the history and the number of prompts taken so far.

    Owns the pruning history: the caller updates it by `history.update(index, …)` once a group's advantages are known.
    """

    def __init__(self, prompts: PromptTable, pruning: config.Pruning, seed: int, shuffle: bool = True) -> None:
        self.prompts, self.pruning, self.seed = prompts, pruning, seed
        self.history = History(len(prompts))
        self.order = EpochOrder(len(prompts), seed, shuffle)
        self.position = 0
        """Prompts taken since the run began."""

    def draw(self, n: int, prune: bool = True) -> Draw:
        """The next prompts: n of them when pruned ones are replaced (`pruning.refill`), else those of n that survive.

        `prune`: whether pruning is on at this point of the run (`algorithms.pruning.active`). Call it again within a
        step for more. With Bernoulli draws a prompt's fate depends on (seed, epoch, uid) and its history only.
        """
        rate = self.pruning.prompts if prune else 0.0
        draw = Draw()
        while (missing := n - len(draw.prompts)) > 0:
            # Never more than are missing: the last one taken is then a survivor, as unpruned_prompts() presumes.
            candidates = [self._take() for _ in range(missing)]
            for (index, epoch), weight in zip(candidates, self._weights(candidates, rate), strict=True):
                if weight == 0:
                    draw.pruned.append((index, epoch))
                else:
                    draw.prompts.append(Drawn(self.prompts[index], index, epoch, keep=float(1 / weight)))
            if not self.pruning.refill:
                break
            if draw.taken * (1 - rate) > 64 * n:  # a chance below exp(-60), whatever the history
                raise RunError(
                    f"pruning.prompts: {rate:g} left only {len(draw.prompts)} of {draw.taken} prompts taken, {n} wanted"
                )
        return draw

    def drawn_before(self, state: Mapping[str, np.ndarray]) -> Draw:
        """The draw that `Draw.state` was made of, when this position of the data was already taken."""
        prompts = [
            Drawn(self.prompts[int(index)], int(index), int(epoch), float(keep))
            for (index, epoch), keep in zip(state["prompts"], state["keep"], strict=True)
        ]
        return Draw(prompts, [(int(index), int(epoch)) for index, epoch in state["pruned"]])

    @property
    def epoch(self) -> float:
        """Epochs done, with the part of the current one."""
        return self.position / len(self.prompts)

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays for one .npz: 4 bytes a prompt; `restore` gives it back bit by bit."""
        state = {
            "position": np.array(self.position),
            "seed": np.array(self.seed),
            "shuffle": np.array(self.order.shuffle),
            "fingerprint": np.array(self.prompts.fingerprint),
        }
        return state | {f"history_{name}": value for name, value in self.history.state().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a `state`; raises UserError when it was made with other data, another seed or other shuffling."""
        for setting, ours, theirs in [
            ("seed", self.seed, int(state["seed"])),
            ("data.shuffle", self.order.shuffle, bool(state["shuffle"])),
        ]:
            if ours != theirs:
                raise UserError(f"{setting}: {ours}, but the run to resume has {theirs}: prompts would be repeated")
        self.history.restore({name[8:]: value for name, value in state.items() if name.startswith("history_")})
        if str(state["fingerprint"]) != self.prompts.fingerprint:
            raise UserError(
                "data.train: other prompts, or in another order, than the run to resume has; resume with the data that "
                "it was started with"
            )
        self.position = int(state["position"])

    def _take(self) -> tuple[int, int]:
        epoch, offset = divmod(self.position, len(self.prompts))
        self.position += 1
        return int(self.order(epoch)[offset]), epoch

    def _weights(self, candidates: list[tuple[int, int]], rate: float) -> np.ndarray:
        """Weights 1 / (1 - P_q) of the candidates, 0 for the pruned."""
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
