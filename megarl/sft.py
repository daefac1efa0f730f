"""Supervised fine-tuning through the loop's own learner: `megarl sft CONFIG [key=value …] [--nproc N] [--resume]`.

Every rank runs `sft`; rank 0 has the demonstrations. It reads the settings `run`, `seed`, `steps`, `model`, `data`
(files of prompts and responses), `parallel`, `precision`, `optimizer`, `packing`, `checkpoint`, `evaluation.every`,
`evaluation.limit`, `batch.tokens_per_row` and `batch.prompts_per_step`, the demonstrations per update. It writes the
model to `run`/model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarl.config import Settings
from megarl.data.balance import Cost
from megarl.data.demonstrations import Demonstration, read_demonstrations
from megarl.errors import UserError
from megarl.learner import parallel
from megarl.learner.export import export
from megarl.learner.learner import Learner, sft_objective
from megarl.loop import metrics
from megarl.loop.batching import pack_rows
from megarl.loop.checkpoints import Checkpoints
from megarl.loop.collectives import any_rank
from megarl.models.config_json import read_shape
from megarl.models.tokenizer import load_tokenizer
from megarl.run import provenance
from megarl.run.atomic import clear_errors
from megarl.run.directory import RunDirectory
from megarl.run.lock import only_job
from megarl.run.timeline import PhaseLog
from megarl.runtime.interrupt import Interrupt
from megarl.types import Batch, Sample, derive_seed
from megarl.view.progress import RunProgress, Stopwatch

STATE = "lesson.json"


def sft(settings: Settings, resume: bool = False) -> bool:
    """Fine-tune on this rank. The loss of an update is the mean over its response tokens.

    Returns whether it is finished: a Ctrl-C, SIGTERM or SIGUSR1 on any rank saves and stops. `eval/loss` is the mean
    over the response tokens of `data.eval`.
    """
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        world = parallel.start(settings.parallel, settings.precision, settings.seed, settings.collective_timeout)
        stack.callback(world.close)
        progress = RunProgress(settings.steps, quiet=not world.is_controller)
        stack.callback(progress.close)
        if world.is_controller:
            stack.enter_context(only_job(settings.run, progress.say))
        stack.enter_context(world.watchdog(settings.heartbeat_timeout, settings.run / "logs"))
        phases = PhaseLog(settings.run, world.rank)
        stack.callback(phases.close)
        watch = Stopwatch(progress, phases, settings.collective_timeout)

        def leaving() -> bool:
            return any_rank(interrupt.asked, world)

        if leaving():
            return False

        lesson = None
        if world.is_controller:
            lesson = Lesson(settings, load_tokenizer(settings.model.path), world.dp_size, progress)
            stack.callback(lesson.close)
        learner = Learner(settings, world, total_updates=settings.steps)
        learner.temperature = 1.0  # responses are imitated as they are
        checkpoints = stack.enter_context(Checkpoints(settings, world, learner, lesson, progress))
        done = checkpoints.restore() if resume else 0
        if lesson:
            lesson.open_run(done if resume else None, world.world_size)
        if leaving():
            return False

        def evaluate(step: int) -> dict[str, float]:
            due = step == 0 or metrics.due(step, settings.evaluation.every, settings.steps)
            if not due or not settings.data.eval:
                return {}
            with watch("evaluation"):
                found = learner.logprobs(lesson.held_out if lesson else None, "policy")
            return {"eval/loss": -float(np.concatenate(list(found.values())).mean(dtype=np.float64))} if found else {}

        if done == 0 and (measured := evaluate(0)) and lesson:
            lesson.report(0, measured)
        watch.lap()
        for step in range(done + 1, settings.steps + 1):
            watch.step = step
            with watch("train"):
                trained = learner.train_step(lesson.batch(step) if lesson else None, sft_objective)
            measured = evaluate(step)
            if lesson:
                lesson.report(step, trained | measured | {name: s for name, s in watch.lap().items() if s})
            stop = leaving()
            if stop or metrics.due(step, settings.checkpoint.every, settings.steps):
                with watch("checkpoint"):
                    checkpoints.save(step)
            if stop and step < settings.steps:
                progress.say(f"stopped after step {step}, saved; continue with --resume")
                return False
        folder = settings.run / "model"
        if not any_rank(world.is_controller and folder.exists(), world):  # a run that was cut after the export
            with clear_errors(folder, consequence=""):
                export(learner, world, settings.model.path, folder)
        progress.say(f"the model of step {settings.steps} is in {folder}")
    return True


class Lesson:
    """What only rank 0 has: the demonstrations, their order and the run directory."""

    def __init__(
        self, settings: Settings, tokenizer: PreTrainedTokenizerBase, dp_size: int, progress: RunProgress
    ) -> None:
        self.settings, self.dp_size, self.progress = settings, dp_size, progress
        self.cost = Cost.of_model(read_shape(settings.model.path))
        self.demonstrations = self._read(settings.data.train, tokenizer, "training")
        self.held_out: Batch | None = None
        if settings.data.eval:
            rows = self._read(settings.data.eval, tokenizer, "held-out")[: settings.evaluation.limit]
            self.held_out = make_batch(rows, settings, dp_size, self.cost)
        self.run: RunDirectory | None = None

    def open_run(self, resume_step: int | None, ranks: int) -> None:
        """Start the run directory, or continue it after `resume_step`."""
        self.run = RunDirectory(self.settings.run, self.settings, resume_step)
        for notice in self.run.notices:
            self.progress.say(notice)
        provenance.write(self.settings.run, ranks, job="sft")

    def batch(self, step: int) -> Batch:
        """The demonstrations of a step: the same ones, whether the run was cut before or not."""
        size = self.settings.batch.prompts_per_step
        order = draw_order(len(self.demonstrations), self.settings.seed, self.settings.data.shuffle, (step - 1) * size)
        chosen = [self.demonstrations[i] for i in islice(order, size)]
        return make_batch(chosen, self.settings, self.dp_size, self.cost)

    def report(self, step: int, values: dict[str, Any]) -> None:
        """Record metrics and show them."""
        assert self.run
        self.run.metrics(step, values)
        self.progress.step(step, values)

    def save(self, folder: Path) -> None:
        """Write what fixes the order of the demonstrations into a checkpoint's folder."""
        if self.run:
            self.run.flush()
        (folder / STATE).write_text(json.dumps(self._order()) + "\n")

    def load(self, folder: Path) -> None:
        """Raises UserError unless the order is the checkpoint's: else some rows would come twice and others never."""
        saved = json.loads((folder / STATE).read_text()) if (folder / STATE).is_file() else {}
        for name, value in self._order().items():
            if saved.get(name) != value:
                raise UserError(
                    f"{name}: differs from what {folder} was saved with ({saved.get(name)}, now {value}); "
                    "take back the change, or name another run"
                )

    def close(self) -> None:
        if self.run:
            self.run.close()

    def _read(self, files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, what: str) -> list[Demonstration]:
        longest = self.settings.batch.tokens_per_row + 1  # a sequence's last token is no input
        found, too_long = read_demonstrations(files, tokenizer, self.settings.data, longest)
        self.progress.say(f"{what} demonstrations: {len(found)}, {too_long} dropped: longer than batch.tokens_per_row")
        return found

    def _order(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for row in self.demonstrations:
            digest.update(np.array([row.response_start, len(row.token_ids)]).tobytes() + row.token_ids.tobytes())
        data, batch = self.settings.data, self.settings.batch
        return {
            "data.train": digest.hexdigest()[:16], "data.shuffle": data.shuffle, "seed": self.settings.seed,
            "batch.prompts_per_step": batch.prompts_per_step,
        }  # fmt: skip


def draw_order(count: int, seed: int, shuffle: bool, start: int = 0) -> Iterator[int]:
    """Positions 0 … count - 1, over and over; each round in another order when shuffled. `start` of them are past."""
    epoch, past = divmod(start, count)
    while True:
        key = derive_seed(seed, "sft", epoch)
        yield from (np.random.default_rng(key).permutation(count) if shuffle else np.arange(count))[past:].tolist()
        epoch, past = epoch + 1, 0


def make_batch(demonstrations: list[Demonstration], settings: Settings, dp_size: int, cost: Cost) -> Batch:
    """One update's samples. Each response token is scaled by 1 / (response tokens of the update)."""
    tokens = sum(len(d.token_ids) - d.response_start for d in demonstrations)
    samples = [Sample(d.token_ids, d.response_start, scale=1.0 / tokens) for d in demonstrations]
    return Batch(samples, pack_rows(samples, settings, dp_size, cost), float(len(samples)), float(tokens))
