"""This rank's rollout engine, if it drives one. Its weights are kept equal to the learner's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megarl.config import Settings
from megarl.learner.learner import Learner
from megarl.learner.parallel import World, devices_here
from megarl.loop import canaries
from megarl.loop.collectives import broadcast
from megarl.loop.controller import Controller
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.early_exit import plan
from megarl.rollout.engine import Engine, Sampling
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.servers import factory
from megarl.rollout.weights import verify
from megarl.rollout.weights.transport import NotDelivered
from megarl.run.atomic import clear_errors
from megarl.runtime.event_loop import EventLoop
from megarl.runtime.watchdog import waiting

CANARY_TOKENS = 64


class RolloutEngine:
    """The first `drivers` ranks drive an engine and share the prompts. `engine` is None on the others.

    Embedded: every rank has an engine. Servers: the controller drives the pool of all of them.

    The canary is a training prompt and the engine's greedy answer under the run's first weights. How far right programs
    may differ on it depends on the model, so the learner's own rounding is measured at every sync (docs/concepts.md).
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
        self._sent: dict[str, int] = {}  # checksums of the last send, on a rank with an engine
        self.canary_difference = self.canary_rounding = 0.0  # nats: the largest difference; what rounding explains
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
                max_length=settings.longest_sequence,
                keep_experts=settings.rollout.replay_routing,
            )
        elif world.is_controller:
            pool = factory.build(settings, Vocabulary(tokenizer), devices_here(world.world_size))
            self.engine = pool
            try:
                loop.run(pool.start())
            except BaseException:
                self.close()
                raise

    def push(self, version: int) -> None:
        """Send the learner's weights to every engine. Check them tensor by tensor and by the canary. Collective.

        Sends again if every engine died amid the send and those that came back need another one.
        """
        while not (self._delivered(self._send, version) and self._delivered(self._check, version)):
            pass

    def _delivered(self, action: Callable[[int], None], version: int) -> bool:
        """Whether the engines had the weights until the end of `action`, on every rank. Collective."""
        try:
            action(version)
            done = True
        except NotDelivered:  # of a pool, which only the controller has
            done = False
        return done if self.settings.rollout.embedded else broadcast(done, self.world)

    def _send(self, version: int) -> None:
        tensors = self.learner.named_tensors()
        if self.engine is None:
            for _ in tensors:  # all ranks gather them together
                pass
        else:
            with (
                waiting(f"the engines to take the weights of version {version}", self.world.deadline_s),
                clear_errors(self.settings.run / "weights"),
            ):
                self._sent = self.loop.run(verify.send(self.engine, version, tensors))

    def _check(self, version: int) -> None:
        canary = self._canary()
        if self.engine is not None:
            with waiting(f"the engines to score the canary of version {version}", self.world.deadline_s):
                checked = verify.check(self.engine, version, canary, self.settings.rollout.canary_limit, self._sent)
                self.canary_difference = self.loop.run(checked)
        self.canary_rounding = float(np.sqrt(np.mean(canary.scale() ** 2)))

    def close(self) -> None:
        """Free the engines. Servers that this run started end."""
        if self.engine is not None:
            self.loop.run(self.engine.close())

    def _canary(self) -> verify.Canary:
        """The canary with the learner's log-probs and rounding, on every rank."""
        prompt: Sequence[int] = ()
        if self.controller:
            prompt = self.controller.loader.prompts[0].token_ids
            if self.controller.answer is None:
                self.controller.answer = self._answer(prompt)
        answer = self.controller.answer if self.controller else None
        tokens = np.array([*prompt, *(answer or ())], np.int32)
        return broadcast(canaries.measure(self.learner, tokens, len(prompt)), self.world)

    def _answer(self, prompt: Sequence[int]) -> list[int]:
        """The engine's likeliest continuation of a prompt. It does not stop at the end of text."""
        assert self.engine
        sampling = Sampling(min(CANARY_TOKENS, self.settings.rollout.max_response_tokens), temperature=0.0)
        with waiting("the engine to write the canary", self.world.deadline_s):
            return self.loop.run(self.engine.generate(prompt, sampling, "canary/0|0")).token_ids
