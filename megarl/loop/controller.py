"""What only rank 0 holds: prompts and their order, graders, the ledger and the run directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarl.algorithms import pruning
from megarl.config import Settings
from megarl.data.ledger import Entry, Fate, Ledger
from megarl.data.loader import Draw, Loader
from megarl.data.prompts import read_prompts
from megarl.errors import RunError
from megarl.learner import precision as precisions
from megarl.loop.batching import Collected, Experience
from megarl.models.config_json import read_shape
from megarl.rewards.workers import Graders
from megarl.run import provenance
from megarl.run.atomic import clear_errors
from megarl.run.directory import RunDirectory
from megarl.types import Batch, Prompt
from megarl.view.progress import RunProgress

STATE = "data.npz"


class Controller:
    """Reads the data and starts the graders; `with Controller(…) as controller` ends them."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase, progress: RunProgress) -> None:
        self.settings, self.progress = settings, progress
        prompts, report = read_prompts(settings.data.train, tokenizer, settings.data)
        progress.say(f"training prompts: {report}")
        self.held_out: list[Prompt] = []
        if settings.data.eval:
            table, report = read_prompts(settings.data.eval, tokenizer, settings.data, setting="data.eval")
            progress.say(f"held-out prompts: {report}")
            self.held_out = [table[i] for i in range(min(len(table), settings.evaluation.limit or len(table)))]
        self.loader = Loader(prompts, settings.pruning, settings.seed, settings.data.shuffle)
        self.ahead: dict[int, Draw] = {}  # of steps whose rollout has begun, or had when the run was saved
        self.ledger = Ledger()
        self.expected_length = pruning.ExpectedLength()
        self.answer: Sequence[int] | None = (
            None  # to the first prompt, under the run's first weights: see loop/rollout_engine.py
        )
        self.graders = Graders(settings.reward.function, settings.reward.workers, settings.reward.timeout)
        self.run: RunDirectory | None = None
        if notice := pruning.notice(settings.pruning):
            progress.say(notice)

    @property
    def first_prompt(self) -> Sequence[int]:
        """The tokens of the first training prompt."""
        return self.loader.prompts[0].token_ids

    def open_run(self, resume_step: int | None, ranks: int) -> None:
        """Start the run directory, or go on with it after `resume_step`."""
        with clear_errors(self.settings.run):
            self.run = RunDirectory(self.settings.run, self.settings, resume_step)
            provenance.write(self.settings.run, ranks)
            precisions.write_manifest(self.settings.run, self.settings.precision, read_shape(self.settings.model.path))

    def draw(self, step: int, n: int) -> Draw:
        """The next n prompts, for a step."""
        return self.loader.draw(n, pruning.active(self.settings.pruning, step, self.settings.steps))

    def draw_ahead(self, step: int) -> Draw:
        """A step's prompts; those that were drawn for it before the run was resumed, if any were."""
        if step not in self.ahead:
            self.ahead[step] = self.draw(step, self.settings.batch.prompts_per_step)
        return self.ahead[step]

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Record figures and show them."""
        assert self.run
        with clear_errors(self.settings.run):
            self.run.metrics(step, metrics)
        self.progress.step(step, metrics)

    def make(self, collected: Collected, experience: Experience, step: int) -> list[Batch]:
        """The batches of a step."""
        if collected.replaced and not collected.groups:
            raise RunError("algorithm.dynamic_sampling: every group of the step has equal rewards; nothing to learn")
        if not collected.groups:
            raise RunError("pruning.refill: false, and pruning left no prompt of the step; set it to true")
        expected = self.expected_length.mean() if self.settings.pruning.prompts else None
        batches = experience.make(collected, step, expected)
        if warning := pruning.warning(np.array([c.weight for c in collected.completions]), self.settings.pruning):
            self.progress.say(f"step {step}: {warning}")
        return batches

    def finish_step(self, step: int, collected: Collected, metrics: dict[str, Any]) -> None:
        """Remember what the step saw: rollouts, metrics, pruning history, ledger, expected response length."""
        assert self.run
        with clear_errors(self.settings.run):
            self.run.rollouts(step, collected.groups)
        for drawn, group in zip(collected.drawn, collected.groups, strict=True):
            self.loader.history.update(drawn.index, float(np.mean([abs(c.advantage) for c in group.completions])))
        for drawn in collected.replaced:
            self.loader.history.update(drawn.index, 0.0)  # equal rewards have no advantage
        self.expected_length.update(*collected.lengths())
        self.ledger.record_step(step, metrics["weight_version"], self._entries(collected))
        self.report(step, metrics)

    def save(self, folder: Path) -> None:
        """Write data position, prompts drawn ahead, pruning history, expected length, the canary's answer and ledger
        into a checkpoint's folder."""
        lengths = {f"length_{k}": v for k, v in self.expected_length.state().items()}
        ahead = {f"ahead_{step}_{k}": v for step, draw in self.ahead.items() for k, v in draw.state().items()}
        assert self.answer is not None
        arrays = {**self.loader.state(), **lengths, **ahead, "answer": np.array(self.answer, np.int32)}
        np.savez(folder / STATE, allow_pickle=False, **arrays)
        self.ledger.commit(folder)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        with np.load(folder / STATE, allow_pickle=False) as state:
            self.loader.restore(state)
            self.answer = state["answer"].tolist()
            self.expected_length.restore({k[7:]: v for k, v in state.items() if k.startswith("length_")})
            for step in sorted({int(k.split("_")[1]) for k in state if k.startswith("ahead_")}):
                arrays = {k.split("_")[2]: v for k, v in state.items() if k.startswith(f"ahead_{step}_")}
                self.ahead[step] = self.loader.drawn_before(arrays)
        self.ledger = Ledger.load(folder)

    def _entries(self, collected: Collected) -> Iterator[Entry]:
        """The step's prompts, as the ledger has them."""
        per_prompt = self.settings.batch.completions_per_prompt
        for index, epoch in collected.pruned:
            yield Entry(index, epoch, Fate.PRUNED)
        for drawn in collected.replaced:
            yield Entry(drawn.index, drawn.epoch, Fate.REPLACED, per_prompt)
        for drawn, group in zip(collected.drawn, collected.groups, strict=True):
            trained = sum(c.weight > 0 for c in group.completions)
            fate = Fate.TRAINED if trained else Fate.DROPPED
            yield Entry(drawn.index, drawn.epoch, fate, len(group.completions), trained)

    def __enter__(self) -> Controller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.graders.close()
        if self.run:
            self.run.close()
