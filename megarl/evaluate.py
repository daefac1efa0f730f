"""Evaluation without training: a model folder, or the newest checkpoint of a run, on held-out problems."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megarl.config import Settings
from megarl.learner import parallel
from megarl.learner.learner import Learner
from megarl.loop.checkpoints import Checkpoints
from megarl.loop.collector import Collector
from megarl.loop.controller import Controller
from megarl.loop.rollout_engine import RolloutEngine
from megarl.models.tokenizer import load_tokenizer
from megarl.run.atomic import write_text
from megarl.run.directory import as_records
from megarl.runtime.event_loop import EventLoop
from megarl.view.progress import RunProgress


def evaluate(
    settings: Settings, trained: bool, temperatures: list[float], responses: Path | None = None
) -> list[dict[str, Any]]:
    """Evaluate on this rank. Returns one object per temperature on rank 0 ([] elsewhere).

    `trained`: take the weights of the newest whole checkpoint of `settings.run`, else those of `settings.model.path`.
    `responses`: a file that gets every response as one JSON object a line, with its temperature.
    """
    with ExitStack() as stack:
        timeouts = settings.collective_timeout, settings.rollout.timeout
        world = parallel.start(settings.parallel, settings.precision, settings.seed, *timeouts)
        stack.callback(world.close)
        stack.enter_context(world.watchdog(settings.heartbeat_timeout, settings.run / "logs"))
        progress = RunProgress(len(temperatures), quiet=not world.is_controller)
        stack.callback(progress.close)
        tokenizer = load_tokenizer(settings.model.path)
        controller = None
        if world.is_controller:
            controller = Controller(settings, tokenizer, progress)
            stack.callback(controller.close)
        learner = Learner(settings, world, total_updates=1)
        step = Checkpoints(settings, world, learner, controller, progress).restore() if trained else 0
        loop = stack.enter_context(EventLoop(world.device))
        engine = RolloutEngine(settings, world, loop, tokenizer, learner, controller)
        stack.callback(engine.close)
        engine.push(version=step)
        rows: list[dict[str, Any]] = []
        written: list[str] = []
        for temperature in temperatures:
            settings.evaluation.temperature = temperature
            metrics, groups = Collector(settings, world, loop, engine, tokenizer, controller).evaluate()
            progress.phase(f"temperature {temperature:g}")
            rows.append({"step": step, "temperature": temperature, **metrics})
            written += [json.dumps({"temperature": temperature, **each}) + "\n" for each in as_records(groups)]
            if controller:
                controller.tell_failures(f"temperature {temperature:g}", groups)
        if responses and world.is_controller:
            write_text(responses, written)
        return rows if world.is_controller else []
