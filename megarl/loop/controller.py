"""What only rank 0 has: prompts and their order, graders, the ledger and the run directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarl.algorithms import pruning
from megarl.config import Settings
from megarl.data.ledger import Entry, Fate, Ledger
from megarl.data.loader import Loader, PromptBatch
from megarl.data.prompts import read_prompts
from megarl.errors import RunError
from megarl.learner import precision as precisions
from megarl.loop.scoring import Collected
from megarl.models.config_json import read_shape
from megarl.rewards.references import unreadable
from megarl.rewards.workers import Graders
from megarl.rollout.early_exit import closing
from megarl.run import provenance
from megarl.run.arrays import read_arrays
from megarl.run.directory import RunDirectory
from megarl.run.records import damaged
from megarl.types import Prompt, ScoredGroup
from megarl.view.progress import RunProgress

STATE = "data.npz"
TOLD = 5  # messages of failed grades that are said; the rollouts have all of them
CHECK_SECONDS = 30.0  # for reading every reference answer once, before the first step


class Controller:
    """Reads the data and starts the graders."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase, progress: RunProgress) -> None:
        self.settings, self.progress = settings, progress
        prompts, report = read_prompts(settings.data.train, tokenizer, settings.data)
        progress.say(f"training prompts: {report}")
        self.held_out: list[Prompt] = []
        if settings.data.eval:
            table, report = read_prompts(settings.data.eval, tokenizer, settings.data, setting="data.eval")
            progress.say(f"held-out prompts: {report}")
            if shared := table.shared_with(prompts):
                progress.say(f"WARNING: {shared} of {len(table)} held-out prompts are also training prompts")
            self.held_out = [table[i] for i in range(min(len(table), settings.evaluation.limit or len(table)))]
        self.loader = Loader(prompts, settings.pruning, settings.seed, settings.data.shuffle)
        self.ahead: dict[int, PromptBatch] = {}  # of steps whose rollout has begun, or had when the run was saved
        self.ledger = Ledger()
        self.expected_length = pruning.ExpectedLength()
        self.answer: Sequence[int] | None = None  # the canary's, see loop/rollout_engine.py
        reward = settings.reward
        found = unreadable(reward.function, (prompts, self.held_out), reward.workers, reward.timeout, CHECK_SECONDS)
        if found.rows:
            progress.say(f"reference answers: {found}")
        self.graders = Graders(settings.reward.function, settings.reward.workers, settings.reward.timeout)
        self.run: RunDirectory | None = None
        self._told: set[str] = set()  # messages of grades that failed
        if notice := pruning.notice(settings.pruning):
            progress.say(notice)

    @property
    def expected_tokens(self) -> float | None:
        """Response tokens expected of a completion under prompt pruning; None without it. See `BatchBuilder.build`."""
        return self.expected_length.mean() if self.settings.pruning.prompts else None

    def open_run(self, resume_step: int | None, ranks: int) -> None:
        """Start the run directory, or continue it after `resume_step`. RunError if the disk fails, here and below."""
        self.run = RunDirectory(self.settings.run, self.settings, resume_step)
        for notice in self.run.notices:
            self.progress.say(notice)
        provenance.write(self.settings.run, ranks)
        precisions.write_manifest(self.settings.run, self.settings.precision, read_shape(self.settings.model.path))

    def draw(self, step: int, n: int) -> PromptBatch:
        """The next n prompts for a step."""
        return self.loader.draw(n, pruning.active(self.settings.pruning, step, self.settings.steps))

    def draw_ahead(self, step: int) -> PromptBatch:
        """A step's prompts. A resumed run takes those that it drew before it stopped."""
        if step not in self.ahead:
            self.ahead[step] = self.draw(step, self.settings.batch.prompts_per_step)
        return self.ahead[step]

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Record metrics and show them."""
        assert self.run
        self.run.metrics(step, metrics)
        self.progress.step(step, metrics)

    def inspect(self, step: int, collected: Collected) -> None:
        """Look at a step's responses before they are trained on. Raises RunError if early exit cannot fit the model."""
        exits = self.settings.rollout.early_exit
        if exits.enabled and (warning := closing.check(collected.groups, exits.think_end)):
            self.progress.say(f"step {step}: {warning}")

    def finish_step(self, step: int, collected: Collected, metrics: dict[str, Any]) -> None:
        """Record what the step saw: rollouts, metrics, pruning history, ledger, expected response length."""
        assert self.run
        weights = np.array([c.weight for c in collected.completions])
        if warning := pruning.warning(weights, self.settings.pruning):
            self.progress.say(f"step {step}: {warning}")
        self.run.rollouts(step, collected.made)
        self.tell_failures(f"step {step}", collected.made)
        for scheduled, group in zip(collected.prompts, collected.groups, strict=True):
            self.loader.history.update(scheduled.index, float(np.mean([abs(c.advantage) for c in group.completions])))
        for scheduled in collected.replaced:
            self.loader.history.update(scheduled.index, 0.0)  # equal scores are not learned from
        self.expected_length.update(*collected.lengths())
        if collected.nothing_left:
            metrics["ended"] = ended(collected)
        self.ledger.record_step(step, metrics["weight_version"], self._entries(collected))
        self.report(step, metrics)

    def end_early(self, step: int, collected: Collected, saved: bool) -> None:
        """Say that dynamic sampling found nothing to learn from.

        Raises RunError when no completion was right: then the data are too hard, not solved.
        """
        kept = "the run is saved" if saved else "nothing was trained, so nothing is saved"
        said = f"step {step}: {ended(collected)}; {kept}"
        if not any(c.verdict == "right" for group in collected.made for c in group.completions):
            raise RunError(
                f"algorithm.dynamic_sampling: {said}; take easier problems, or look at the grader's verdicts"
            )
        self.progress.say(f"{said} and complete" if saved else said)

    def finish_evaluation(self, step: int, responses: Sequence[ScoredGroup]) -> None:
        """Record the held-out responses."""
        assert self.run
        self.run.evaluation(step, responses)
        self.tell_failures(f"evaluation of step {step}", responses)

    def tell_failures(self, where: str, groups: Sequence[ScoredGroup]) -> None:
        """Say what went wrong in grading: one line, with the first message that was not told before."""
        graded = [(group.prompt, c) for group in groups for c in group.completions]
        failed = [(prompt, c) for prompt, c in graded if c.verdict in ("timeout", "error")]
        new = [(prompt, c) for prompt, c in failed if c.message not in self._told]
        if not new or len(self._told) >= TOLD:
            return
        prompt, c = new[0]
        self._told.add(c.message)
        self.progress.say(
            f"{where}: {len(failed)} of {len(graded)} grades failed, that of {prompt.source} with: "
            f"{c.message or f'verdict {c.verdict}'}"
        )

    def save(self, folder: Path) -> None:
        """Write the state of data, pruning and canary, the prompts drawn ahead and the ledger into a checkpoint's
        folder. What the run directory recorded until now is then on the disk itself."""
        lengths = {f"length_{k}": v for k, v in self.expected_length.state().items()}
        ahead = {f"ahead_{step}_{k}": v for step, batch in self.ahead.items() for k, v in batch.state().items()}
        assert self.answer is not None
        if self.run:
            self.run.flush()
        arrays = {**self.loader.state(), **lengths, **ahead, "answer": np.array(self.answer, np.int32)}
        np.savez(folder / STATE, allow_pickle=False, **arrays)
        self.ledger.commit(folder)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        state = read_arrays(folder / STATE)
        with damaged(folder / STATE):
            self.loader.restore(state)
            self.answer = state["answer"].tolist()
            self.expected_length.restore({k[7:]: v for k, v in state.items() if k.startswith("length_")})
            for step in sorted({int(k.split("_")[1]) for k in state if k.startswith("ahead_")}):
                arrays = {k.split("_")[2]: v for k, v in state.items() if k.startswith(f"ahead_{step}_")}
                self.ahead[step] = self.loader.batch_from(arrays)
        self.ledger = Ledger.load(folder)

    def _entries(self, collected: Collected) -> Iterator[Entry]:
        """The step's prompts as the ledger records them."""
        per_prompt = self.settings.batch.completions_per_prompt
        for index, epoch in collected.pruned:
            yield Entry(index, epoch, Fate.PRUNED)
        for scheduled in collected.replaced:
            yield Entry(scheduled.index, scheduled.epoch, Fate.REPLACED, per_prompt)
        for scheduled, group in zip(collected.prompts, collected.groups, strict=True):
            trained = sum(c.weight > 0 for c in group.completions)
            fate = Fate.TRAINED if trained else Fate.DROPPED
            yield Entry(scheduled.index, scheduled.epoch, fate, len(group.completions), trained)

    def close(self) -> None:
        self.graders.close()
        if self.run:
            self.run.close()


def ended(collected: Collected) -> str:
    """Why a run is over before its last step."""
    scored = [c for group in collected.made for c in group.completions]
    right = sum(c.verdict == "right" for c in scored)
    return (
        f"nothing is left to learn: each of {len(collected.made)} groups has equal scores, "
        f"and {right} of {len(scored)} completions are right"
    )
