"""This rank's rollout engine, if it drives one. Its weights are kept equal to the learner's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megarl.config import Settings
from megarl.learner.learner import Learner
from megarl.learner.parallel import World
from megarl.loop.collectives import broadcast
from megarl.loop.controller import Controller
from megarl.rollout import groups
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.early_exit import plan
from megarl.rollout.engine import Engine, Sampling
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.servers import factory
from megarl.rollout.weights import verify
from megarl.run.atomic import clear_errors
from megarl.runtime.event_loop import EventLoop
from megarl.runtime.watchdog import waiting
from megarl.types import Batch, Sample

CANARY_TOKENS = 32


class RolloutEngine:
    """The first `drivers` ranks drive an engine and share the prompts. `engine` is None on the others.

    Embedded: every rank has an engine. Servers: the controller drives the pool of all of them.

    The canary is a training prompt and the engine's greedy answer under the run's first weights. In bf16 the log-probs
    of less likely tokens differ by more than 0.1 between two right programs (docs/concepts.md).
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        loop: EventLoop,
        tokenizer: PreTrainedTokenizerBase,
        learner: Learner,
        controller: Controller | None,
    ) -> None:
        self.settings, self.world, self.loop, self.learner = settings, world, loop, learner
        self.controller = controller
        self.canary_difference = 0.0
        plan.check(settings.rollout, tokenizer)
        self.drivers = world.world_size if settings.rollout.embedded else 1
        self.engine: Engine | None = None
        if settings.rollout.embedded:
            self.engine = LocalEngine(
                settings.model.path,
                tokenizer,
                device=world.device,
                dtype=torch.float32 if settings.precision.dtype == "fp32" else torch.bfloat16,
                batch_slots=settings.rollout.local_max_sequences,
                max_length=groups.longest_sequence(settings),
                keep_experts=settings.rollout.replay_routing,
            )
        elif world.is_controller:
            pool = factory.build(settings, Vocabulary(tokenizer))
            self.engine = pool
            try:
                loop.run(pool.start())
            except BaseException:
                self.close()
                raise

    def push(self, version: int) -> None:
        """Send the learner's weights to every engine. Check them tensor by tensor and by the canary. Collective."""
        tensors = self.learner.named_tensors()
        if self.engine is None:
            for _ in tensors:  # all ranks gather them together
                pass
        else:
            with (
                waiting(f"the engines to take the weights of version {version}", self.world.deadline_s),
                clear_errors(self.settings.run / "weights"),
            ):
                self.loop.run(verify.send(self.engine, version, tensors))
        canary = self._canary()
        if self.engine is not None:
            with waiting(f"the engines to score the canary of version {version}", self.world.deadline_s):
                checked = verify.check(self.engine, version, canary, self.settings.rollout.canary_limit)
                self.canary_difference = self.loop.run(checked)

    def close(self) -> None:
        """Free the engines. Servers that this run started end."""
        if self.engine is not None:
            self.loop.run(self.engine.close())

    def _canary(self) -> verify.Canary:
        """The canary with the learner's log-probs of it, on every rank, in the engines' arithmetic.

        Engines do not quantise. FP8's rounding would hide a wrong tensor here; the step's mismatch measures it.
        """
        batch = None
        if self.controller:
            prompt = self.controller.loader.prompts[0].token_ids
            if self.controller.answer is None:
                self.controller.answer = self._answer(prompt)
            tokens = np.array([*prompt, *self.controller.answer], np.int32)
            rows = [[[0] if rank == 0 else []] for rank in range(self.world.dp_size)]
            batch = Batch([Sample(tokens, response_start=len(prompt), scale=1.0)], rows, 1.0, float(len(tokens)))
        scores = self.learner.logprobs(batch, "policy", temperature=1.0, quantised=False)
        mine = verify.Canary(batch.samples[0].token_ids.tolist(), scores[0].tolist()) if batch else None
        canary = broadcast(mine, self.world)
        assert canary is not None
        return canary

    def _answer(self, prompt: Sequence[int]) -> list[int]:
        """The engine's likeliest continuation of a prompt. It does not stop at the end of text."""
        assert self.engine
        sampling = Sampling(min(CANARY_TOKENS, self.settings.rollout.max_response_tokens), temperature=0.0)
        with waiting("the engine to write the canary", self.world.deadline_s):
            return self.loop.run(self.engine.generate(prompt, sampling, "canary/0|0")).token_ids
