"""Supervised fine-tuning through the loop's own learner: `megarl sft CONFIG [key=value …] [--nproc N]`.

Every rank runs `sft`; rank 0 has the demonstrations. It reads the settings `run`, `seed`, `steps`, `model`, `data`
(train files of prompts and responses), `parallel`, `precision`, `optimizer`, `packing`, `batch.tokens_per_row` and
`batch.prompts_per_step`, the demonstrations per update. It writes the model to `run`/model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from megarl.config import Settings
from megarl.data.balance import Cost
from megarl.data.demonstrations import Demonstration, read_demonstrations
from megarl.learner import parallel
from megarl.learner.export import export
from megarl.learner.learner import Learner, sft_objective
from megarl.loop.batching import pack_rows
from megarl.loop.collectives import any_rank
from megarl.models.tokenizer import load_tokenizer
from megarl.run.atomic import Appender, clear_errors
from megarl.run.lock import only_job
from megarl.run.records import METRICS
from megarl.runtime.interrupt import Interrupt
from megarl.types import Batch, Sample, derive_seed
from megarl.view.progress import RunProgress


def sft(settings: Settings) -> bool:
    """Fine-tune on this rank. The loss of an update is the mean over its response tokens.

    Returns whether all steps are done: a Ctrl-C, SIGTERM or SIGUSR1 on any rank writes the model so far and stops.
    """
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        world = parallel.start(settings.parallel, settings.precision, settings.seed, settings.collective_timeout)
        stack.callback(world.close)
        stack.enter_context(world.watchdog(settings.heartbeat_timeout, settings.run / "logs"))
        if any_rank(interrupt.asked, world):
            return False
        progress = RunProgress(settings.steps, quiet=not world.is_controller)
        stack.callback(progress.close)

        demonstrations: list[Demonstration] = []
        if world.is_controller:
            stack.enter_context(only_job(settings.run, progress.say))
            tokenizer = load_tokenizer(settings.model.path)
            longest = settings.batch.tokens_per_row + 1  # a sequence's last token is no input
            demonstrations, too_long = read_demonstrations(settings.data.train, tokenizer, settings.data, longest)
            progress.say(f"{len(demonstrations)} demonstrations, {too_long} dropped: longer than batch.tokens_per_row")
            file = Appender(settings.run / METRICS)
            stack.callback(file.close)
        learner = Learner(settings, world, total_updates=settings.steps)
        cost = Cost.of_model(learner.shape)

        order = draw_order(len(demonstrations), settings.seed, settings.data.shuffle)
        for step in range(1, settings.steps + 1):
            began = time.perf_counter()
            batch = None
            if world.is_controller:
                chosen = [demonstrations[next(order)] for _ in range(settings.batch.prompts_per_step)]
                batch = make_batch(chosen, settings, world.dp_size, cost)
            metrics = learner.train_step(batch, sft_objective)
            if world.is_controller:
                metrics = {"step": step, **metrics, "seconds_train": time.perf_counter() - began}
                file.append(json.dumps(metrics))
                progress.step(step, metrics)
            if any_rank(interrupt.asked, world):
                break
        with clear_errors(settings.run / "model", consequence=""):
            export(learner, world, settings.model.path, settings.run / "model")
        progress.say(f"the model of step {step} is in {settings.run / 'model'}")
    return step == settings.steps


def draw_order(count: int, seed: int, shuffle: bool) -> Iterator[int]:
    """Positions 0 … count - 1, over and over; each round in another order when shuffled."""
    epoch = 0
    while count:
        key = derive_seed(seed, "sft", epoch)
        yield from (np.random.default_rng(key).permutation(count) if shuffle else np.arange(count)).tolist()
        epoch += 1


def make_batch(demonstrations: list[Demonstration], settings: Settings, dp_size: int, cost: Cost) -> Batch:
    """One update's samples. Each response token is scaled by 1 / (response tokens of the update)."""
    tokens = sum(len(d.token_ids) - d.response_start for d in demonstrations)
    samples = [Sample(d.token_ids, d.response_start, scale=1.0 / tokens) for d in demonstrations]
    return Batch(samples, pack_rows(samples, settings, dp_size, cost), float(len(samples)), float(tokens))
