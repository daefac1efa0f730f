"""The loop. Every rank runs it. Rank 0 is the controller: it has the data, the groups and the run directory.

One step, as the papers tell it:

    draw prompts; DPPO prunes those whose history says little            data/loader.py
    roll out G completions each; Step-GRPO ends finished thoughts early  loop/collector.py, rollout/early_exit/
    grade each completion as soon as it is done                          rewards/grading.py
    (with async_steps, the next steps' rollouts begin here)              runtime/event_loop.py
    score: count steps, shape the rewards                                loop/scoring.py, algorithms/steps.py
    penalise: subtract the KL term, where the reward bears it            loop/logprobs.py
    build: advantages over whole groups, prune completions, pack         loop/batching.py, algorithms/, data/packing.py
    old and reference log-probs; forward and backward; optimizer         learner/, algorithms/loss.py
    send the new weights to the engines and check them by a canary       loop/rollout_engine.py, rollout/weights/
    commit weights, data position and history by one rename              loop/checkpoints.py
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from megarl.algorithms import presets
from megarl.algorithms.loss import policy_loss
from megarl.config import Settings
from megarl.learner import parallel
from megarl.learner.learner import Learner
from megarl.loop import logprobs, metrics
from megarl.loop.batching import BatchBuilder
from megarl.loop.checkpoints import Checkpoints
from megarl.loop.collectives import any_rank, broadcast
from megarl.loop.collector import Collector
from megarl.loop.controller import Controller
from megarl.loop.rollout_engine import RolloutEngine
from megarl.models.tokenizer import load_tokenizer
from megarl.run.lock import only_job
from megarl.run.timeline import PhaseLog
from megarl.runtime.event_loop import EventLoop
from megarl.runtime.interrupt import Interrupt
from megarl.types import Batch
from megarl.view.progress import RunProgress, Stopwatch


def train(settings: Settings, resume: bool = False) -> bool:
    """Run the job on this rank. Returns whether it is finished: a Ctrl-C, SIGTERM or SIGUSR1 on any rank saves and
    stops. Before the first step there is nothing to save, and the ranks stop as soon as all of them can."""
    updates = settings.batch.updates_per_step
    switches = presets.resolve(settings.algorithm, settings.rollout.max_response_tokens, updates)
    objective = partial(policy_loss, switches=switches)

    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        timeouts = settings.collective_timeout, settings.rollout.timeout
        world = parallel.start(settings.parallel, settings.precision, settings.seed, *timeouts)
        stack.callback(world.close)
        progress = RunProgress(settings.steps, quiet=not world.is_controller)
        stack.callback(progress.close)
        if world.is_controller:
            stack.enter_context(only_job(settings.run, progress.say))
        stack.enter_context(world.watchdog(settings.heartbeat_timeout, settings.run / "logs"))  # all ranks wait here
        phases = PhaseLog(settings.run, world.rank)
        stack.callback(phases.close)
        watch = Stopwatch(progress, phases, world.deadline_s)

        def leaving() -> bool:
            return any_rank(interrupt.asked, world)

        if leaving():
            return False

        tokenizer = load_tokenizer(settings.model.path)
        controller = None
        if world.is_controller:
            controller = Controller(settings, tokenizer, progress)
            stack.callback(controller.close)
        learner = Learner(settings, world, total_updates=settings.steps * updates)
        checkpoints = stack.enter_context(Checkpoints(settings, world, learner, controller, progress))
        checkpoints.clear_partial()
        done = checkpoints.restore() if resume else 0
        if controller:
            controller.open_run(done if resume else None, world.world_size)

        if leaving():
            return False
        loop = stack.enter_context(EventLoop(world.device))
        engine = RolloutEngine(settings, world, loop, tokenizer, learner, controller)
        stack.callback(engine.close)
        collector = Collector(settings, world, loop, engine, tokenizer, controller, switches.dynamic_sampling)
        builder = BatchBuilder(settings, switches, world.dp_size)

        def evaluate(step: int, last: int) -> dict[str, float]:
            with watch("evaluation"):
                if step and not metrics.due(step, settings.evaluation.every, last):
                    return {}
                measured, responses = collector.evaluate()
                if controller and responses:
                    controller.finish_evaluation(step, responses)
                return measured

        with watch("sync"):
            engine.push(version=done)
        if leaving():
            return False
        if done == 0 and (measured := evaluate(0, settings.steps)) and controller:
            controller.report(0, measured)
        watch.lap()

        for step in range(done + 1, settings.steps + 1):
            watch.step = step
            rounds = collector.collect(step, watch)
            with watch("rollout"):
                for later in range(step + 1, step + settings.async_steps + 1):
                    collector.begin(later)
            with watch("reward"):
                collected = collector.score(rounds)
                if controller:
                    controller.inspect(step, collected)
                over = broadcast(collected.nothing_left, world)
                batches: Sequence[Batch | None] = [None] * (0 if over else updates)
                if not over:
                    logprobs.penalise(collected.groups, learner, switches, builder)
                    if controller:
                        batches = builder.build(collected, step, controller.expected_tokens)
            with watch("logprobs"):
                logprobs.fill(batches, learner, switches)
                unseen = logprobs.unseen_mismatch(collected, batches, learner, builder, world)
            with watch("train"):
                trained = [learner.train_step(batch, objective) for batch in batches]
            with watch("rollout"):
                collector.settle()
            with watch("sync"):
                engine.push(version=step)
            last = step if over else settings.steps
            measured = evaluate(step, last)

            if controller:
                measured |= metrics.of_step(step, collected, batches, trained, unseen, engine, settings)
                controller.finish_step(step, collected, measured | watch.lap())
            stop = leaving()
            # Before the first update there is nothing to save.
            if learner.version and (stop or metrics.due(step, settings.checkpoint.every, last)):
                with watch("checkpoint"):
                    checkpoints.save(step)
            if over:
                checkpoints.finish()
                if controller:
                    controller.end_early(step, collected, saved=learner.version > 0)
                return True
            if stop:
                progress.say(f"stopped after step {step}, saved; continue with --resume")
                return step == settings.steps
    return True
